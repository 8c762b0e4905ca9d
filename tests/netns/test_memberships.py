"""Memberships that come to an end, and two that claim one address, on real nodes."""

from __future__ import annotations

import contextlib
import json
import signal

import pytest
from lab import Lab, Node, blackhole, check_logs, ping, wait_for_answer, wait_until
from lab.joining import address, join, machine, network_of, wait_standing
from lab.node import P2P_PORT

pytestmark = pytest.mark.root

SETTLE_S = 20.0
CONTESTED = "10.86.5.5"


def peers_connected(node: Node) -> int:
    return sum(peer["state"] == "connected" for peer in node.ask()["peers"])


def test_a_membership_that_nobody_renews_ends_and_its_sessions_with_it() -> None:
    short = {"record_lifetime": "4s", "clock_skew": "0s", "gossip_interval": "500ms"}
    with Lab(3) as lab:
        a, b, c = nodes = network_of(lab, {"membership": short})
        wait_for_answer(lab, b.namespace, address(c), SETTLE_S)
        a.kill(signal.SIGKILL)
        a.wait_ended()
        for node in (b, c):
            wait_standing(node, "expired", SETTLE_S)
            wait_until(lambda node=node: not peers_connected(node), SETTLE_S, "its sessions are closed")
            assert "expired" in node.vpnd("status", check=False).stdout
            assert "has ended and was not renewed" in node.log_file.read_text()
        assert ping(lab, b.namespace, address(c), count=2, interval_s=0.1).loss == 1
        check_logs(nodes)


def owner(node: Node) -> str:
    return str(json.loads(node.vpnd("resolve", CONTESTED, "--json").stdout)["name"])


def test_an_address_two_authorities_gave_out_is_the_senior_ones_members_on_every_node() -> None:
    """Behind a cut link b lets in c, and then a, which made b an authority, lets in d. Only an authority can give c
    another address: until there is one again, all that c and d can do is to say so."""
    with Lab(4) as lab:
        a, b, c, d = nodes = [machine(lab, place) for place in range(4)]
        bootstrap = f"/ip4/{d.namespace.address}/tcp/{P2P_PORT}/p2p/{d.peer_id()}"
        c.config |= {"discovery": {"bootstrap": [bootstrap]}, "retry": {"max_interval": "1s"}}
        a.start()
        a.wait_ready()
        join(a, b)
        a.vpnd("authority", "add", "b")
        wait_until(lambda: b.ask()["network"]["authority"], SETTLE_S, "b is an authority")
        with contextlib.ExitStack() as cut:
            for node, other in ((b, a), (c, a), (d, b), (d, c)):
                cut.enter_context(blackhole(lab, node.namespace, other.namespace))
            join(b, c, "--ip", CONTESTED)
            join(a, d, "--ip", CONTESTED)
            assert address(c) == address(d) == CONTESTED
            for node in (a, b):
                node.kill(signal.SIGKILL)
                node.wait_ended()
        said = f"{CONTESTED} belongs to d, and is claimed by c"
        for node in (c, d):
            wait_until(lambda node=node: node.ask()["network"]["conflicts"] == [said], SETTLE_S, "it is said")
            assert said in node.vpnd("status", check=False).stdout
            assert said in node.log_file.read_text()
        for node in (a, b):
            node.start()
            node.wait_ready()
        wait_until(lambda: address(c) != CONTESTED, SETTLE_S, "the junior one's has another address")
        for node in nodes:
            wait_until(lambda node=node: owner(node) == "d", SETTLE_S, "d has it")
            wait_until(lambda node=node: not node.ask()["network"]["conflicts"], SETTLE_S, "it is settled")
        for node in (a, c):
            wait_for_answer(lab, node.namespace, CONTESTED, SETTLE_S)
        check_logs(nodes)
