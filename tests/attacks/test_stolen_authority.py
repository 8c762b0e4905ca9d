"""What a thief of an authority's key can do to a network of real nodes, and what is left of it after the answer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from attack_tools import assert_unharmed, beside
from lab import Lab, LabError, Node, check_logs, ping, wait_for_answer, wait_until
from lab.joining import address, network_of
from lab.node import P2P_PORT, ROOT

pytestmark = [pytest.mark.root, pytest.mark.alone]  # round trips are compared

SETTLE_S = 20.0


def steal(lab: Lab, stolen: Node, told: Node, victim: Node) -> str:
    """The thief tells `told` all of it; the peer id of the node it lets in."""
    where = f"/ip4/{told.namespace.address}/tcp/{P2P_PORT}"
    network = told.ask()["network"]["network_id"]
    words = (str(stolen.state_dir), where, told.peer_id(), network, victim.namespace.label, address(victim))
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parents[1])))
    done = lab.run(stolen.namespace, sys.executable, "-m", "lab.thief", *words, env={"PYTHONPATH": path})
    return done.stdout.strip()


def authorities(node: Node) -> list[str]:
    rows = json.loads(node.vpnd("authority", "list", "--json").stdout)
    return [row["name"] for row in rows if not row["revoked"]]


def members(node: Node) -> dict[str, dict[str, object]]:
    return {row["peer_id"]: row for row in json.loads(node.vpnd("members", "--json").stdout)}


def test_a_thief_of_an_authority_takes_nothing_and_is_put_out_everywhere() -> None:
    with Lab(4) as lab:
        a, b, c, d = network_of(lab)
        a.vpnd("authority", "add", "b")
        wait_until(lambda: b.ask()["network"]["authority"], SETTLE_S, "b is an authority")
        wait_for_answer(lab, a.namespace, address(c), SETTLE_S)
        wanted = address(c)
        assert b.stop() == 0

        with beside(a, c, address=wanted) as during:
            thief = steal(lab, b, a, c)
        assert_unharmed(during)
        for node in (a, c, d):
            wait_until(lambda node=node: thief in members(node), SETTLE_S, "the thief's node is let in")
            assert (
                members(node)[thief]["addresses"] == []
                and members(node)[c.peer_id()]["addresses"][0] == wanted
            )
            assert f"{wanted} belongs to c" in str(node.ask()["network"]["conflicts"])
        assert ping(lab, a.namespace, wanted, count=5, interval_s=0.1).loss == 0

        said = a.vpnd("authority", "revoke", "b", "--stolen").stdout
        assert "b is no authority any more" in said and "signed again" in said
        for node in (a, c, d):
            wait_until(lambda node=node: authorities(node) == ["a"], SETTLE_S, "only a is an authority")
            assert set(members(node)) == {one.peer_id() for one in (a, c, d)}
            assert not node.ask()["network"]["conflicts"]

        with pytest.raises(LabError, match="NotAdmitted"):  # and nobody listens to the thief any more
            steal(lab, b, a, c)
        assert a.vpnd("authority", "revoke", "b", check=False).returncode == 8, (
            "what is not done is not said to be"
        )
        assert ping(lab, a.namespace, wanted, count=5, interval_s=0.1).loss == 0
        check_logs([a, c, d])
