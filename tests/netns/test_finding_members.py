"""Members that nobody told where they are: found on the local network, and in the members' table."""

from __future__ import annotations

import json
import signal

import pytest
from lab import Lab, Node, check_logs, wait_until
from lab.joining import address, all_reach_all, invite, machine
from lab.node import P2P_PORT

pytestmark = pytest.mark.root

SETTLE_S = 20.0


def started(nodes: list[Node]) -> None:
    nodes[0].start()
    nodes[0].wait_ready()
    for node in nodes[1:]:
        node.start("--join", invite(nodes[0]))
        node.wait_ready()
    all_reach_all(nodes, SETTLE_S)


def moved(node: Node, ip: str) -> None:
    """The machine gets another address instead, while nobody listens."""
    node.kill(signal.SIGKILL)
    node.wait_ended()
    # first, for those beside it go with the first address of a network
    node.lab.ip(node.namespace, "addr", "del", f"{node.namespace.address}/24", "dev", "eth0")
    version, nodad = (6, ("nodad",)) if ":" in ip else (4, ())
    node.lab.ip(node.namespace, "addr", "add", f"{ip}/{64 if nodad else 24}", "dev", "eth0", *nodad)
    node.config["p2p"]["listen"] = [f"/ip{version}/{ip}/tcp/{P2P_PORT}"]


def counter(node: Node, name: str) -> int:
    return int(node.ask()["control"]["counters"][name])


@pytest.mark.parametrize("places", [("192.168.77.11", "192.168.77.12"), ("fd77::11", "fd77::12")])
def test_two_that_both_moved_find_each_other_on_the_local_network(places: tuple[str, str]) -> None:
    with Lab(2) as lab:
        nodes = [machine(lab, place, {"discovery": {"dht": False, "mdns": True}}) for place in range(2)]
        started(nodes)
        before = [address(node) for node in nodes]
        for node, place in zip(nodes, places, strict=True):
            moved(node, place)
        for node in nodes:
            node.start()
        for node in nodes:
            node.wait_ready()
        all_reach_all(nodes, SETTLE_S)
        assert [address(node) for node in nodes] == before
        assert any("says on the local network" in node.log_file.read_text() for node in nodes)
        check_logs(nodes)


def test_a_member_is_looked_up_in_the_table_and_the_answer_is_remembered() -> None:
    with Lab(4) as lab:
        table_alone = {"mdns": False}
        nodes = [
            machine(lab, place, {"discovery": table_alone, "membership": {"neighbours": 1}})
            for place in range(4)
        ]
        started(nodes)
        c = nodes[2]
        wait_until(lambda: counter(c, "dht_published") > 0, SETTLE_S, "c is in the table")
        found = json.loads(c.vpnd("resolve", "d", "--json").stdout)
        assert [step["source"] for step in found["steps"]] == ["directory", "cache", "dht"]
        assert found["steps"][2]["result"] == f"at /ip4/{nodes[3].namespace.address}/tcp/{P2P_PORT}"
        again = json.loads(c.vpnd("resolve", "d", "--json").stdout)
        assert [step["source"] for step in again["steps"]] == ["directory", "cache"]
        assert counter(c, "dht_found") == 1
        check_logs(nodes)
