"""More flows than a node remembers: tables stay bounded, idle flows go, traffic beside them goes on."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from lab import (
    Node,
    SteadyFlow,
    drops,
    pss_bytes,
    running_nodes,
    settled,
    socket_in,
    tcp_transfer,
    wait_until,
    within,
)

pytestmark = [pytest.mark.root, pytest.mark.slow]

PORTS = 20_000
MOST_FLOWS = 4096


@pytest.fixture
def pair() -> Iterator[list[Node]]:
    few = {"worker": {"max_flows": MOST_FLOWS, "idle_timeout": "2s", "cleanup_interval": "500ms"}}
    with running_nodes(settings=few) as nodes:
        yield nodes


def flows(node: Node) -> list[int]:
    """Flows remembered: by the supervisor, then by each shard."""
    status = node.ask()
    return [status["tun"]["flows"], *(shard["flows"] for shard in status["shards"])]


def scatter(sender: Node, receiver: Node) -> None:
    """A datagram to each of 20,000 ports of the receiver, no more at once than the device queues."""
    with socket_in(sender.namespace, receiver.virtual_ip, socket.SOCK_DGRAM) as sock:
        for port in range(10_000, 10_000 + PORTS):
            if port % 100 == 0:
                time.sleep(0.005)
            try:
                sock.sendto(b"x" * 64, (receiver.virtual_ip, port))
            except ConnectionRefusedError:  # the receiver's word that nobody listens there
                pass


@pytest.mark.alone
def test_twenty_thousand_destinations_are_forgotten_again_and_hold_up_nobody(pair: list[Node]) -> None:
    a, b = pair
    memory = pss_bytes(a.pids())
    scattering = threading.Thread(target=scatter, args=(a, b))
    with SteadyFlow(a.namespace, b.namespace, b.virtual_ip, rate_hz=200) as beside:
        scattering.start()
        tcp_transfer(a.namespace, b.namespace, b.virtual_ip, 32 << 20)
        scattering.join()
        in_supervisor, *in_shards = flows(a)
        # The supervisor keeps two generations.
        assert in_supervisor <= 2 * MOST_FLOWS
        assert all(count <= MOST_FLOWS for count in in_shards)
        created = sum(shard["flows_created"] for shard in a.ask()["shards"])
        assert created > 2 * MOST_FLOWS
    assert beside.late == 0
    assert beside.longest_gap_s() < within(1.0)
    wait_until(lambda: max(flows(a)) <= 100, 15, "idle flows are forgotten")
    status = settled(a)
    for shard in status["shards"]:
        assert shard["flows"] == shard["flows_created"] - shard["flows_reaped"]
    assert set(drops(status)) <= {"tun_queue_full", "ring_full", "queue_full"}
    assert pss_bytes(a.pids()) < memory + (32 << 20)


def test_connections_made_and_ended_in_numbers_leave_no_flow(pair: list[Node]) -> None:
    a, b = pair
    for number in range(200):
        tcp_transfer(a.namespace, b.namespace, b.virtual_ip, 2000, reverse=bool(number % 2))
    for node in (a, b):
        wait_until(lambda node=node: max(flows(node)) <= 100, 15, "idle flows are forgotten")
        assert not drops(settled(node))
