"""Health of a session: what is done when, told by a clock and by when something was heard."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.session.health import Health, Verdict
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.config.schema import Health as Settings

NOTHING, PROBE, SUSPECT, RECOVERED, DEAD = Verdict
INTERVAL_S, TIMEOUT_S, URGENT_S = 5.0, 2.0, 0.5


def live(**changes: float) -> Live:
    values = {"interval": INTERVAL_S, "timeout": TIMEOUT_S, "urgent_timeout": URGENT_S} | changes
    return Live(Config(health=Settings(**values)))  # type: ignore[arg-type]


VERDICTS = [
    # (now, heard last) → verdict, step by step
    ("before the interval is over there is nothing to do", {}, [(4.9, 0.0, NOTHING)]),
    ("after the interval it is probed", {}, [(5.0, 0.0, PROBE)]),
    ("traffic does not put a probe off, an answer ends it", {}, [(5.0, 4.9, PROBE), (5.1, 5.05, NOTHING)]),
    ("until the timeout it is waited for", {}, [(5.0, 0.0, PROBE), (6.9, 4.9, NOTHING)]),
    ("what was heard before the probe is no sign of life", {}, [(5.0, 0.0, PROBE), (7.0, 4.9, SUSPECT)]),
    ("two failures end it", {}, [(5.0, 0.0, PROBE), (7.0, 0.0, SUSPECT), (9.0, 0.0, DEAD)]),
    (
        "with more failures allowed it is asked more often",
        {"max_consecutive_failures": 3},
        [(5.0, 0.0, PROBE), (7.0, 0.0, SUSPECT), (9.0, 0.0, SUSPECT), (11.0, 0.0, DEAD)],
    ),
    ("with one failure allowed it is never suspect", {"max_consecutive_failures": 1},
     [(5.0, 0.0, PROBE), (7.0, 0.0, DEAD)]),
    ("another interval", {"interval": 1.0}, [(0.9, 0.0, NOTHING), (1.0, 0.0, PROBE)]),
    ("another timeout", {"timeout": 0.1}, [(5.0, 0.0, PROBE), (5.1, 0.0, SUSPECT)]),
    (
        "a suspect that is heard of is healthy again, and the count begins anew",
        {},
        [(5.0, 0.0, PROBE), (7.0, 0.0, SUSPECT), (7.3, 7.2, RECOVERED), (12.0, 7.2, PROBE),
         (14.0, 7.2, SUSPECT), (16.0, 7.2, DEAD)],
    ),
    (
        "an answer in time begins the next interval where the probe was sent",
        {},
        [(5.0, 0.0, PROBE), (7.0, 5.5, NOTHING), (9.9, 5.5, NOTHING), (10.0, 5.5, PROBE)],
    ),
]  # fmt: skip


@pytest.mark.setting("health.interval", "health.timeout", "health.max_consecutive_failures")
@pytest.mark.parametrize(("sentence", "settings", "steps"), VERDICTS, ids=[row[0] for row in VERDICTS])
def test_verdicts(sentence, settings, steps):
    health = Health(live(**settings), 0.0)
    for now_s, heard_s, verdict in steps:
        assert health.step(now_s, heard_s) is verdict, now_s
        assert health.suspect == (verdict in (SUSPECT, DEAD)) or verdict is NOTHING


def test_settings_in_force_are_those_of_the_moment():
    settings = live()
    health = Health(settings, 0.0)
    settings.config = live(timeout=0.5).config
    assert health.step(5.0, 0.0) is PROBE
    assert health.next_s == 5.5
    settings.config = live(max_consecutive_failures=1).config
    assert health.step(5.5, 0.0) is DEAD


HURRIES = [
    ("a probe goes out at once, with little patience", {}, [], 1.0, PROBE, 1.5),
    ("how little is a setting", {"urgent_timeout": 0.2}, [], 1.0, PROBE, 1.2),
    ("a probe under way is waited for no longer than that", {}, [(5.0, 0.0)], 5.2, NOTHING, 5.7),
    ("but not longer than before", {}, [(5.0, 0.0)], 6.9, NOTHING, 7.0),
]


@pytest.mark.setting("health.urgent_timeout")
@pytest.mark.parametrize(
    ("sentence", "settings", "before", "now_s", "verdict", "next_s"), HURRIES, ids=[row[0] for row in HURRIES]
)
def test_hurry(sentence, settings, before, now_s, verdict, next_s):
    health = Health(live(**settings), 0.0)
    for step in before:
        health.step(*step)
    assert health.hurry(now_s) is verdict
    assert health.next_s == pytest.approx(next_s)


def test_a_peer_that_vanishes_in_a_hurry_is_given_up_quickly():
    health = Health(live(), 0.0)
    assert health.hurry(1.0) is PROBE
    assert health.step(1.5, 0.9) is SUSPECT
    assert health.step(2.0, 0.9) is DEAD


def test_a_probe_under_way_does_not_make_the_hurry_longer():
    health = Health(live(), 0.0)
    assert health.step(5.0, 0.0) is PROBE
    assert health.hurry(6.4) is NOTHING
    assert health.step(6.9, 0.0) is SUSPECT
    assert health.step(7.4, 0.0) is DEAD


@given(
    st.floats(0.05, 60.0),
    st.floats(0.01, 10.0),
    st.integers(1, 5),
    st.floats(0.0, 100.0),
    st.floats(0.001, 0.1),
)
def test_silence_is_noticed_within_interval_and_timeout(interval, timeout, most, silent_s, answer_s):
    """Answers come as long as the peer is there; the caller looks at next_s, and when something is heard."""
    health = Health(live(interval=interval, timeout=timeout, max_consecutive_failures=most), 0.0)
    answer_s = min(answer_s, timeout / 2)
    now_s = heard_s = 0.0
    noticed_s = None
    while True:
        now_s = max(now_s, health.next_s)
        verdict = health.step(now_s, heard_s)
        if verdict is PROBE and now_s + answer_s < silent_s:
            heard_s = now_s + answer_s
        if verdict in (SUSPECT, DEAD):
            noticed_s = now_s if noticed_s is None else noticed_s
        if verdict is DEAD:
            break
    assert noticed_s is not None and noticed_s >= silent_s
    assert noticed_s <= silent_s + interval + timeout + answer_s + 1e-6
    assert now_s <= noticed_s + (most - 1) * timeout + 1e-6
