"""What is done from time to time, at an interval that may change while it is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Recurring:
    """Does `work` once at `start` and then after every `interval_s()`. Owner: the loop it is made on."""

    def __init__(self, work: Callable[[], object], interval_s: Callable[[], float]) -> None:
        self._work, self._interval_s = work, interval_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0

    def start(self) -> None:
        """Begin. It has no end but the loop's."""
        self._work()
        self._wait_until(self._loop.time() + self._interval_s())

    def retime(self) -> None:
        """The interval may be another one: what is due within it stays, the rest comes earlier."""
        due_s = self._loop.time() + self._interval_s()
        if due_s < self._due_s:
            self._wait_until(due_s)

    def _wait_until(self, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = due_s
        self._timer = self._loop.call_at(due_s, self.start)
