"""Datagrams beside sessions on links that lose packets and behind firewalls, which stop them or the sessions, on real
nodes."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from lab import Node, lossy, ping, running_nodes, settled, tcp_pair, wait_until, without_tcp, without_udp

pytestmark = [pytest.mark.root, pytest.mark.slow]

LOSS = 0.08
INTERVAL_S = 0.02
#: Idle paths are probed so often that both ends soon know of the last datagram.
SETTINGS = {
    "carrier": {"choice": "auto", "least_rtt": "0ms", "keepalive": "300ms", "retry_interval": "500ms"}
}
#: The promise, and what is asked of a machine on which other tests run.
WITHIN_S = 1.0 if os.environ.get("VPND_LONG_TESTS") else 3.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with running_nodes(settings=SETTINGS) as both:
        for node in both:
            wait_until(lambda node=node: state(node) == "used", 15, "datagrams arrive")
        yield both


def state(node: Node) -> str:
    return str(node.ask()["peers"][0]["datagrams"])


def counts(node: Node) -> dict[str, int]:
    """The datagrams of all its shards."""
    shards = node.ask()["shards"]
    names = [name for name in shards[0] if name.startswith("datagrams_")]
    return {name.removeprefix("datagrams_"): sum(shard[name] for shard in shards) for name in names}


def test_the_account_of_datagrams_is_right_on_a_link_that_loses_them(nodes: list[Node]) -> None:
    a, b = nodes
    with lossy(a.lab, LOSS):
        seen = ping(a.lab, a.namespace, b.virtual_ip, 200, INTERVAL_S)
    assert 0.03 < seen.loss < 0.4, "what is lost is not sent again"
    settled(a)
    settled(b)

    def adds_up() -> bool:
        for sender, receiver in ((a, b), (b, a)):
            sent, came = counts(sender)["sent"], counts(receiver)
            if not 0 <= sent - (came["received"] + came["missed"] - came["late"]) <= 4:
                return False
        return True

    # Probes that are under way make it one or two more at times.
    wait_until(adds_up, 15, "what was sent is what came and what is known to be lost")
    lost = sum(counts(node)["missed"] - counts(node)["late"] for node in nodes)
    assert lost >= round(400 * seen.loss / 2)
    peer = b.ask()["peers"][0]
    assert (
        peer["datagram_loss_in"] is not None
        and peer["datagram_rtt_ms"] > 0
        and peer["datagram_bytes"] == 1472
    )


def test_when_a_firewall_blocks_datagrams_flows_are_on_streams_within_a_second(nodes: list[Node]) -> None:
    a, b = nodes
    pings = round(4 / INTERVAL_S)
    log = a.lab.directory / "pings"
    asked = f"ping -n -D -O -c {pings} -i {INTERVAL_S} {b.virtual_ip}"
    process = a.lab.spawn(a.namespace, *asked.split(), output=log)
    wait_until(lambda: log.exists() and log.read_text().count("time=") > 25, 10, "pings are answered")
    with without_udp(a.lab, a.namespace):
        process.wait(timeout=60)
        assert state(a) == state(b) == "silent"
    times = [float(each) for each in re.findall(r"^\[([\d.]+)\] .*time=", log.read_text(), re.MULTILINE)]
    assert len(times) > pings / 2
    gap_s = max(later - earlier for earlier, later in zip(times, times[1:], strict=False))
    print(f"the longest time without an answer: {gap_s:.2f} s")
    assert gap_s < WITHIN_S
    for node in nodes:
        wait_until(lambda node=node: state(node) == "used", 15, "datagrams are used again")


@pytest.mark.parametrize("ways", ["both", "one"])
def test_when_a_firewall_blocks_tcp_flows_are_in_datagrams_within_a_second(
    nodes: list[Node], ways: str
) -> None:
    a, b = nodes
    one, other = tcp_pair(a.namespace, b.namespace, b.virtual_ip)
    with one, other:
        came = threading.Thread(target=_echo, args=(other,))
        came.start()
        waits: list[float] = []
        one.settimeout(10)

        def talk(seconds: float) -> None:
            end_s = time.monotonic() + seconds
            while (begun_s := time.monotonic()) < end_s:
                one.sendall(bytes(1000))
                assert len(one.recv(1000, socket.MSG_WAITALL)) == 1000
                waits.append(time.monotonic() - begun_s)
                time.sleep(INTERVAL_S)

        talk(1.0)
        with without_tcp(a.lab, *((a.namespace, b.namespace) if ways == "both" else (b.namespace,))):
            talk(5.0)
            assert state(a) == state(b) == "alone" and a.ask()["peers"][0]["state"] == "connected"
            loss = ping(a.lab, a.namespace, b.virtual_ip, 20, INTERVAL_S).loss
        assert loss == 0
        for node in nodes:
            wait_until(lambda node=node: state(node) == "used", 30, "there is a session again")
        talk(1.0)
        one.shutdown(socket.SHUT_WR)
        came.join()
    print(f"TCP blocked {ways}: the longest time without an answer: {max(waits):.2f} s")
    assert max(waits) < WITHIN_S


def _echo(sock: socket.socket) -> None:
    sock.settimeout(30)
    while data := sock.recv(1 << 16):
        sock.sendall(data)
