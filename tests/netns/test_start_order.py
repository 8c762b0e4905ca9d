"""Nodes find each other in either order, soon, and again when one of them comes back; three as well as two."""

from __future__ import annotations

import itertools
import time

import pytest
from lab import Lab, Node, pair_of_nodes, ping, running_nodes, wait_connected, wait_for_answer

pytestmark = pytest.mark.root

#: The promise is 3 s on an idle machine; another program may have half of this one.
FIRST_ANSWER_S = 6.0


@pytest.mark.alone
@pytest.mark.parametrize(
    ("second", "apart_s"), [(0, 1.5), (1, 0.0)], ids=["a starts last", "b right behind a"]
)
def test_the_first_ping_is_answered_soon_after_both_were_started(second: int, apart_s: float) -> None:
    with Lab(2) as lab:
        nodes: list[Node] = list(pair_of_nodes(lab, shards=2))
        nodes[1 - second].start()
        time.sleep(apart_s)
        begun_s = time.monotonic()
        nodes[second].start()
        wait_for_answer(lab, nodes[0].namespace, nodes[1].virtual_ip, FIRST_ANSWER_S)
        print(f"first answer after {time.monotonic() - begun_s:.2f} s")


@pytest.mark.alone
def test_three_nodes_reach_each_other_and_one_that_leaves_is_missed_by_nobody_else() -> None:
    with running_nodes(3) as nodes:
        for one, other in itertools.permutations(nodes, 2):
            assert ping(one.lab, one.namespace, other.virtual_ip, count=3).loss == 0
        a, b, c = nodes
        assert c.stop() == 0
        assert ping(a.lab, a.namespace, c.virtual_ip, count=2).loss == 1
        assert ping(a.lab, a.namespace, b.virtual_ip, count=20).loss == 0
        states = {peer["name"]: peer["state"] for peer in a.ask()["peers"]}
        assert states["b"] == "connected" and states["c"] != "connected"
        c.start()
        wait_connected(nodes)
        assert ping(a.lab, a.namespace, c.virtual_ip, count=3).loss == 0


def test_a_peer_without_addresses_is_reached_by_its_own_dial() -> None:
    def hidden(nodes: list[Node]) -> None:
        nodes[0].config["peers"][0]["addresses"] = []

    with running_nodes(change=hidden) as (a, b):
        assert ping(a.lab, a.namespace, b.virtual_ip, count=3).loss == 0
        assert b.stop() == 0
        b.start()
        wait_connected([a, b])
        assert ping(a.lab, a.namespace, b.virtual_ip, count=3).loss == 0
