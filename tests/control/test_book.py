"""The session book, against a plain list of sessions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.control.book import Held, SessionBook


def book() -> SessionBook:
    return SessionBook(lambda bits: (1 << bits) - 1)


def test_ids_are_new_even_when_a_shard_still_holds_one_that_would_come_next() -> None:
    sessions = book()
    first = sessions.new_id()
    sessions.add(Held(first + 1, "a", 0, True, 0.0))
    assert sessions.new_id() == first + 2
    assert first < 1 << 53


def test_two_controls_of_one_node_do_not_draw_the_same_ids() -> None:
    draws = iter((1, 2))
    one, two = SessionBook(lambda _: next(draws)), SessionBook(lambda _: next(draws))
    assert {one.new_id() for _ in range(1000)}.isdisjoint({two.new_id() for _ in range(1000)})


@pytest.mark.parametrize(
    ("wanted", "given_out", "why"),
    [
        ({2: 1, 0: 1, 1: 1}, [0, 1, 2, 0, 1], "wanting the same, they take turns"),
        ({0: 1, 1: 3}, [1, 1, 0, 1, 0, 1], "whoever lacks most comes first, whoever has least among equals"),
        ({0: 0, 1: 1}, [1, 0, 1], "a shard that wants none may still have to take one"),
    ],
)
def test_the_shard_that_lacks_most_sessions_with_that_peer_gets_the_next_one(
    wanted: dict[int, int], given_out: list[int], why: str
) -> None:
    sessions = book()
    assert sessions.shard_for("a", {}) is None
    for expected in given_out:
        assert sessions.shard_for("a", wanted) == expected, why
        sessions.add(Held(sessions.new_id(), "a", expected, False, 0.0))
    assert sessions.shard_for("b", {0: 1, 1: 1}) == 0, "another peer's sessions do not count"


def test_a_shard_cannot_speak_for_the_session_of_another() -> None:
    sessions = book()
    sessions.add(Held(7, "a", 0, True, 0.0))
    assert sessions.up(7, 1) is None
    assert sessions.down(7, 1) is None
    assert not sessions.connected("a")
    assert len(sessions) == 1


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(("add", "up", "down", "left")),
        st.integers(0, 9),  # session id
        st.sampled_from("abc"),
        st.integers(0, 2),  # shard
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_counts_are_those_of_a_plain_list(operations: list[tuple[str, int, str, int]]) -> None:
    sessions = book()
    plain: dict[int, list[object]] = {}
    for what, session_id, peer_id, shard in operations:
        mine = session_id in plain and plain[session_id][1] == shard
        if what == "add":
            sessions.add(Held(session_id, peer_id, shard, True, 0.0))
            plain[session_id] = [peer_id, shard, False]
        elif what == "up":
            assert (sessions.up(session_id, shard) is not None) == mine
            if mine:
                plain[session_id][2] = True
        elif what == "down":
            assert (sessions.down(session_id, shard) is not None) == mine
            if mine:
                del plain[session_id]
        else:
            gone = {held.session_id for held in sessions.shard_left(shard)}
            assert gone == {number for number, held in plain.items() if held[1] == shard}
            plain = {number: held for number, held in plain.items() if held[1] != shard}
        for name in "abc":
            theirs = [held for held in plain.values() if held[0] == name]
            assert sessions.count(name) == len(theirs)
            assert sessions.connected(name) == any(held[2] for held in theirs)
            assert sessions.on_trial(name) == sum(not held[2] for held in theirs)
            for index in range(3):
                assert sessions.count_of(name, index) == [held[1] for held in theirs].count(index)
                assert sessions.others(name, index) == {held[1] for held in theirs} - {index}
    assert len(sessions) == len(plain)
