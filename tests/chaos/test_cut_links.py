"""Connections that are reset, links that come and go, peers that are half there."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from chaos_tools import SESSION_PORT, peer_row, shard_pid
from lab import (
    Node,
    SteadyFlow,
    blackhole,
    cut_connections,
    drops,
    flap,
    iperf3,
    ping,
    reset_storm,
    running_nodes,
    settled,
    unharmed,
    wait_connected,
    wait_for_answer,
    wait_until,
    within,
)

pytestmark = pytest.mark.root

#: What may be lost of a flow whose sessions end under it.
LOST_WITH_SESSIONS = {"no_session", "circuit_open", "queue_full", "queue_delay", "flow_full"}
#: Dials, handshakes and streams anew, on a busy machine.
BACK_S = 3.0


def test_resets_cost_what_was_on_its_way_and_no_more() -> None:
    """Each reset ends every session of a node; they are made anew before their packets have waited for long."""
    with running_nodes() as nodes, unharmed(nodes):
        a, b = nodes
        with SteadyFlow(a.namespace, b.namespace, b.virtual_ip) as flow:
            for _ in range(3):
                opened = sum(shard["sessions_opened"] for shard in a.ask()["shards"])
                cut_connections(a.lab, a.namespace, SESSION_PORT)
                wait_until(
                    lambda opened=opened: (
                        sum(shard["sessions_opened"] for shard in a.ask()["shards"]) >= opened + 2
                    ),
                    BACK_S,
                    "there are new sessions",
                )
                wait_connected(nodes)
        print(f"lost {flow.lost} of {flow.sent}, longest gap {flow.longest_gap_s():.3f} s")
        assert flow.late == 0
        assert flow.lost < 0.05 * flow.sent
        assert flow.longest_gap_s() < within(1.0)
        for node in nodes:
            assert set(drops(settled(node))) <= LOST_WITH_SESSIONS


def test_a_storm_of_resets_ends_with_its_end() -> None:
    """Every segment of every connection is answered by a reset, dials too, for a while."""
    with running_nodes() as nodes, unharmed(nodes):
        a, b = nodes
        with SteadyFlow(a.namespace, b.namespace, b.virtual_ip) as flow:
            time.sleep(0.5)
            with reset_storm(a.lab, b.namespace):
                # the waits are drawn by lot, and failures beside a session that still lives do not count
                wait_until(lambda: peer_row(a, b)["circuit"] == "open", 25, "the circuit opens")
            calm_s = time.monotonic()
            time.sleep(BACK_S + 0.5)
        again_s = min(moment for moment in flow.times_s if moment > calm_s) - calm_s
        print(f"again after {again_s:.2f} s")
        assert again_s < within(BACK_S)
        assert flow.late == 0
        assert set(drops(settled(a))) <= LOST_WITH_SESSIONS


def test_a_link_that_flaps_costs_packets_and_keeps_nothing() -> None:
    with running_nodes() as nodes, unharmed(nodes):
        a, b = nodes
        flapping = threading.Thread(
            target=flap, args=(a.lab, b.namespace), kwargs={"times": 5, "seconds": 10}
        )
        with SteadyFlow(a.namespace, b.namespace, b.virtual_ip) as flow:
            flapping.start()
            flapping.join()
            up_s = time.monotonic()
            time.sleep(BACK_S)
        again_s = min(moment for moment in flow.times_s if moment > up_s) - up_s
        suspected = sum(shard["health_failures"] for node in nodes for shard in node.ask()["shards"])
        print(f"again after {again_s:.2f} s, {flow.lost} of {flow.sent} lost, {flow.late} late")
        assert again_s < within(BACK_S)
        # What a session had on its way when it fell silent comes after all if it recovers, by when its flows have
        # gone on elsewhere: once for each time, at most.
        assert flow.late_stretches <= suspected


def test_a_node_that_dies_behind_a_wall_leaves_a_half_open_peer_that_is_found_out() -> None:
    """Nothing tells the other node: no FIN, no reset. Its sessions must not wait for ever, and the node that comes
    back is not taken for the one that went."""
    quick = {"health": {"interval": "1s", "idle_interval": "1s", "timeout": "500ms"}}
    with running_nodes(3, shards=1, settings=quick) as (a, b, c), unharmed([a, c]):
        with SteadyFlow(a.namespace, b.namespace, b.virtual_ip, rate_hz=200) as flow:
            time.sleep(0.5)
            with blackhole(b.lab, b.namespace):
                b.kill()
                b.wait_ended()
                wait_until(lambda: peer_row(a, b)["sessions"] == 0, 5, "a has given its sessions up")
                assert ping(a.lab, a.namespace, c.virtual_ip, count=20).loss == 0
            b.start()
            b.wait_ready()
            ready_s = time.monotonic()
            wait_for_answer(a.lab, a.namespace, b.virtual_ip, BACK_S)
            print(f"again {time.monotonic() - ready_s:.2f} s after it was ready")
        assert flow.late == 0
        wait_connected([a, b, c])
        settled(b)


def test_a_shard_that_hangs_is_a_half_open_peer_and_gets_its_flows_back() -> None:
    """Its kernel acknowledges, nobody reads: only a probe tells. New flows avoid it, the other shard's go on."""
    quick = {
        "health": {"interval": "500ms", "idle_interval": "500ms", "timeout": "500ms"},
        "process": {"watchdog": "1m"},
    }
    with running_nodes(settings=quick) as nodes, unharmed(nodes):
        a, b = nodes
        hung = shard_pid(b, 0)
        os.kill(hung, signal.SIGSTOP)
        try:
            wait_until(lambda: dead_sessions(a) >= 1, 5, "its session is given up")
            with SteadyFlow(a.namespace, b.namespace, b.virtual_ip, rate_hz=200) as flow:
                time.sleep(1.0)
        finally:
            os.kill(hung, signal.SIGCONT)
        wait_connected(nodes)
        assert flow.late == 0
        for port in range(20_000, 20_008):
            with SteadyFlow(a.namespace, b.namespace, b.virtual_ip, port=port, rate_hz=100) as again:
                wait_until(
                    lambda again=again: len(again.numbers) > 5, BACK_S, "every flow gets through again"
                )


def dead_sessions(node: Node) -> int:
    return sum(shard["health_deaths"] for shard in node.ask()["shards"])


def test_rings_that_are_full_drop_and_nothing_else() -> None:
    """The smallest rings there may be, a shard that stands still for a moment, and more than it could ever take."""
    small = {"worker": {"ring_bytes": 1 << 19}}
    with running_nodes(shards=1, settings=small) as nodes, unharmed(nodes):
        a, b = nodes
        pid = shard_pid(a, 0)

        def stumble() -> None:
            for _ in range(4):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.2)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.2)

        stumbling = threading.Thread(target=stumble)
        report = iperf3(
            a.lab, a.namespace, b.namespace, b.virtual_ip, seconds=2, udp=True, bitrate="0", during=stumbling.start
        )  # fmt: skip
        stumbling.join()
        assert report["end"]["sum"]["packets"] > 0
        dropped = drops(settled(a))
        assert dropped.get("ring_full", 0) > 0
        assert set(dropped) <= {"tun_queue_full", "ring_full", "queue_full", "queue_delay", "flow_full"}
        assert ping(a.lab, a.namespace, b.virtual_ip, count=20).loss == 0
