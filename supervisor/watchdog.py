"""Children that hang: they live, and their loop does not run any more (stopped, in a loop without end, in a dead lock).

Each child counts a heartbeat in its counter page several times in process.watchdog. One whose heartbeat has stopped for
half of that is hung, which makes the node not healthy; after all of it it is killed, and started again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from supervisor.children import Child, State
from vpnd.config.live import Live
from vpnd.metrics import BEATS

#: Times in process.watchdog that heartbeats are looked at.
LOOKS = 2 * BEATS


class Watchdog:
    """Owner: supervisor loop; from now on until `close`."""

    def __init__(self, live: Live, children: Callable[[], Iterable[Child[Any]]]) -> None:
        """`children`: all there are at a time."""
        self._live, self._children = live, children
        self._loop = asyncio.get_running_loop()
        #: by pid: the heartbeat seen last, and the looks since it changed
        self._seen: dict[int, tuple[int, int]] = {}
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        live.watch(lambda config: config.process.watchdog, self._begin)
        self._begin()

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin(self) -> None:
        self.close()
        self._seen.clear()
        for child in self._children():
            child.hung = False
        if self._live.config.process.watchdog:
            self._look_later()

    def _look_later(self) -> None:
        pause_s = self._live.config.process.watchdog / LOOKS
        self._due_s = self._loop.time() + pause_s
        self._timer = self._loop.call_later(pause_s, self._look)

    def _look(self) -> None:
        # Counted in looks, not by the clock: what holds up this process, or the machine, holds up its children too.
        late = self._loop.time() > self._due_s + self._live.config.process.watchdog / LOOKS
        seen, self._seen = self._seen, {}
        for child in self._children():
            if child.state is State.UP:
                self._judge(child, seen.get(child.pid), late)
        self._look_later()

    def _judge(self, child: Child[Any], before: tuple[int, int] | None, late: bool) -> None:
        beats = child.slot.page.beats
        silent = before[1] + (not late) if before is not None and before[0] == beats else 0
        self._seen[child.pid] = beats, silent
        child.hung = silent >= LOOKS // 2
        if silent >= LOOKS:
            child.kill(f"has hung for {self._live.config.process.watchdog:g} s")
