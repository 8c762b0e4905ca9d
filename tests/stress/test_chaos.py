"""Three nodes of two shards each, all talking to all, while something breaks every few seconds.

VPND_CHAOS_SECONDS: for how long (15; 600 is the long run). VPND_CHAOS_SEED: which faults, when; printed at the start.
VPND_CHAOS_CARRIER: carrier.choice of all nodes (auto).
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from chaos import SHARDS, Chaos, Memory
from lab import (
    Ledger,
    Node,
    SteadyFlow,
    drops,
    iperf3,
    received_bytes,
    running_nodes,
    settled,
    wait_connected,
)
from lab.traffic import IPERF_PORT

SECONDS = float(os.environ.get("VPND_CHAOS_SECONDS", "15"))
CARRIER = os.environ.get("VPND_CHAOS_CARRIER", "auto")
SEED = int(os.environ.get("VPND_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(SECONDS + 120)]

#: What one bulk flow may use: enough to fill queues when something breaks, not all of the machine.
BITRATE = "40M"
#: Of the memory of the first minute, or the first third of a short run, in which everything is still done for the first
#: time: buffers are filled, a reload imports what it needs.
GROWTH = 0.10 if SECONDS >= 180 else 0.25
FIRST_S = min(60.0, SECONDS / 3)
#: How much of a flow may be lost, and come late: that of a session that did not answer, was left, and came back.
MOST_LOST, MOST_LATE = 0.6, 0.005
#: What is never a packet's end, whatever breaks between nodes that trust each other.
NEVER = {
    "malformed_local", "no_route", "malformed_remote", "bad_offload_header", "source_not_allowed",
    "destination_not_ours", "peer_forgotten",
}  # fmt: skip
if (
    CARRIER == "streams"
):  # datagrams that have outlived their session take what fits a path that is found anew
    NEVER.add("too_big")
SETTINGS = {
    "health": {"interval": "2s", "timeout": "1s"},
    "carrier": {"choice": CARRIER, "least_rtt": "0ms"},
    "process": {
        "restart_settle": "1s"
    },  # a child may die every few seconds here and is not to wait ever longer
}


def test_all_to_all_while_everything_breaks() -> None:
    print(f"VPND_CHAOS_SEED={SEED} VPND_CHAOS_SECONDS={SECONDS:g}")
    with running_nodes(3, shards=SHARDS, settings=SETTINGS) as nodes:
        for node in nodes:  # what is kept for a shard that was there once is there from the beginning
            for shards in (SHARDS + 1, SHARDS):
                assert node.ask("scale", shards=shards)["shards"] == shards
        wait_connected(nodes)
        pairs = list(itertools.permutations(nodes, 2))
        chaos = Chaos(nodes, SEED)
        ledgers = [Ledger(node) for node in nodes]
        with ExitStack() as stack, ThreadPoolExecutor(len(pairs)) as pool:
            memory = stack.enter_context(Memory(nodes))
            steady = [
                stack.enter_context(SteadyFlow(one.namespace, other.namespace, other.virtual_ip, rate_hz=100))
                for one, other in pairs
            ]
            started = threading.Barrier(len(pairs) + 1)
            bulk = [
                pool.submit(bulk_flow, one, other, IPERF_PORT + place, started)
                for place, (one, other) in enumerate(pairs)
            ]
            started.wait()
            chaos.run(time.monotonic() + SECONDS)
            wait_connected(nodes, 30)
            sessions = [[shard["sessions"] for shard in node.ask()["shards"]] for node in nodes]
            carried = [received_bytes(each.result()) for each in bulk]
            growth = memory.growth(FIRST_S, FIRST_S)
        print(f"faults: {dict(chaos.done)}; changes refused: {chaos.refused}")
        print(f"bulk: {[count >> 20 for count in carried]} MiB; memory of one process: {memory.megabytes()}")
        print(f"growth: { {label: f'{share:+.1%}' for label, share in growth.items()} }")
        for (one, other), flow in zip(pairs, steady, strict=True):
            print(
                f"{one.namespace.label} to {other.namespace.label}: lost {flow.lost} of {flow.sent}, late {flow.late}, "
                f"longest gap {flow.longest_gap_s():.1f} s"
            )
        for node in nodes:
            status = settled(node)
            print(
                f"{node.namespace.label}: {status['books']['out']}, {status['books']['in']}, {drops(status)}"
            )
            assert not NEVER & drops(status).keys()
        print(f"sessions of the shards: {sessions}")
        for ledger in ledgers:
            print(ledger.compare())
        assert all(count > 0 for count in carried)
        for flow in steady:
            assert flow.lost < MOST_LOST * flow.sent
            assert flow.late <= MOST_LATE * flow.sent
            assert flow.times_s[-1] - flow.times_s[0] > SECONDS, "it got through in the end"
        assert all(share < GROWTH for share in growth.values())


def bulk_flow(one: Node, other: Node, port: int, started: threading.Barrier) -> dict:
    return iperf3(
        one.lab, one.namespace, other.namespace, other.virtual_ip,
        seconds=int(SECONDS) + 1, bitrate=BITRATE, port=port, during=started.wait,
    )  # fmt: skip
