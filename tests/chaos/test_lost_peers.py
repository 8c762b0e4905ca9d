"""Peers that go, come back, vanish without a word, or no longer read."""

from __future__ import annotations

import os
import signal
import time

import pytest
from chaos_tools import shard_pid
from lab import (
    Node,
    SteadyFlow,
    drops,
    goodput_bps,
    iperf3,
    ping,
    running_nodes,
    settled,
    tcp_transfer,
    wait_connected,
    wait_for_answer,
    wait_until,
)

pytestmark = pytest.mark.root


def test_a_node_that_stops_under_load_is_found_again_when_it_is_back() -> None:
    with running_nodes() as (a, b):

        def killed() -> None:
            b.kill()
            b.wait_ended()

        for end in (b.stop, killed):
            with SteadyFlow(a.namespace, b.namespace, b.virtual_ip):
                time.sleep(0.5)
                end()
                wait_until(lambda: a.ask()["peers"][0]["state"] != "connected", 10, "a misses it")
                time.sleep(1.0)
                begun_s = time.monotonic()
                b.start()
                wait_for_answer(a.lab, a.namespace, b.virtual_ip, 10)
                print(f"back after {time.monotonic() - begun_s:.2f} s")
            wait_connected([a, b])
        status = settled(a)
        assert set(drops(status)) <= {"no_session", "circuit_open", "queue_full"}
        assert status["dropped"]["no_session"] > 0


def blackhole(node: Node, on: bool) -> None:
    """Everything that comes to the node over the link vanishes without an answer, or no longer."""
    rules = "add table ip hole; add chain ip hole entry { type filter hook prerouting priority -500; policy drop ; }"
    node.lab.run(node.namespace, "nft", rules if on else "delete table ip hole")


def test_a_link_that_swallows_everything_is_noticed_and_used_again_when_it_works() -> None:
    patience = {
        "session": {"user_timeout": "2s"},
        "p2p": {"keepalive_interval": "1s", "dial_timeout": "2s"},
        "retry": {"max_interval": "2s"},
    }
    with running_nodes(settings=patience) as (a, b):
        with SteadyFlow(a.namespace, b.namespace, b.virtual_ip, rate_hz=100):
            blackhole(b, True)
            wait_until(lambda: a.ask()["peers"][0]["sessions"] == 0, 15, "a gives its sessions up")
            time.sleep(3.0)
            blackhole(b, False)
            begun_s = time.monotonic()
            wait_for_answer(a.lab, a.namespace, b.virtual_ip, 10)
            print(f"works again after {time.monotonic() - begun_s:.2f} s")
        wait_connected([a, b])
        tcp_transfer(a.namespace, b.namespace, b.virtual_ip, 1 << 20)
        settled(a)
        settled(b)


@pytest.mark.alone
def test_a_link_that_is_silent_for_a_moment_costs_no_session() -> None:
    with running_nodes() as (a, b):
        before = a.ask()["control"]["counters"]["dials"]
        with SteadyFlow(a.namespace, b.namespace, b.virtual_ip, rate_hz=100) as flow:
            blackhole(b, True)
            time.sleep(1.5)
            blackhole(b, False)
            time.sleep(2.5)
        # A session is a TCP connection, it repeats what was swallowed. What piled up in front of it meanwhile is
        # for CoDel to shorten, a packet now and then.
        assert flow.lost == drops(settled(a)).get("queue_delay", 0) <= flow.sent // 100
        assert flow.late == 0
        assert a.ask()["control"]["counters"]["dials"] == before
        assert all("large" not in node.log_file.read_text() for node in (a, b)), "nothing is too large"


@pytest.mark.alone
def test_a_peer_that_does_not_read_holds_up_nobody_else() -> None:
    with running_nodes(3, shards=1, settings={"process": {"watchdog": "1m"}}) as (a, b, c):

        def rate_bps() -> float:
            return goodput_bps(iperf3(a.lab, a.namespace, c.namespace, c.virtual_ip, seconds=2))

        alone = rate_bps()
        stopped = shard_pid(b, 0)
        os.kill(stopped, signal.SIGSTOP)
        try:
            with SteadyFlow(a.namespace, b.namespace, b.virtual_ip, rate_hz=4000):
                time.sleep(1.0)
                beside = rate_bps()
                answer = ping(a.lab, a.namespace, c.virtual_ip, count=20)
        finally:
            os.kill(stopped, signal.SIGCONT)
        print(f"{alone / 1e6:.0f} Mbit/s alone, {beside / 1e6:.0f} beside; ping {answer.avg_ms:.2f} ms")
        assert beside > 0.5 * alone
        assert answer.loss == 0
        assert settled(a)["dropped"]["queue_full"] > 0
        wait_for_answer(a.lab, a.namespace, b.virtual_ip, 15)
        wait_connected([a, b, c])
