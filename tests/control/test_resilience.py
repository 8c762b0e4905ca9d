"""Backoff, with scripted dice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vpnd.resilience import Backoff


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
