"""Who is dialed when: tables for the rules, and a simulated node for what must always hold."""

from __future__ import annotations

import msgspec
import pytest
from planner_node import INITIAL_S, STAGGER_S, Node, member, settings

from vpnd.config.schema import P2P, Status
from vpnd.control.book import Held
from vpnd.control.planner import NEVER


@pytest.mark.setting("p2p.dial_stagger")
@pytest.mark.parametrize(
    ("own_id", "first_s", "why"),
    [
        ("a", 10.0, "the smaller id dials at once"),
        ("z", 10.0 + STAGGER_S, "the larger id gives the other side time to dial"),
    ],
)
def test_whose_turn_it_is(own_id: str, first_s: float, why: str) -> None:
    node = Node(own_id, member("m"))
    assert node.next_s() == NEVER, "no shard yet"
    node.planner.shard_ready(0, 10.0)
    assert node.next_s() == first_s, why
    assert node.due(first_s - 0.01) == []
    assert node.due(first_s) == [("m", 0)]
    assert node.next_s() == NEVER, "one dial a shard at a time"


def test_who_has_to_be_met_is_called_at_once_by_both() -> None:
    node = Node("z", member("m"), member("n"), met=("m",))
    node.planner.shard_ready(0, 10.0)
    assert node.due(10.0) == [("m", 0)]
    assert node.next_s() == 10.0 + STAGGER_S


def test_the_larger_id_does_not_dial_when_the_session_arrives_in_time() -> None:
    node = Node("z", member("m"))
    node.planner.shard_ready(0, 0.0)
    node.enter("m", 0, 0.0)
    assert node.next_s() == NEVER
    assert node.due(100.0) == []


def test_every_shard_gets_a_session_of_its_own_at_once() -> None:
    node = Node("a", member("m"), member("n"))
    for shard in range(3):
        node.planner.shard_ready(shard, 0.0)
    assert sorted(node.due(0.0)) == [(peer, shard) for peer in "mn" for shard in range(3)]


def test_a_peer_without_addresses_is_waited_for() -> None:
    node = Node("a", member("m", addresses=()))
    node.planner.shard_ready(0, 0.0)
    node.want("m", 0.0)
    assert node.next_s() == NEVER
    assert node.state() == "waiting"
    node.up(node.enter("m", 0, 0.0))
    assert node.state() == "connected"


@pytest.mark.setting("retry.initial_interval", "retry.max_interval")
def test_failures_make_it_wait_longer_up_to_the_ceiling_and_a_session_forgets_them() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    now_s = 0.0
    waits = []
    for _ in range(5):
        assert node.due(now_s) == [("m", 0)]
        node.fail("m", 0, now_s)
        assert node.state(now_s) == "backoff"
        waits.append(node.next_s() - now_s)
        now_s = node.next_s()
    assert waits == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert node.due(now_s) == [("m", 0)]
    session_id = node.succeed("m", 0, now_s)
    assert node.planner.report(now_s)[0].last_error == ""
    node.lose(session_id, 0, now_s + 50)
    assert node.due(now_s + 50) == [("m", 0)], "a lost session is dialed again at once"
    node.fail("m", 0, now_s + 50)
    assert node.next_s() == now_s + 51.0, "and backs off from the start"


def test_a_session_that_ends_before_packets_flowed_counts_as_a_failure() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    session_id = node.succeed("m", 0, 0.0, up=False)
    assert node.state() == "dialing"
    node.lose(session_id, 0, 5.0)
    assert node.next_s() == 6.0
    assert "ended at once" in node.planner.report(5.0)[0].last_error


def test_while_a_peer_is_away_only_one_shard_tries() -> None:
    node = Node("a", member("m"))
    for shard in range(4):
        node.planner.shard_ready(shard, 0.0)
    assert len(node.due(0.0)) == 4
    for shard in range(4):
        node.fail("m", shard, 0.0)
    at_s = node.next_s()
    assert len(node.due(at_s)) == 1
    assert node.next_s() == NEVER
    node.succeed("m", 0, at_s)
    assert sorted(node.due(at_s + INITIAL_S)) == [("m", 1), ("m", 2), ("m", 3)], "it is back: all at once"


def test_wanted_ends_the_backoff_but_keeps_the_pace() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    node.fail("m", 0, 0.1)
    node.want("m", 0.15)
    assert node.next_s() == INITIAL_S
    for _ in range(100):
        node.want("m", 0.2)
    assert node.next_s() == INITIAL_S, "however often it is said"
    node.want("nobody we know", 0.2)


def test_a_restarted_shard_gets_sessions_again_and_keeps_what_it_has() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    node.succeed("m", 0, 0.0)
    node.shard_left(0)
    assert node.next_s() == NEVER
    node.planner.shard_ready(0, 10.0)
    assert node.due(10.0) == [("m", 0)]
    other = Node("a", member("m"))
    other.book.add(Held(5, "m", 0, True, 0.0, up=True))
    other.planner.shard_ready(0, 0.0)
    assert other.due(100.0) == [], "after a restart of control the shard still holds its session"


def test_news_is_told_once() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    assert node.fail("m", 0, 0.0)
    at_s = node.next_s()
    assert node.due(at_s)
    assert not node.fail("m", 0, at_s)


def test_what_a_shard_wants_is_dialed_for_at_the_pace_until_the_book_has_it() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    first = node.succeed("m", 0, 0.0)
    node.want("m", 5.0, sessions=3, urgent=False)
    sessions = [first]
    for at_s in (5.0, 5.0 + INITIAL_S):
        assert node.next_s() == at_s
        assert node.due(at_s) == [("m", 0)]
        assert node.due(at_s + 10) == [], "one dial for a shard at a time"
        sessions.append(node.succeed("m", 0, at_s))
    assert node.next_s() == NEVER, "three it wanted"
    node.lose(sessions[0], 0, 20.0)
    assert node.due(20.0) == [("m", 0)], "and three it gets"
    node.succeed("m", 0, 20.0)
    node.want("m", 30.0, sessions=1, urgent=False)
    node.lose(sessions[1], 0, 30.0)
    node.lose(sessions[2], 0, 30.0)
    assert node.due(100.0) == [], "one is left and wanted"
    assert node.planner.wanted_by("m", 0) == 1 and node.planner.wanted_by("nobody", 0) == 0


def test_sessions_of_the_other_side_count_and_it_has_its_turn_first() -> None:
    node = Node("z", member("m"))
    node.planner.shard_ready(0, 0.0)
    node.up(node.enter("m", 0, 0.0))
    node.want("m", 1.0, sessions=3)
    assert node.next_s() == 1.0 + STAGGER_S
    node.up(node.enter("m", 0, 1.1))
    node.up(node.enter("m", 0, 1.2))
    assert node.next_s() == NEVER


@pytest.mark.setting("p2p.max_sessions_per_peer")
@pytest.mark.parametrize("wanted", [2, 5, 1_000_000])
def test_a_node_keeps_to_its_own_limit_of_sessions(wanted: int) -> None:
    node = Node("a", member("m"), config=settings(sessions=3))
    for shard in range(2):
        node.planner.shard_ready(shard, 0.0)
        node.want("m", 0.0, shard=shard, sessions=wanted, urgent=False)
    taken = 0
    for second in range(20):
        for pair in node.due(float(second)):
            node.succeed(*pair, float(second))
            taken += 1
    assert taken == node.book.count("m") == 3
    assert node.next_s() == NEVER


def test_what_a_shard_wanted_goes_with_it() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    node.want("m", 0.0, sessions=4)
    node.shard_left(0)
    node.want("m", 0.0, sessions=4)
    node.planner.shard_ready(0, 1.0)
    assert node.due(1.0)
    node.succeed("m", 0, 1.0)
    assert node.next_s() == NEVER, "its successor wants one, and who has left wants none"


def test_wanting_without_urgency_does_not_end_a_backoff() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    until_s = node.fail_on(3) + 4.0
    node.want("m", 4.0, sessions=2, urgent=False)
    assert node.next_s() == until_s
    node.want("m", 4.0, sessions=2)
    assert node.next_s() == 4.0


def test_a_changed_network_ends_all_waiting_and_calls_off_what_is_under_way() -> None:
    node = Node("z", member("m"), member("n"))
    node.planner.shard_ready(0, 0.0)
    assert len(node.due(STAGGER_S)) == 2
    node.fail("m", 0, 0.5)
    stale = node.flying["n", 0]
    node.planner.network_changed()
    assert sorted(node.due(0.5)) == [("m", 0), ("n", 0)], "no pace, no turn, no backoff"
    assert node.planner.dial_ended(stale, "timed out", 0.6) is False, "one from before says nothing now"
    assert node.planner.report(0.6)[1].dial_failures == 0
    assert node.due(9.0) == [], "nor does its end make room for another"
    node.fail("n", 0, 10.0)
    assert node.next_s() == 10.0 + INITIAL_S, "the first failure again"


def test_members_come_change_and_go() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    until_s = node.fail_on(2) + 2.0
    node.planner.member_changed(member("m"))
    assert node.next_s() == until_s, "the same addresses: it goes on waiting"
    node.planner.member_changed(member("m", ("/ip4/192.0.2.9/tcp/1",)))
    [dial] = node.planner.take_due(2.0)
    assert dial.member.addresses == ("/ip4/192.0.2.9/tcp/1",), "other addresses are tried at once"
    node.planner.member_removed("m")
    assert node.planner.dial_ended(dial, "refused", 2.0) is False
    assert node.next_s() == NEVER and node.planner.report(0.0) == ()
    node.planner.member_added(member("m"), 3.0)
    assert node.due(3.0) == [("m", 0)]
    assert node.planner.report(3.0)[0].dial_failures == 0, "nothing is left from before"


def test_other_settings_hold_from_then_on() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    node.fail_on(4)
    node.live.take(settings(retry={"initial_interval": 0.5, "max_interval": 0.5}))
    assert node.next_s() < 0, "no wait from before, nor the pace"
    at_s = node.fail_on(3, 20.0)
    assert node.next_s() == at_s + 0.5
    node.live.take(settings(sessions=1, retry={"initial_interval": 0.5, "max_interval": 0.5}))
    assert node.next_s() == at_s + 0.5, "no other [retry], no other wait"
    node.planner.shard_ready(1, at_s)
    assert len(node.due(at_s + 0.5)) == 1
    node.succeed("m", 0, at_s + 0.5)
    assert node.next_s() == NEVER, "the limit is another one"


@pytest.mark.setting("p2p.eager_peers")
@pytest.mark.parametrize(("eager", "dialed"), [(3, 3), (2, 0)])
def test_of_few_peers_all_are_dialed_from_the_start_of_many_none(eager: int, dialed: int) -> None:
    config = msgspec.structs.replace(settings(), p2p=P2P(eager_peers=eager))
    node = Node("a", member("m"), member("n"), member("o"), config=config)
    node.planner.shard_ready(0, 0.0)
    assert len(node.due(0.0)) == dialed
    node.want("n", 1.0)
    assert node.due(1.0) == ([] if dialed else [("n", 0)])


@pytest.mark.setting("retry.multiplier")
@pytest.mark.parametrize(("multiplier", "waits"), [(1.0, [1.0, 1.0, 1.0]), (4.0, [1.0, 4.0, 16.0])])
def test_waits_grow_by_the_multiplier(multiplier: float, waits: list[float]) -> None:
    config = settings(retry={"multiplier": multiplier, "max_interval": 100.0})
    node = Node("a", member("m"), config=config)
    node.planner.shard_ready(0, 0.0)
    now_s, found = 0.0, []
    for _ in waits:
        assert node.due(now_s)
        node.fail("m", 0, now_s)
        found.append(node.next_s() - now_s)
        now_s = node.next_s()
    assert found == waits


@pytest.mark.setting("status.max_peers")
def test_status_tells_of_so_many_peers_those_with_sessions_first() -> None:
    config = msgspec.structs.replace(settings(), status=Status(max_peers=2))
    node = Node("a", *(member(f"m{number}", addresses=()) for number in range(9)), config=config)
    node.planner.shard_ready(0, 0.0)
    node.up(node.enter("m7", 0, 0.0))
    told = [row.peer_id for row in node.planner.report(0.0)]
    assert len(told) == 2 and "m7" in told


def test_addresses_that_keep_changing_are_not_knocked_at_all_day() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    node.fail_on(1)
    knocks = 0
    for step in range(70):  # ten times a second, other ones each time
        now_s = 1.0 + step / 10
        node.planner.member_changed(member("m", (f"/ip4/192.0.2.{step + 1}/tcp/1",)))
        for dial in node.planner.take_due(now_s):
            knocks += 1
            node.planner.dial_ended(dial, "refused", now_s)
    assert knocks <= 7


@pytest.mark.parametrize("how", ["its session ends", "its shard is gone"])
def test_who_is_gone_was_last_seen_when_its_last_session_ended(how: str) -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)

    def seen_s(now_s: float) -> float:
        return node.planner.report(now_s)[0].seen_s

    assert seen_s(5.0) == -1.0, "it was never there"
    node.due(5.0)
    session_id = node.succeed("m", 0, 5.0)
    assert seen_s(9.0) == -1.0, "it is"
    if how == "its session ends":
        node.lose(session_id, 0, 10.0)
    else:
        node.shard_left(0, 10.0)
        node.planner.shard_ready(0, 10.0)
    assert seen_s(12.5) == 2.5
    node.due(12.5)
    node.succeed("m", 0, 13.0)
    assert seen_s(14.0) == -1.0
