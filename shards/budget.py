"""What one peer may use of a shard: of a turn of its loop, and of its memory. All sessions of a peer share it, so that
many of them get no more than one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from vpnd.config.live import Live
from vpnd.errors import FloodError


class Budget:
    """Owner: the peer. `left`: messages, frames and records its sessions may still take in this turn."""

    def __init__(self, live: Live, now: Callable[[], float]) -> None:
        self.left = 0
        self.partial_bytes = 0
        self._live, self._now = live, now
        self._loop = asyncio.get_running_loop()
        self._ends_s = 0.0
        self._waiting: deque[Callable[[], None]] = deque()

    def turn(self, now_s: float) -> int:
        """What is left of the turn there is at `now_s`."""
        if now_s >= self._ends_s and not self._waiting:
            self._begin(now_s)
        return self.left

    def _begin(self, now_s: float) -> None:
        session = self._live.config.session
        self._ends_s, self.left = now_s + session.turn_interval, session.turn_records

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call `go_on` in the next turn of the loop, in which there is something left; one after the other."""
        if not self._waiting:
            self._loop.call_soon(self._next_turn)
        self._waiting.append(go_on)

    def _next_turn(self) -> None:
        self._begin(self._now())
        waiting, self._waiting = self._waiting, deque()
        while waiting and self.left > 0:
            waiting.popleft()()
        if waiting:
            if not self._waiting:
                self._loop.call_soon(self._next_turn)
            self._waiting = waiting + self._waiting

    def hold(self, size: int) -> None:
        """So many bytes more of unfinished records are kept, or fewer. Raises FloodError: too many."""
        self.partial_bytes += size
        if size > 0 and self.partial_bytes > self._live.config.session.partial_bytes:
            raise FloodError(f"{self.partial_bytes} bytes of unfinished packets")
