"""Nodes that are somewhere else all of a sudden: sessions are back within seconds, and flows keep their order."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from chaos_tools import SESSION_PORT, peer_row
from lab import (
    Node,
    SteadyFlow,
    moved,
    running_nodes,
    settled,
    tcp_transfer,
    unharmed,
    wait_connected,
    wait_until,
    within,
)

pytestmark = [pytest.mark.root, pytest.mark.alone]

#: From the moment the network works again.
BACK_S = 3.0
ELSEWHERE = "192.168.77.201"


def listen_everywhere(nodes: list[Node]) -> None:
    for node in nodes:
        node.config["p2p"]["listen"] = [f"/ip4/0.0.0.0/tcp/{SESSION_PORT}"]


@pytest.fixture
def pair() -> Iterator[list[Node]]:
    with running_nodes(change=listen_everywhere) as nodes:
        yield nodes


@pytest.mark.parametrize("gap_s", [0.0, 2.0])
def test_a_node_whose_address_changes_dials_from_the_new_one(pair: list[Node], gap_s: float) -> None:
    """At once, and after a while without any network. Nobody knows the new address but the node itself."""
    a, b = pair
    with (
        unharmed(pair),
        SteadyFlow(a.namespace, b.namespace, b.virtual_ip) as there,
        SteadyFlow(b.namespace, a.namespace, a.virtual_ip) as back,
    ):
        time.sleep(0.5)
        with moved(a.lab, a.namespace, ELSEWHERE, gap_s) as works_s:
            wait_connected(pair, BACK_S)
            for flow in (there, back):
                wait_until(lambda flow=flow: flow.times_s[-1] > works_s, BACK_S, "it goes on")
            tcp_transfer(b.namespace, a.namespace, a.virtual_ip, 1 << 20)
        home_s = time.monotonic()
        for flow in (there, back):
            wait_until(lambda flow=flow: flow.times_s[-1] > home_s, BACK_S, "it goes on after the way back")
    for name, flow in (("there", there), ("back", back)):
        again_s = min(moment for moment in flow.times_s if moment > works_s) - works_s
        print(f"{name}: again after {again_s:.2f} s, lost {flow.lost} of {flow.sent}, late {flow.late}")
        assert again_s < within(BACK_S)
        assert flow.late == 0


def test_a_peer_that_comes_back_where_nobody_knows_it_dials_and_is_believed(pair: list[Node]) -> None:
    """B vanishes without a word and starts elsewhere. A goes on knocking at the old address, in vain; B dials."""
    a, b = pair
    with SteadyFlow(a.namespace, b.namespace, b.virtual_ip, rate_hz=200) as flow:
        b.lab.ip(b.namespace, "link", "set", "eth0", "down")
        b.kill()
        b.wait_ended()
        wait_until(lambda: peer_row(a, b)["sessions"] == 0, 15, "a gives its sessions up")
        wait_until(lambda: peer_row(a, b)["circuit"] == "open", 20, "and leaves b alone")
        b.lab.ip(b.namespace, "link", "set", "eth0", "up")
        with moved(b.lab, b.namespace, ELSEWHERE):
            b.start()
            b.wait_ready()
            ready_s = time.monotonic()
            wait_connected(pair, BACK_S)
            wait_until(lambda: flow.times_s[-1] > ready_s, BACK_S, "packets get through")
            print(f"again {flow.times_s[-1] - ready_s:.2f} s after it was ready, at most")
            assert peer_row(a, b)["circuit"] == "closed", "what b dialed is proof enough"
            settled(a)
            settled(b)
            assert b.stop() == 0
    assert flow.late == 0
