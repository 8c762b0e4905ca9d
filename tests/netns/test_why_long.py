"""`vpnd why` and faults that take long to show, or all of the CPU. Long: VPND_LONG_TESTS=1."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
from lab import (
    Lab,
    Node,
    blackhole,
    closed,
    cut_connections,
    meanwhile,
    narrow,
    running_nodes,
    socket_in,
    wait_connected,
    wait_until,
)
from lab.joining import address, machine, network_of, wait_standing
from lab.node import P2P_PORT
from why_tools import SETTLE_S, blamed, shard_pid, walk

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.long("takes minutes"),
]

SETTINGS = {
    "health": {"interval": "1s", "idle_interval": "1s", "timeout": "700ms"},
    "process": {"watchdog": "0s", "restart_max": "500ms"},
    "worker": {"ring_bytes": "512KiB"},
}


@contextlib.contextmanager
def flood(node: Node, ip: str, size: int, pause_s: float = 0.0) -> Iterator[None]:
    """Inside the block datagrams of so many bytes are sent to `ip` as fast as they go, with a pause after every 100."""
    sock = socket_in(node.namespace, "", socket.SOCK_DGRAM)

    def send(over: threading.Event) -> None:
        data = bytes(size)
        while not over.wait(pause_s):
            for _ in range(100):
                with contextlib.suppress(OSError):
                    sock.sendto(data, (ip, 9))

    with contextlib.closing(sock), meanwhile(send):
        yield


@contextlib.contextmanager
def slowed(node: Node) -> Iterator[None]:
    """Inside the block the node's shard runs a small part of the time."""
    pid = wait_until(lambda: shard_pid(node), SETTLE_S, "the shard is up")

    def stutter(over: threading.Event) -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait(0.1)
            os.kill(pid, signal.SIGCONT)
            over.wait(0.005)

    with meanwhile(stutter):
        yield


@contextlib.contextmanager
def crash_loop(node: Node) -> Iterator[None]:
    """Inside the block the shard is killed whenever it is up."""

    def kill_again(over: threading.Event) -> None:
        while not over.wait(0.02):
            with contextlib.suppress(KeyError, IndexError, ProcessLookupError):
                if pid := shard_pid(node, 0):
                    os.kill(pid, signal.SIGKILL)

    with meanwhile(kill_again):
        yield


def shard_ends_again_and_again(a: Node, b: Node) -> None:
    with crash_loop(a):
        wait_until(lambda: a.ask()["shards"][0]["restarts"] > 1, SETTLE_S, "it is a loop")
        step = blamed(a, "b", "shard")
        assert "ends again and again" in step.says and "vpnd logs" in step.remedy
        assert step.counters["restarts of shard 0"] > 1
        assert "a says of its way back: shard: " in blamed(b, "a", "answer").says
    wait_connected([a, b], SETTLE_S)


def shard_hangs(a: Node, b: Node) -> None:
    pid = wait_until(lambda: shard_pid(a, 0), SETTLE_S, "the shard is up")
    os.kill(pid, signal.SIGSTOP)
    try:
        step = blamed(a, "b", "shard")
        assert "hangs" in step.says and f"kill -9 {pid}" in step.remedy
        assert (
            "a says of its way back: shard: the flow is shard 0's, which hangs"
            in blamed(b, "a", "answer").says
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_connected([a, b], SETTLE_S)


def vanishes(a: Node, b: Node) -> None:
    """Everything to and from b is dropped."""
    with blackhole(a.lab, b.namespace):
        for one, other in ((a, b), (b, a)):
            name = other.namespace.label
            step = blamed(one, name, "path")
            assert "nothing comes back" in step.says
            said = one.vpnd("why", name, check=False).stdout
            assert f"nothing answers at {other.namespace.address}, not even pings" in " ".join(said.split())


def large_packets_vanish(a: Node, b: Node) -> None:
    """A path whose MTU is smaller than what it says: it is told, be there a session that gets through or not."""
    with narrow(a.lab, b.namespace, 1200):
        for one, other in ((a, "b"), (b, "a")):
            (path,) = (step for step in walk(one, other).steps if step.name == "path")
            assert "large packets vanish" in path.says or "large ones do not" in path.says, path
            assert path.verdict == "ok" or "tcp_mtu_probing" in path.remedy


def port_closed_one_way(a: Node, b: Node) -> None:
    """b takes no connections, and has no address to dial a at."""
    (peer,) = b.config["peers"]
    addresses, peer["addresses"] = peer["addresses"], []
    b.write_config()
    b.ask("reload")
    with closed(a.lab, b.namespace, P2P_PORT):
        cut_connections(a.lab, b.namespace, P2P_PORT)
        blamed(a, "b", "path")
        said = " ".join(a.vpnd("why", "b", check=False).stdout.split())
        assert (
            f"the machine at {b.namespace.address} answers pings, the TCP port of vpnd there does not" in said
        )
        step = blamed(b, "a", "path")
        assert "waits for its dial" in step.says and "p2p.listen" in step.remedy
    peer["addresses"] = addresses
    b.write_config()
    b.ask("reload")


def ring_is_full(a: Node, b: Node) -> None:
    """What the supervisor reads, and the shard does not take."""
    a.config["network"]["queue_length"] = 20_000
    a.write_config()
    a.ask("reload")
    with slowed(a), flood(a, b.virtual_ip, 1300, 0.005):
        step = blamed(a, "b", "shard")
    assert "does not keep up" in step.says and "vpnd scale" in step.remedy
    assert step.lost and step.counters["ring_full"] == step.lost


def queue_of_the_device_is_full(a: Node, b: Node) -> None:
    """More in one burst than the device's queue takes."""
    a.config["network"]["queue_length"] = 1
    a.write_config()
    a.ask("reload")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(flood(a, b.virtual_ip, 100))
        step = blamed(a, "b", "device")
    assert "faster than the node reads" in step.says and "network.queue_length" in step.remedy
    assert step.lost and step.counters["tun_queue_full"] == step.lost


def well_again(a: Node, b: Node) -> None:
    for one, other in ((a, "b"), (b, "a")):
        wait_until(lambda one=one, other=other: not walk(one, other).cause, SETTLE_S, "nothing is blamed")


FAULTS = (
    shard_ends_again_and_again,
    shard_hangs,
    vanishes,
    large_packets_vanish,
    port_closed_one_way,
    ring_is_full,
)


def test_faults_between_and_floods_are_named_with_their_remedy() -> None:
    with running_nodes(shards=1, settings=SETTINGS) as (a, b):
        for fault in FAULTS:
            fault(a, b)
            well_again(a, b)
        queue_of_the_device_is_full(a, b)


def test_who_was_removed_or_has_expired_is_told_so_on_both_ends() -> None:
    with Lab(3) as lab:
        a, b, _ = network_of(lab, {"membership": {"gossip_interval": "500ms"}})
        theirs = address(b)
        assert not walk(a, "b").cause
        a.vpnd("remove", "b")
        wait_standing(b, "removed", SETTLE_S)
        step = blamed(b, "a", "membership")
        assert "removed from network home" in step.says and "--join TOKEN" in step.remedy
        for who in ("b", theirs):
            step = blamed(a, who, "membership")
            assert "b was removed from the network" in step.says and "vpnd invite" in step.remedy


def test_who_has_expired_is_told_so_on_both_ends() -> None:
    short = {"record_lifetime": "6s", "clock_skew": "0s", "gossip_interval": "500ms"}
    with Lab(3) as lab:
        a, b, c = network_of(lab, {"membership": short})
        a.kill(signal.SIGKILL)
        a.wait_ended()
        for node, other in ((b, "c"), (c, "b")):
            wait_standing(node, "expired", SETTLE_S)
            step = blamed(node, other, "membership")
            assert "membership has expired" in step.says and "clocks" in step.remedy


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_is_a_day_off_is_told_on_both_ends(days: int) -> None:
    with Lab(2) as lab:
        a, b = machine(lab, 0), machine(lab, 1)
        a.start()
        a.wait_ready()
        token = a.vpnd("invite").stdout.strip()
        b.start("--join", token)
        b.wait_ready()
        assert b.stop() == 0
        b.command = ["faketime", "-f", f"{days:+}d", *b.command]
        b.start()
        b.wait_ready()
        for node, other in ((a, "b"), (b, "a")):
            wait_until(lambda node=node, other=other: walk(node, other).cause, SETTLE_S, "it is seen")
            step = blamed(node, other, "membership")
            assert "date -u" in step.remedy or "clock" in step.says + step.remedy, step
