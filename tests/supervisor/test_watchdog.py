"""The watchdog on a clock of the test: whose heartbeat stops is hung, then killed; a pause of everybody is nobody's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.children import State
from supervisor.watchdog import Watchdog
from vpnd.config.live import Live
from vpnd.config.schema import Config, Process


class Loop:
    """Its clock is the test's."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._timers: list[tuple[float, Callable[[], object]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Any:
        timer = self.now_s + delay_s, callback
        self._timers.append(timer)
        return SimpleNamespace(cancel=lambda: timer in self._timers and self._timers.remove(timer))

    def run(self, seconds: float, each: Callable[[], object] = lambda: None) -> None:
        end_s = self.now_s + seconds
        while self._timers and min(self._timers)[0] <= end_s:
            timer = min(self._timers, key=lambda timer: timer[0])
            self._timers.remove(timer)
            self.now_s = max(self.now_s, timer[0])
            each()
            timer[1]()
        self.now_s = max(self.now_s, end_s)


class Child:
    """One that is up."""

    def __init__(self, pid: int) -> None:
        self.pid, self.state, self.hung, self.killed = pid, State.UP, False, 0
        self.slot = SimpleNamespace(page=SimpleNamespace(beats=0))

    def beat(self) -> None:
        self.slot.page.beats += 1

    def kill(self, reason: str) -> None:
        self.killed += 1


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    live = Live(Config(process=Process(watchdog=4.0)))
    well, ill = Child(1), Child(2)
    watchdog = Watchdog(live, lambda: (well, ill))  # type: ignore[arg-type]
    return SimpleNamespace(loop=loop, live=live, well=well, ill=ill, watchdog=watchdog)


def test_who_hangs_is_named_after_half_of_the_time_and_killed_after_all_of_it(world: Any) -> None:
    world.loop.run(1.9, world.well.beat)
    assert not world.ill.hung
    world.loop.run(1.0, world.well.beat)
    assert world.ill.hung and not world.ill.killed
    world.loop.run(2.0, world.well.beat)
    assert world.ill.killed and not world.well.hung and not world.well.killed


def test_who_goes_on_is_well_again(world: Any) -> None:
    world.loop.run(2.5)
    assert world.ill.hung
    world.ill.beat()
    world.loop.run(0.5)
    assert not world.ill.hung


def test_a_pause_of_the_whole_machine_is_nobodys_fault(world: Any) -> None:
    for _ in range(20):
        world.loop.now_s += 60.0
        world.loop.run(0.0)
    assert not world.ill.hung and not world.ill.killed


def test_it_is_switched_off_and_on(world: Any) -> None:
    world.loop.run(2.5)
    world.live.take(Config(process=Process(watchdog=0.0)))
    assert not world.ill.hung
    world.loop.run(100.0)
    assert not world.ill.killed
    world.live.take(Config(process=Process(watchdog=1.0)))
    world.loop.run(1.5)
    assert world.ill.killed
