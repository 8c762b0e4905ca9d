"""What a thief of a state directory can do to a network of real nodes, and what is left of it after the answer."""

from __future__ import annotations

import shutil

import pytest
from attack_tools import assert_unharmed, beside
from lab import Lab, Node, check_logs, ping, wait_for_answer
from lab.joining import address, all_reach_all, join, machine, wait_standing

pytestmark = [pytest.mark.root, pytest.mark.alone]  # round trips are compared

SETTLE_S = 20.0
#: Exit code of a command that the network refuses.
REFUSED = 8


def steal(lab: Lab, place: int, stolen: Node) -> Node:
    """Another machine with a copy of that state directory."""
    thief = machine(lab, place)
    what_runs = shutil.ignore_patterns("*.sock", "*.lock", "*.log*")
    shutil.copytree(stolen.state_dir, thief.state_dir, ignore=what_runs, dirs_exist_ok=True)
    thief.state_dir.chmod(0o700)
    return thief


@pytest.mark.long("five machines come up one after the other")
def test_a_stolen_state_directory_is_one_member_and_is_put_out_for_good() -> None:
    with Lab(4) as lab:
        a, b, c = [machine(lab, place) for place in range(3)]
        a.start()
        a.wait_ready()
        join(a, b)
        join(a, c)
        all_reach_all([a, b, c], SETTLE_S)
        stolen, old = address(c), c.peer_id()

        with beside(b, a, address=address(a)) as during:  # c runs, and so does its double
            thief = steal(lab, 3, c)
            thief.start()
            thief.wait_ready(SETTLE_S)
        assert_unharmed(during)
        assert c.stop() == 0
        assert address(thief) == stolen
        wait_for_answer(lab, thief.namespace, address(a), SETTLE_S)
        assert thief.vpnd("invite", check=False).returncode == REFUSED
        assert thief.vpnd("remove", "b", check=False).returncode == REFUSED

        a.vpnd("remove", "c")
        wait_standing(thief, "removed", SETTLE_S)
        for node in (a, b):
            assert ping(lab, thief.namespace, address(node), count=5, interval_s=0.1).loss == 1
            assert old not in node.vpnd("members", "--json").stdout
        thief.kill()
        thief.wait_ended()
        thief.start()
        wait_standing(thief, "removed", SETTLE_S)

        shutil.rmtree(c.state_dir)
        c.state_dir.mkdir(mode=0o700)
        join(a, c)
        assert c.peer_id() != old
        all_reach_all([a, b, c], SETTLE_S)
        check_logs([a, b, c])
