"""A shard that floods keep busy rests before it is made to; on made-up clocks."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from queue_harness import live
from simulation.clock import VirtualLoop

from shards.budget import Budget
from shards.rest import Rest
from vpnd.config.live import Live
from vpnd.config.schema import Config, Process

SHARE, SLICE_S, TURN_S = 0.9, 0.01, 0.001


class Rig:
    """A shard that works turn by turn. `slept`: each pause."""

    def __init__(self, realtime: bool = True, **settings: Any) -> None:
        self.now_s = self.used_s = 100.0
        self.slept: list[float] = []
        defaults = {"realtime_share": SHARE, "realtime_slice": SLICE_S}
        live = Live(Config(process=Process(**defaults | settings)))
        self.rest = Rest(live, lambda: self.now_s, lambda: self.used_s, lambda: realtime, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.slept.append(seconds)

    def works(self, seconds: float, idle: float = 0.0) -> float:
        """Turns so long in all, each followed by that much of its time without work; the part of the time slept."""
        begun_s, before_s = self.now_s, sum(self.slept)
        while self.now_s < begun_s + seconds:
            self.used_s += TURN_S
            self.now_s += TURN_S * (1 + idle)
            self.rest.between_turns()
        return (sum(self.slept) - before_s) / (self.now_s - begun_s)


@pytest.mark.setting("process.realtime_share")
@pytest.mark.parametrize("share", [0.8, 0.93])
def test_one_that_does_not_stop_takes_no_more_than_its_share(share: float) -> None:
    rig = Rig(realtime_share=share)
    assert rig.works(1.0) == pytest.approx(1 - share, abs=0.02)
    assert max(rig.slept) < 0.3 * SLICE_S, "and nobody waits long for it"


@pytest.mark.setting("process.realtime_slice")
@pytest.mark.parametrize("slice_s", [0.01, 0.05])
def test_for_a_while_it_may_take_all(slice_s: float) -> None:
    rig = Rig(realtime_slice=slice_s)
    assert rig.works(0.9 * slice_s / (1 - SHARE)) == 0
    assert rig.works(2 * slice_s) > 0


def test_what_it_took_while_nobody_looked_is_given_bit_by_bit() -> None:
    rig = Rig()
    rig.used_s += 2.7
    rig.now_s += 2.7
    rig.works(1.0)
    assert sum(rig.slept) > 0.2
    assert max(rig.slept) <= SLICE_S


def test_one_that_is_idle_at_times_never_rests() -> None:
    assert Rig().works(1.0, idle=0.2) == 0
    assert Rig(realtime=False).works(1.0) == 0, (
        "nor one of the usual priority: the kernel shares its time out"
    )


def test_it_is_asked_whenever_a_peer_has_more_than_its_turn() -> None:
    loop, asked = VirtualLoop(), list[int]()
    with loop.running():
        budget = Budget(live(), loop.time, lambda: asked.append(1))
        budget.turn(loop.now_s)
        assert not asked
        budget.wait(lambda: None)
        loop.run_one()
    assert asked == [1]


@pytest.mark.root
def test_the_kernel_tells_what_priority_it_has() -> None:
    ask = "from shards.rest import _is_realtime; print(_is_realtime())"
    for policy, priority, told in (
        (os.SCHED_RR | os.SCHED_RESET_ON_FORK, 1, "True"),
        (os.SCHED_OTHER, 0, "False"),
    ):
        code = f"import os; os.sched_setscheduler(0, {int(policy)}, os.sched_param({priority})); {ask}"
        assert (
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
            == told
        )
