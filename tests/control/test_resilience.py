"""Backoff with scripted dice, retries, and the circuit breaker against a plain account of the same rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.config.schema import CircuitBreaker as Settings
from vpnd.resilience import TRANSITIONS, Backoff, Circuit, CircuitBreaker, Retry


def test_the_ceiling_grows_to_its_limit_and_falls_back() -> None:
    backoff = Backoff(0.25, 15.0, 2.0, lambda low, high: high)
    assert [backoff.fail(100.0) - 100.0 for _ in range(8)] == [0.25, 0.5, 1, 2, 4, 8, 15, 15]
    assert backoff.failures == 8
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.fail(0.0) == 0.25


def test_it_survives_failing_for_years() -> None:
    backoff = Backoff(0.25, 15.0, 10.0, lambda low, high: high)
    for _ in range(100_000):
        assert backoff.fail(0.0) <= 15.0


@given(st.floats(0.01, 10), st.floats(0.01, 100), st.floats(1, 10), st.integers(1, 20), st.floats(0, 1))
def test_a_wait_is_never_longer_than_allowed(
    initial_s: float, max_s: float, multiplier: float, failures: int, dice: float
) -> None:
    backoff = Backoff(initial_s, max_s, multiplier, lambda low, high: low + (high - low) * dice)
    for _ in range(failures):
        assert 0.0 <= backoff.fail(0.0) <= max_s


def retry(max_attempts: int) -> Retry:
    return Retry(Backoff(0.25, 15.0, 2.0, lambda low, high: high), max_attempts)


def test_a_thing_is_given_up_when_the_attempts_are_used_up() -> None:
    one = retry(3)
    assert [one.fail(10.0), one.fail(20.0), one.fail(30.0)] == [10.25, 20.5, None]
    assert (one.failures, one.left) == (3, 0)
    assert one.fail(40.0) is None, "and stays so"
    assert one.not_before_s == 42.0, "who goes on anyway waits longer each time"
    one.reset()
    assert one.left == 3
    assert one.fail(50.0) == 50.25


@given(st.integers(1, 50), st.lists(st.sampled_from(("fail", "reset")), max_size=100))
def test_there_are_as_many_attempts_as_set_between_two_successes(limit: int, events: list[str]) -> None:
    one, failures = retry(limit), 0
    for event in events:
        if event == "reset":
            one.reset()
            failures = 0
        else:
            failures += 1
            assert (one.fail(5.0) is None) == (failures >= limit)
        assert one.failures == failures
        assert one.left == max(0, limit - failures)


class Watched:
    """A breaker that opens after 3 failures for 10 s and closes after 2 successes, and what it said."""

    def __init__(self, state: str = "closed", successes: int = 2) -> None:
        self.changes: list[tuple[str, str]] = []
        settings = Settings(failure_threshold=3, reset_timeout=10.0, success_threshold=successes)
        self.breaker = CircuitBreaker(settings, lambda old, new: self.changes.append((old, new)))
        if state != "closed":
            self.breaker.trip(0.0)
        if state == "half_open":
            assert self.breaker.take(10.0)
        self.changes.clear()


CASES = [
    ("closed", "ff", "closed", "fewer failures than the threshold"),
    ("closed", "fff", "open", "so many in a row"),
    ("closed", "ffsff", "closed", "a success in between starts the count anew"),
    ("closed", "ffcff", "closed", "and so does being known to work"),
    ("closed", "ffwff", "closed", "and new circumstances"),
    ("closed", "t", "open", "opened by hand"),
    ("open", "fff", "open", "late failures change nothing"),
    ("open", "s", "half_open", "something on its way worked after all: one success of two"),
    ("open", "ss", "closed", "two of two"),
    ("open", "c", "closed", "known to work"),
    ("open", "w", "half_open", "new circumstances: no more waiting"),
    ("half_open", "f", "open", "one failure is enough"),
    ("half_open", "s", "half_open", "one success of two"),
    ("half_open", "ss", "closed", "two of two"),
    ("half_open", "sf", "open", "a failure after the first success"),
    ("half_open", "sfws", "half_open", "successes from before it was open again do not count"),
    ("half_open", "c", "closed", "known to work"),
    ("half_open", "r", "half_open", "a try without a verdict"),
]


@pytest.mark.parametrize(("state", "events", "then", "why"), CASES, ids=[row[3] for row in CASES])
def test_what_moves_a_circuit(state: str, events: str, then: str, why: str) -> None:
    watched = Watched(state)
    breaker = watched.breaker
    for event in events:
        {
            "f": lambda: breaker.fail(20.0),
            "s": breaker.succeed,
            "t": lambda: breaker.trip(20.0),
            "c": breaker.close,
            "w": breaker.wait_no_more,
            "r": breaker.release,
        }[event]()
    assert breaker.state == then, why
    for (_, reached), (left, _) in zip(watched.changes, watched.changes[1:], strict=False):
        assert reached == left
    assert set(watched.changes) <= {(old, new) for (old, _), new in TRANSITIONS.items()}


def test_an_open_circuit_lets_one_try_through_when_its_time_has_come() -> None:
    watched = Watched()
    breaker = watched.breaker
    assert all(breaker.take(0.0) for _ in range(5)), "closed: everything passes"
    breaker.trip(100.0)
    assert breaker.not_before_s == 110.0
    assert not breaker.take(109.99)
    assert breaker.take(110.0)
    assert breaker.state is Circuit.HALF_OPEN
    assert not breaker.take(1000.0), "one try"
    breaker.release()
    assert breaker.take(1000.0), "another when that one has come to nothing"
    breaker.succeed()
    assert breaker.take(1001.0), "and the next when it has worked, for the second success"
    breaker.fail(1002.0)
    assert not breaker.take(1011.9)
    assert breaker.take(1012.0)
    assert breaker.opened == 1, "one outage, however many tries"
    assert watched.changes == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "open"),
        ("open", "half_open"),
    ]


def test_other_settings_hold_from_then_on_and_the_state_stays() -> None:
    breaker = Watched().breaker
    breaker.fail(0.0)
    breaker.settings = Settings(failure_threshold=2, reset_timeout=5.0, success_threshold=1)
    breaker.fail(0.0)
    assert breaker.state is Circuit.OPEN
    assert breaker.take(5.0)
    breaker.succeed()
    assert breaker.state is Circuit.CLOSED


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("fail", "succeed", "trip", "close", "take", "release", "wait_no_more")),
            st.sampled_from((0.0, 0.5, 3.0, 10.0)),
        ),
        max_size=80,
    ),
    st.integers(1, 3),
)
def test_a_circuit_is_what_a_plain_account_says(events: list[tuple[str, float]], threshold: int) -> None:
    watched = Watched(successes=threshold)
    breaker = watched.breaker
    now_s, state, failures, successes, opened_s, out = 0.0, "closed", 0, 0, 0.0, False
    for event, step_s in events:
        now_s += step_s
        before = state
        if event == "take":
            expected = state == "closed" or (not out if state == "half_open" else now_s >= opened_s + 10.0)
            assert breaker.take(now_s) == expected
            if expected and state != "closed":
                state, out = "half_open", True
        elif event in ("fail", "trip"):
            getattr(breaker, event)(now_s)
            failures += event == "fail"
            if state == "half_open" or state == "closed" and (event == "trip" or failures >= 3):
                state, opened_s = "open", now_s
        else:
            getattr(breaker, event)()
            out = False
            if event == "wait_no_more" and state == "open":
                state, successes = "half_open", 0
            if event == "succeed" and state != "closed":
                successes = (0 if state == "open" else successes) + 1
                state = "closed" if successes >= threshold else "half_open"
            if event == "close":
                state = "closed"
            if event != "release":
                failures = 0
        if state != before:
            out = out and event == "take"
            successes = successes if event == "succeed" else 0
        assert breaker.state == state
    opened = sum(old == "closed" for old, _ in watched.changes)
    closed = sum(new == "closed" for _, new in watched.changes)
    assert breaker.opened == opened == closed + (state != "closed")
