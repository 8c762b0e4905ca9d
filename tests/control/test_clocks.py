"""Nodes whose clock is wrong for a while: what they know is judged anew when it is set, and nothing is lost by it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_harness import eventually
from network_harness import NetworkNode

LIBRARY = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)

pytestmark = [pytest.mark.root, pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime")]

#: Healthy again within that, of a clock that is set.
HEALED_S = 30.0
#: How often a node of the harness looks at its clock.
GOSSIP_S = 0.5


class Clock:
    """The clock of one node, as libfaketime shows it."""

    def __init__(self, node: NetworkNode, directory: Path) -> None:
        self._file = directory / node.name
        self.set("+0")
        node.environment = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, offset: str) -> None:
        beside = self._file.with_suffix(".new")
        beside.write_text(offset + "\n")
        beside.rename(self._file)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[NetworkNode, NetworkNode]]:
    with NetworkNode(tmp_path, "a") as a, NetworkNode(tmp_path, "b") as b:
        yield a, b


@pytest.fixture
def clocks(nodes: tuple[NetworkNode, NetworkNode]) -> Iterator[tuple[Clock, Clock]]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)  # control reads them as another user
        a, b = (Clock(node, Path(directory)) for node in nodes)
        yield a, b


def joined(a: NetworkNode, b: NetworkNode) -> None:
    a.start()
    b.start(a.invite())
    eventually(lambda: a.knows(b) and b.knows(a))
    eventually(lambda: all(peer.addresses for node in (a, b) for peer in node.status().peers))


def healthy(a: NetworkNode, b: NetworkNode) -> bool:
    """Members both, and known to each other with addresses."""
    for node in (a, b):
        node.pump()
    if not all(peer.addresses for node in (a, b) for peer in node.status().peers):
        return False
    return a.report().state == b.report().state == "member" and {a.peer_id} == b.peers.keys()


@pytest.mark.parametrize(
    ("offset", "state"),
    [
        ("-3600", "early"),  # an hour behind
        ("-20000d", "early"),  # 1972: no battery
        ("+40d", "expired"),
        ("+100d", "expired"),  # so far ahead that expired members are forgotten
    ],
)
def test_a_machine_that_starts_with_a_wrong_clock_is_well_when_it_is_set(
    nodes, clocks, offset, state
) -> None:
    a, b = nodes
    joined(a, b)
    b.stop()
    clocks[1].set(offset)
    b.start()
    eventually(lambda: b.report().state == state)
    assert not b.peers
    if state == "early":
        assert "is it right" in b.report().warnings[0]
    clocks[1].set("+0")
    eventually(lambda: healthy(a, b), HEALED_S)
    assert not b.report().warnings


def test_who_cannot_use_a_membership_gives_it_back(nodes, clocks) -> None:
    a, b = nodes
    a.start()
    clocks[1].set("+40d")
    with b.launch(a.invite(name="b")) as process:
        assert "clocks" in process.failed().error
    assert a.members() == {"a"}
    clocks[1].set("+0")
    b.start(a.invite(name="b"))
    eventually(lambda: a.members() == {"a", "b"})


def test_an_authority_whose_clock_is_behind_decides_nothing(nodes, clocks) -> None:
    a, b = nodes
    joined(a, b)
    a.do("authority-add", who="b")
    eventually(lambda: b.report().authority)
    b.do("authority-add", who="a")  # something of another authority; a has its own key for it already
    eventually(lambda: len(a.do("authority-list")) == 3)
    a.stop()
    clocks[0].set("-3600")
    a.start()
    for command, arguments in (("remove", {"who": "b"}), ("authority-revoke", {"who": b.peer_id})):
        assert "clock" in a.ask(command, **arguments).error
    clocks[0].set("+0")
    eventually(lambda: healthy(a, b), HEALED_S)
    a.do("authority-revoke", who="b")


def test_a_clock_that_is_set_while_the_node_runs(nodes, clocks) -> None:
    a, b = nodes
    joined(a, b)
    clocks[1].set("+40d")
    eventually(lambda: b.report().state == "expired")
    clocks[1].set("+0")
    eventually(lambda: healthy(a, b), HEALED_S)


def test_an_authority_whose_clock_leaves_all_others_behind_does_not_take_that_for_good(nodes, clocks) -> None:
    a, b = nodes
    joined(a, b)
    clocks[0].set("+40d")
    eventually(lambda: "set by +3456" in a.report().clock)
    eventually(lambda: a.report().state == "member" and a.report().clock)
    clocks[0].set("+0")
    eventually(lambda: not a.report().clock, HEALED_S)
    eventually(lambda: healthy(a, b), HEALED_S)


def test_an_authority_whose_clock_was_ahead_keeps_its_sessions_when_it_is_set(nodes, clocks) -> None:
    """What it signed of itself meanwhile has no effect any more, and is signed again before anything comes of that."""
    a, b = nodes
    joined(a, b)
    for offset in ("+3600", "+0"):
        clocks[0].set(offset)
        a.pump(6 * GOSSIP_S)  # it looks at its clock, and signs
    eventually(lambda: healthy(a, b), HEALED_S)
    assert not a.forgotten and not b.forgotten


def test_a_founder_whose_clock_was_a_day_ahead_and_those_it_let_in(nodes, clocks) -> None:
    a, b = nodes
    for clock in clocks:
        clock.set("+1d")
    joined(a, b)
    clocks[1].set("+0")
    eventually(lambda: b.report().state == "early")
    clocks[0].set("+0")
    eventually(lambda: healthy(a, b), HEALED_S)
    for node in nodes:
        node.stop()
        node.start()
    eventually(lambda: healthy(a, b), HEALED_S)


def test_a_removal_and_a_revocation_signed_by_a_clock_ahead_hold_when_it_is_right(nodes, clocks) -> None:
    a, b = nodes
    joined(a, b)
    a.do("authority-add", who="b")
    eventually(lambda: b.report().authority)
    clocks[0].set("+1d")
    a.pump(1.0)
    a.do("remove", who="b")
    clocks[0].set("+0")
    eventually(lambda: b.report().state == "removed", HEALED_S)
    assert not b.report().authority
    a.stop()
    a.start()
    assert a.members() == {"a"}
