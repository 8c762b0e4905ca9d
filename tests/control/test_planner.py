"""Who is dialed when: tables for the rules, and a simulated node for what must always hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.control.book import SessionBook
from vpnd.control.planner import NEVER, Planner
from vpnd.discovery.registry import Member
from vpnd.resilience import Backoff

STAGGER_S = 0.3
MIN_S = 0.25
CEILING_S = 4.0


def member(peer_id: str, addresses: tuple[str, ...] = ("/ip4/192.0.2.1/tcp/4001",)) -> Member:
    return Member(peer_id=peer_id, name=peer_id, prefixes=(), addresses=addresses)


class Node:
    """A planner with its book, and backoffs that always wait to their ceiling (1 s, 2 s, 4 s, 4 s …)."""

    def __init__(self, own_id: str, *members: Member) -> None:
        self.book = SessionBook(lambda bits: 0)
        self.planner = Planner(
            own_id,
            members,
            self.book,
            lambda: Backoff(1.0, CEILING_S, 2.0, lambda low, high: high),
            dial_stagger_s=STAGGER_S,
            min_interval_s=MIN_S,
        )

    def due(self, now_s: float) -> list[tuple[str, int]]:
        return [(who.peer_id, shard) for who, shard in self.planner.take_due(now_s)]

    def succeed(self, peer_id: str, shard: int, now_s: float, *, up: bool = True) -> int:
        """A dial under way ends in a session."""
        session_id = self.book.new_id()
        self.book.add(session_id, peer_id, shard, True)
        self.planner.session_added(peer_id)
        self.planner.dial_ended(peer_id, shard, "", now_s)
        if up:
            self.book.up(session_id, shard)
            self.planner.session_up(peer_id)
        return session_id

    def lose(self, session_id: int, shard: int, now_s: float) -> None:
        held = self.book.down(session_id, shard)
        assert held is not None
        self.planner.session_down(held, "gone", now_s)

    def state(self, now_s: float = 0.0) -> str:
        return self.planner.report(now_s)[0].state


@pytest.mark.parametrize(
    ("own_id", "first_s", "why"),
    [
        ("a", 10.0, "the smaller id dials at once"),
        ("z", 10.0 + STAGGER_S, "the larger id gives the other side time to dial"),
    ],
)
def test_whose_turn_it_is(own_id: str, first_s: float, why: str) -> None:
    node = Node(own_id, member("m"))
    assert node.planner.next_due_s() == NEVER, "no shard yet"
    node.planner.shard_ready(0, 10.0)
    assert node.planner.next_due_s() == first_s, why
    assert node.due(first_s - 0.01) == []
    assert node.due(first_s) == [("m", 0)]
    assert node.planner.next_due_s() == NEVER, "one dial a shard at a time"


def test_the_larger_id_does_not_dial_when_the_session_arrives_in_time() -> None:
    node = Node("z", member("m"))
    node.planner.shard_ready(0, 0.0)
    node.book.add(1, "m", 0, False)
    node.planner.session_added("m")
    assert node.planner.next_due_s() == NEVER
    assert node.due(100.0) == []


def test_every_shard_gets_a_session_of_its_own_at_once() -> None:
    node = Node("a", member("m"), member("n"))
    for shard in range(3):
        node.planner.shard_ready(shard, 0.0)
    assert sorted(node.due(0.0)) == [(peer, shard) for peer in "mn" for shard in range(3)]


def test_a_peer_without_addresses_is_waited_for() -> None:
    node = Node("a", member("m", addresses=()))
    node.planner.shard_ready(0, 0.0)
    node.planner.wanted("m", 0.0)
    assert node.planner.next_due_s() == NEVER
    assert node.state() == "waiting"
    node.book.add(1, "m", 0, False)
    node.book.up(1, 0)
    node.planner.session_up("m")
    assert node.state() == "connected"


def test_failures_make_it_wait_longer_up_to_the_ceiling_and_a_session_forgets_them() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    now_s = 0.0
    waits = []
    for _ in range(5):
        assert node.due(now_s) == [("m", 0)]
        node.planner.dial_ended("m", 0, "refused", now_s)
        assert node.state(now_s) == "backoff"
        waits.append(node.planner.next_due_s() - now_s)
        now_s = node.planner.next_due_s()
    assert waits == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert node.due(now_s) == [("m", 0)]
    session_id = node.succeed("m", 0, now_s)
    assert node.planner.report(now_s)[0].last_error == ""
    node.lose(session_id, 0, now_s + 50)
    assert node.due(now_s + 50) == [("m", 0)], "a lost session is dialed again at once"
    node.planner.dial_ended("m", 0, "refused", now_s + 50)
    assert node.planner.next_due_s() == now_s + 51.0, "and backs off from the start"


def test_a_session_that_ends_before_packets_flowed_counts_as_a_failure() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    session_id = node.succeed("m", 0, 0.0, up=False)
    assert node.state() == "dialing"
    node.lose(session_id, 0, 5.0)
    assert node.planner.next_due_s() == 6.0
    assert "ended at once" in node.planner.report(5.0)[0].last_error


def test_while_a_peer_is_away_only_one_shard_tries() -> None:
    node = Node("a", member("m"))
    for shard in range(4):
        node.planner.shard_ready(shard, 0.0)
    assert len(node.due(0.0)) == 4
    for shard in range(4):
        node.planner.dial_ended("m", shard, "refused", 0.0)
    at_s = node.planner.next_due_s()
    assert len(node.due(at_s)) == 1
    assert node.planner.next_due_s() == NEVER
    node.succeed("m", 0, at_s)
    assert sorted(node.due(at_s + MIN_S)) == [("m", 1), ("m", 2), ("m", 3)], "it is back: all at once"


def test_wanted_ends_the_backoff_but_keeps_the_pace() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    node.planner.dial_ended("m", 0, "refused", 0.1)
    node.planner.wanted("m", 0.15)
    assert node.planner.next_due_s() == MIN_S
    for _ in range(100):
        node.planner.wanted("m", 0.2)
    assert node.planner.next_due_s() == MIN_S, "however often it is said"
    node.planner.wanted("nobody we know", 0.2)


def test_a_restarted_shard_gets_sessions_again_and_keeps_what_it_has() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    node.succeed("m", 0, 0.0)
    node.book.shard_left(0)
    node.planner.shard_left(0)
    assert node.planner.next_due_s() == NEVER
    node.planner.shard_ready(0, 10.0)
    assert node.due(10.0) == [("m", 0)]
    other = Node("a", member("m"))
    other.book.add(5, "m", 0, True, up=True)
    other.planner.shard_ready(0, 0.0)
    assert other.due(100.0) == [], "after a restart of control the shard still holds its session"


def test_news_is_told_once() -> None:
    node = Node("a", member("m"))
    node.planner.shard_ready(0, 0.0)
    assert node.due(0.0)
    assert node.planner.dial_ended("m", 0, "refused", 0.0)
    at_s = node.planner.next_due_s()
    assert node.due(at_s)
    assert not node.planner.dial_ended("m", 0, "refused", at_s)


@given(st.randoms(use_true_random=False), st.sampled_from(("a", "z")))
def test_whatever_happens_pace_is_kept_and_a_reachable_peer_is_reached(
    rng: random.Random, own_id: str
) -> None:
    node = Node(own_id, member("m"), member("n", addresses=()))
    now_s = 0.0
    shards: set[int] = set()
    flying: set[tuple[str, int]] = set()
    last: dict[tuple[str, int], float] = {}
    for _ in range(80):
        now_s += rng.choice((0.0, 0.01, 0.3, 2.0))
        for pair in node.due(now_s):
            assert pair not in flying
            assert pair[0] == "m" and pair[1] in shards
            assert node.book.lacks(*pair)
            assert now_s - last.get(pair, -NEVER) >= MIN_S
            last[pair] = now_s
            flying.add(pair)
        what = rng.choice(("arrive", "leave", "fail", "succeed", "down", "wanted"))
        shard = rng.randrange(3)
        if what == "arrive" and shard not in shards:
            shards.add(shard)
            node.planner.shard_ready(shard, now_s)
        elif what == "leave" and shard in shards:
            shards.discard(shard)
            node.book.shard_left(shard)
            node.planner.shard_left(shard)
            flying = {pair for pair in flying if pair[1] != shard}
            last = {pair: at_s for pair, at_s in last.items() if pair[1] != shard}
        elif what == "fail" and flying:
            pair = rng.choice(sorted(flying))
            flying.discard(pair)
            node.planner.dial_ended(*pair, "refused", now_s)
        elif what == "succeed" and flying:
            pair = rng.choice(sorted(flying))
            flying.discard(pair)
            node.succeed(*pair, now_s, up=rng.random() < 0.8)
        elif what == "down" and len(node.book):
            held = rng.choice(sorted(node.book.sessions(), key=lambda held: held.session_id))
            node.lose(held.session_id, held.shard, now_s)
        elif what == "wanted":
            node.planner.wanted("m", now_s)
    # From here on every dial succeeds: within the longest wait every shard has its session.
    for pair in sorted(flying):
        node.succeed(*pair, now_s)
    until_s = now_s + CEILING_S + 2 * STAGGER_S + MIN_S
    while node.planner.next_due_s() <= until_s:
        now_s = max(now_s, node.planner.next_due_s())
        for pair in node.due(now_s):
            node.succeed(*pair, now_s)
    assert all(not node.book.lacks("m", shard) for shard in shards)
