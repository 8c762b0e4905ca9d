"""Turns and limits of relayed bytes, on a clock that is made up."""

from __future__ import annotations

from collections import Counter

import pytest

from vpnd.relay.shaper import BURST_S, Shaper

PART = 1 << 19


def run(shaper: Shaper, names: str, seconds: float, greed: dict[str, int] | None = None) -> Counter[str]:
    """Bytes each direction moves in so long, when all always have more."""
    moved: Counter[str] = Counter()
    now_s = 0.0
    for name in names:
        shaper.join(name, now_s)

    def move(name: str, allowed: int) -> None:
        shaper.moved(name, allowed)
        moved[name] += allowed

    while now_s < seconds:
        for name in names:
            if allowed := shaper.may_move(name, now_s):
                move(name, allowed)
        while True:
            turn, _ = shaper.due(now_s)
            if turn is None:
                break
            move(str(turn), shaper.part)
        now_s += 0.001
    return moved


def test_without_limits_nobody_waits() -> None:
    shaper = Shaper(0, 0, PART, 0.0)
    shaper.join("a", 0.0)
    for _ in range(1000):
        assert shaper.may_move("a", 0.0) == PART
        shaper.moved("a", PART)


@pytest.mark.parametrize("rate", [50_000, 1_000_000, 100_000_000])
def test_each_direction_keeps_its_rate(rate: int) -> None:
    moved = run(Shaper(rate, 0, PART, 0.0), "ab", 10.0)
    for name in "ab":
        assert moved[name] == pytest.approx(rate * (10 + BURST_S), rel=0.02)


@pytest.mark.parametrize("total", [50_000, 1_000_000, 100_000_000])
def test_all_together_keep_theirs_and_share_it_equally(total: int) -> None:
    moved = run(Shaper(0, total, PART, 0.0), "abcd", 10.0)
    assert sum(moved.values()) == pytest.approx(total * (10 + BURST_S), rel=0.02)
    assert max(moved.values()) <= 1.1 * min(moved.values())


def test_who_leaves_is_not_waited_for() -> None:
    shaper = Shaper(0, 1000, PART, 0.0)
    for name in "ab":
        shaper.join(name, 0.0)
        while shaper.may_move(name, 0.0):
            shaper.moved(name, shaper.part)
    shaper.leave("a")
    assert shaper.due(1.0)[0] == "b" and shaper.due(1.0)[0] is None
