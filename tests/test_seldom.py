"""What others can cause to be logged does not fill the log."""

from __future__ import annotations

import logging

import pytest

from vpnd.config.live import Live
from vpnd.config.schema import Config, Log
from vpnd.logs import MOST_REMEMBERED, Seldom


def test_of_a_kind_each_member_causes_one_line_in_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    seldom = Seldom(logging.getLogger("test"), Live(Config(log=Log(refusal_interval=60.0))), lambda: now_s)
    for step in range(120):  # two minutes
        now_s = float(step)
        for kind in ("flood", "lie"):
            seldom.warn(kind, f"{kind} of a", "a")
        seldom.warn("flood", "flood of b", "b")
    assert sorted(caplog.messages) == sorted(
        f"{text}{more}"
        for text in ("flood of a", "lie of a", "flood of b")
        for more in ("", " (and 59 more like it)")
    )


def test_so_many_are_remembered_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    seldom = Seldom(logging.getLogger("test"), Live(Config()), lambda: 0.0)
    for number in range(2 * MOST_REMEMBERED):
        seldom.warn("flood", "x", f"{number}")
    assert len(caplog.messages) == MOST_REMEMBERED + 1, "the others count as one"
