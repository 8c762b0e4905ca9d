"""When the supervisor has real-time priority, and when it leaves the CPU to others; on a made-up clock."""

from __future__ import annotations

import os
from typing import Any

import pytest

from supervisor.pacing import Pacing
from vpnd.config.live import Live
from vpnd.config.schema import Config, Process

PAUSE_S, WINDOW_S, MOST = 0.25, 1.0, 1000


@pytest.fixture(autouse=True)
def several_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


class Rig:
    """A supervisor's clock, sleep and priority. `slept`: how long in all. `refuses`: the kernel does."""

    def __init__(self, *, alone: bool = True, refuses: bool = False, **settings: Any) -> None:
        self.now_s = 100.0
        self.slept_s = 0.0
        self.realtime = False
        self.asked = 0
        self._refuses = refuses
        defaults = {"realtime_pause": PAUSE_S, "realtime_window": WINDOW_S, "realtime_packets": MOST}
        self.live = Live(Config(process=Process(**defaults | settings)))
        self.pacing = Pacing(
            self.live, alone=alone, now_s=lambda: self.now_s, sleep_s=self._sleep, prioritize=self._set
        )

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.slept_s += seconds

    def _set(self, pid: int, wanted: bool) -> str:
        assert pid == 0, "nobody's priority but its own"
        self.asked += 1
        self.realtime = wanted and not self._refuses
        return "refused" if wanted and self._refuses else ""

    def reads(self, *packets: int, apart_s: float = 0.0) -> float:
        """So many packets were read each time; how long it paused for them in all."""
        before_s = self.slept_s
        for count in packets:
            self.now_s += apart_s
            self.pacing.after_read(count)
        return self.slept_s - before_s


def test_lone_packets_are_not_held_up_and_a_stream_of_them_is_read_in_batches() -> None:
    rig = Rig()
    assert rig.realtime
    assert rig.reads(1, 1, 1, apart_s=PAUSE_S) == 0
    assert rig.reads(1, apart_s=PAUSE_S / 2) == PAUSE_S, "they keep coming"
    assert rig.reads(1, apart_s=PAUSE_S) == 0
    assert rig.reads(2, apart_s=10.0) == PAUSE_S, "there was more than one"


@pytest.mark.setting("process.realtime_pause")
@pytest.mark.parametrize("pause_s", [0.0, 0.01, 0.1])
def test_it_pauses_as_long_as_it_is_told(pause_s: float) -> None:
    assert Rig(realtime_pause=pause_s).reads(3, apart_s=1.0) == pause_s


@pytest.mark.setting("process.realtime_packets")
@pytest.mark.parametrize("most", [10, 100])
def test_where_packets_are_many_it_has_the_usual_priority_until_they_are_few(most: int) -> None:
    rig = Rig(realtime_packets=most)
    rig.reads(most, apart_s=WINDOW_S)
    assert rig.realtime
    rig.reads(2 * most, apart_s=WINDOW_S)
    assert not rig.realtime and rig.reads(5) == 0, "and then never pauses"
    rig.reads(round(0.7 * most), apart_s=WINDOW_S)
    assert not rig.realtime, "not back and forth around the limit"
    rig.reads(most // 4, apart_s=WINDOW_S)
    assert rig.realtime and rig.reads(5) == PAUSE_S


@pytest.mark.setting("process.realtime_window")
@pytest.mark.parametrize("window_s", [0.5, 5.0])
def test_a_burst_within_the_window_is_none(window_s: float) -> None:
    rig = Rig(realtime_window=window_s)
    rig.reads(2 * MOST, apart_s=1.0)
    assert rig.realtime == (window_s > 1.0)


@pytest.mark.setting("process.realtime")
def test_it_is_changed_while_it_runs_and_over_at_the_end() -> None:
    rig = Rig(realtime=False)
    assert not rig.realtime and rig.reads(9) == 0
    rig.live.take(Config(process=Process(realtime=True, realtime_pause=PAUSE_S)))
    assert rig.realtime and rig.reads(9) == PAUSE_S
    rig.pacing.end()
    assert not rig.realtime and rig.reads(*[1] * 100, apart_s=WINDOW_S) == 0 and not rig.realtime


def test_another_programs_priority_is_its_own_affair() -> None:
    rig = Rig(alone=False)
    assert rig.reads(*range(100), apart_s=WINDOW_S) == 0 and rig.asked == 0


def test_what_the_kernel_refuses_is_asked_for_once() -> None:
    rig = Rig(refuses=True)
    assert rig.reads(*range(100), apart_s=WINDOW_S) == 0 and rig.asked == 1


def test_with_one_cpu_nobody_has_it_and_nobody_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    rig = Rig()
    assert rig.reads(*range(100), apart_s=WINDOW_S) == 0 and rig.asked == 0


@pytest.mark.root
def test_the_kernel_gives_it_and_takes_it_back() -> None:
    try:
        pacing = Pacing(Live(Config()), alone=True)
        assert os.sched_getscheduler(0) == os.SCHED_RR | os.SCHED_RESET_ON_FORK
        pacing.end()
        assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
