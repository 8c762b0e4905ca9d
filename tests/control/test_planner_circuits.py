"""When a peer is left alone: circuits as the planner uses them, by one case for each rule."""

from __future__ import annotations

import pytest
from planner_node import CEILING_S, RESET_S, STAGGER_S, Node, member, settings

from vpnd.config.schema import Config
from vpnd.control.planner import NEVER

THREE = {"failure_threshold": 3}


def node_with_open_circuit(**breaker: int) -> tuple[Node, float]:
    """One shard, and a circuit that has just opened because three dials failed: at the moment returned."""
    node = Node("a", member("m"), config=settings(**THREE | breaker))
    node.planner.shard_ready(0, 0.0)
    opened_s = node.fail_on(3)
    assert node.circuit() == "open"
    assert [(change.old, change.new) for change in node.planner.take_circuit_changes()] == [
        ("closed", "open")
    ]
    return node, opened_s


@pytest.mark.setting("circuit_breaker.failure_threshold", "retry.max_attempts")
@pytest.mark.parametrize(
    ("config", "failures", "why"),
    [
        (settings(failure_threshold=3), 3, "failures in a row"),
        (settings(failure_threshold=1), 1, "one is enough if it is set so"),
        (settings(retry={"max_attempts": 4}), 4, "attempts used up"),
        (settings(failure_threshold=7, retry={"max_attempts": 2}), 2, "whichever comes first"),
    ],
)
def test_what_opens_a_circuit(config: Config, failures: int, why: str) -> None:
    node = Node("a", member("m"), config=config)
    node.planner.shard_ready(0, 0.0)
    at_s = node.fail_on(failures - 1)
    assert node.circuit() == "closed", why
    at_s = node.fail_on(1, at_s)
    assert node.circuit() == "open", why
    [change] = node.planner.take_circuit_changes()
    assert (change.member.name, change.new, change.why) == ("m", "open", "refused")
    assert node.planner.circuits() == {"m": "open"}
    report = node.planner.report(at_s)[0]
    assert (report.state, report.circuit_opened, report.next_dial_s) == ("backoff", 1, RESET_S)


@pytest.mark.setting("circuit_breaker.reset_timeout")
def test_while_it_is_open_nobody_dials_and_then_one_shard_does() -> None:
    node, opened_s = node_with_open_circuit()
    for shard in (1, 2):
        node.planner.shard_ready(shard, opened_s)
    for _ in range(10):
        node.want("m", opened_s + 0.1)
    assert node.due(opened_s + RESET_S - 0.01) == []
    assert len(node.due(opened_s + RESET_S)) == 1
    assert node.circuit() == "half_open"
    for _ in range(10):
        node.want("m", opened_s + RESET_S)
    assert node.next_s() == NEVER, "one probe"
    session_id = node.succeed("m", 0, opened_s + RESET_S + 1, up=False)
    assert node.next_s() == NEVER, "which lasts until packets flow"
    node.up(session_id)
    assert node.circuit() == "closed"
    assert len(node.due(opened_s + RESET_S + 2)) == 2, "it is back: the others at once"


@pytest.mark.parametrize(
    ("demand", "pauses"),
    [
        (False, [10.0, 10.0, 16.0, 32.0, 64.0, 64.0]),
        (True, [10.0] * 6),
    ],
    ids=["nobody talks to it: more and more seldom", "packets wait: every reset_timeout"],
)
def test_how_often_a_dead_peer_is_probed(demand: bool, pauses: list[float]) -> None:
    node = Node("a", member("m"), config=settings(**THREE, retry={"max_interval": 64.0}))
    node.planner.shard_ready(0, 0.0)
    at_s = node.fail_on(3)
    found = []
    for _ in pauses:
        if demand:
            node.want("m", at_s + 0.5)
        found.append(node.next_s() - at_s)
        at_s = node.fail_on(1, at_s)
    assert found == pauses
    assert node.planner.report(at_s)[0].circuit_opened == 1, "one outage"
    node.want("m", at_s + 30.0)
    assert node.next_s() == at_s + 30.0, "whoever talks to it again does not wait for what was planned"


def test_packets_that_come_during_a_probe_ask_for_the_next_one() -> None:
    node = Node("a", member("m"), config=settings(**THREE, retry={"max_interval": 64.0}))
    node.planner.shard_ready(0, 0.0)
    node.fail_on(6)
    for _ in range(5):
        at_s = node.next_s()
        assert node.due(at_s)
        node.want("m", at_s + 1.0)
        node.fail("m", 0, at_s + 1.5)
        assert node.next_s() == at_s + 1.5 + RESET_S


def test_a_probe_whose_session_comes_to_nothing_opens_it_again() -> None:
    node, opened_s = node_with_open_circuit()
    at_s = node.next_s()
    assert node.due(at_s)
    session_id = node.succeed("m", 0, at_s, up=False)
    assert node.circuit() == "half_open"
    node.lose(session_id, 0, at_s + 3.0)
    assert node.circuit() == "open"
    assert node.next_s() == at_s + 3.0 + RESET_S


@pytest.mark.parametrize("how", ["shard left", "closed on purpose", "called off"])
def test_a_probe_without_a_verdict_is_followed_by_another(how: str) -> None:
    node, _ = node_with_open_circuit()
    at_s = node.next_s()
    assert node.due(at_s)
    if how == "shard left":
        node.shard_left(0)
        node.planner.shard_ready(0, at_s)
    elif how == "closed on purpose":
        node.lose(node.succeed("m", 0, at_s, up=False), 0, at_s, failed=False)
    else:
        node.planner.dial_ended(node.flying.pop(("m", 0)), "", at_s)
    assert node.circuit() == "half_open"
    assert at_s <= node.next_s() <= at_s + CEILING_S
    assert node.due(node.next_s()) == [("m", 0)]


def test_a_session_that_the_peer_dialed_closes_it() -> None:
    node, opened_s = node_with_open_circuit(success_threshold=3)
    session_id = node.enter("m", 0, opened_s + 1.0)
    assert node.circuit() == "open", "it has to work first"
    node.up(session_id)
    assert node.circuit() == "closed"
    assert node.next_s() == NEVER


@pytest.mark.setting("circuit_breaker.success_threshold")
def test_as_many_sessions_as_set_have_to_work_and_none_is_blocked_meanwhile() -> None:
    node, _ = node_with_open_circuit(success_threshold=2)
    node.planner.shard_ready(1, 0.0)
    at_s = node.next_s()
    assert node.due(at_s) == [("m", 0)]
    node.succeed("m", 0, at_s)
    assert node.circuit() == "half_open"
    assert node.due(at_s) == [("m", 1)], "a session is up: the peer is there"
    node.succeed("m", 1, at_s)
    assert node.circuit() == "closed"


def test_what_fails_beside_a_session_that_works_never_opens_it() -> None:
    node = Node("a", member("m"), config=settings(failure_threshold=1, retry={"max_attempts": 1}))
    for shard in range(2):
        node.planner.shard_ready(shard, 0.0)
    assert len(node.due(0.0)) == 2
    node.succeed("m", 0, 0.0)
    node.fail("m", 1, 0.0)
    at_s = node.next_s()
    assert at_s == 1.0 and node.due(at_s) == [("m", 1)], "backed off, not blocked"
    other = node.succeed("m", 1, at_s)
    node.lose(other, 1, 5.0)
    assert node.circuit() == "closed"
    assert node.due(5.0) == [("m", 1)]


def test_the_last_session_that_fails_counts_and_one_that_was_closed_does_not() -> None:
    for failed, circuit in ((True, "open"), (False, "closed")):
        node = Node("a", member("m"), config=settings(failure_threshold=1))
        node.planner.shard_ready(0, 0.0)
        assert node.due(0.0)
        node.lose(node.succeed("m", 0, 0.0), 0, 50.0, failed=failed)
        assert node.circuit() == circuit
        assert node.next_s() == (50.0 + RESET_S if failed else 50.0)
        assert [change.why for change in node.planner.take_circuit_changes()] == (
            ["the session was lost: gone"] if failed else []
        )


def test_what_broke_together_is_one_failure() -> None:
    node = Node("a", member("m"), config=settings(failure_threshold=2))
    for shard in range(4):
        node.planner.shard_ready(shard, 0.0)
    dialed = node.due(0.0)
    sessions = [(node.succeed(*pair, 0.0), pair[1]) for pair in dialed]
    node.want("m", 50.0, sessions=2)
    assert node.due(50.0) == [("m", 0)]
    sessions.append((node.succeed("m", 0, 50.0, up=False), 0))
    for session_id, shard in sessions:
        node.lose(session_id, shard, 100.0)
    assert node.circuit() == "closed", "eight sessions at a stroke: first a dial has to try"
    assert len(node.due(node.next_s())) >= 1
    for pair in sorted(node.flying):
        node.fail(*pair, 101.0)
    assert node.circuit() == "open"


def test_a_changed_network_makes_it_half_open_at_once() -> None:
    node, opened_s = node_with_open_circuit()
    node.planner.network_changed()
    assert node.circuit() == "half_open"
    assert node.due(opened_s) == [("m", 0)]
    node.planner.network_changed()
    assert node.due(opened_s) == [("m", 0)], "the probe from before is called off"
    assert node.due(opened_s + 1) == []
    [change] = node.planner.take_circuit_changes()
    assert (change.old, change.new) == ("open", "half_open")


def test_a_shard_that_is_busy_says_nothing_about_the_peer() -> None:
    node = Node("a", member("m"), config=settings(failure_threshold=1, retry={"max_attempts": 1}))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    node.planner.dial_ended(node.flying.pop(("m", 0)), "busy", 0.0, blame=False)
    assert node.circuit() == "closed"
    assert node.next_s() == 1.0


def test_a_peer_without_addresses_has_a_circuit_that_only_it_can_close() -> None:
    node = Node("a", member("m", ()), config=settings(failure_threshold=1))
    node.planner.shard_ready(0, 0.0)
    node.lose(node.enter("m", 0, 0.0), 0, 1.0)
    assert node.circuit() == "open" and node.next_s() == NEVER
    assert node.state() == "waiting"
    node.up(node.enter("m", 0, 2.0))
    assert node.circuit() == "closed"


def test_dials_after_a_failure_are_retries() -> None:
    node = Node("z", member("m"), config=settings())
    node.planner.shard_ready(0, 0.0)
    [first] = node.planner.take_due(STAGGER_S)
    node.planner.dial_ended(first, "refused", 1.0)
    [second] = node.planner.take_due(2.0)
    assert (first.retry, second.retry) == (False, True)
