"""Sessions that are replaced all the time, under load: nothing is lost, nothing comes late, nothing piles up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from chaos_tools import udp_port_of
from lab import Node, SteadyFlow, drops, iperf3, received_bytes, running_nodes, settled, unharmed, wait_until

pytestmark = [pytest.mark.root, pytest.mark.alone]

SHARDS = 2
OFTEN = {"stream_pool": {"cleanup_interval": "500ms"}}
#: What the bulk flow may lose of its own: it fills its queue.
CONGESTION = {"tun_queue_full", "ring_full", "queue_full", "queue_delay", "flow_full"}

#: name -> settings, for how many seconds, how many sessions are replaced at least
RULES: dict[str, tuple[dict[str, dict[str, Any]], int, int]] = {
    "every session is two seconds old at most, and looked at every half second": (
        {"session": {"max_age": "2s"}}, 10, 5,
    ),
    "so, and both nodes have dialed at once: there are more sessions than anybody wanted": (
        {"session": {"max_age": "1s"}, "p2p": {"dial_stagger": "0s"}, "multiplexer": {"max_sessions": 1}}, 4, 4,
    ),
    "the bulk flow's session is used up several times a second": (
        {"session": {"max_bytes": 16 << 20}}, 4, 5,
    ),
}  # fmt: skip


@pytest.fixture(params=RULES.values(), ids=RULES.keys())
def rotating(request: pytest.FixtureRequest) -> Iterator[tuple[list[Node], int, int]]:
    rule, seconds, least = request.param
    with running_nodes(settings=OFTEN | rule, shards=SHARDS) as nodes:
        yield nodes, seconds, least


def test_sessions_are_replaced_under_load_without_losing_a_packet(
    rotating: tuple[list[Node], int, int],
) -> None:
    nodes, seconds, least = rotating
    a, b = nodes
    ports = [udp_port_of(b.virtual_ip, shard, SHARDS) for shard in range(SHARDS)]
    with unharmed(nodes):
        with (
            SteadyFlow(a.namespace, b.namespace, b.virtual_ip, port=ports[0]) as one,
            SteadyFlow(a.namespace, b.namespace, b.virtual_ip, port=ports[1]) as other,
        ):
            time.sleep(0.3)
            report = iperf3(a.lab, a.namespace, b.namespace, b.virtual_ip, seconds=seconds)
        rotated = sum(shard["sessions_rotated"] for node in nodes for shard in node.ask()["shards"])
        print(
            f"{rotated} sessions rotated in {seconds} s, {received_bytes(report) >> 20} MiB, "
            f"{len(one.numbers) + len(other.numbers)} datagrams, {drops(a.ask())}"
        )
        assert rotated >= least
        for flow in (one, other):
            assert (flow.lost, flow.late) == (0, 0)
        for node in nodes:
            node.config["session"] = {}
            node.write_config()
            node.ask("reload")
            status = settled(node)
            assert set(drops(status)) <= CONGESTION
            assert not sum(shard["session_errors"] for shard in status["shards"])
        wait_until(lambda: sum(sessions(a)) <= 2 * SHARDS + SHARDS, 15, "as many sessions as the load wants")


def sessions(node: Node) -> list[int]:
    """Of each shard."""
    return [shard["sessions"] for shard in node.ask()["shards"]]
