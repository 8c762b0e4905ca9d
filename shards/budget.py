"""What one peer may use of a shard: of a turn of its loop, and of its memory. All sessions of a peer share it, so that
many of them get no more than one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from vpnd.config.live import Live
from vpnd.errors import FloodError


class Budget:
    """Owner: the peer. `left`: messages, frames and records its sessions may still take in this turn. `between_turns`
    is called when they want more: see Rest. `datagrams_left`: records and datagrams beside sessions, in this turn of
    their socket; `waiting_bytes`: of those that wait for the next one."""

    def __init__(self, live: Live, now: Callable[[], float], between_turns: Callable[[], None]) -> None:
        self.left = 0
        self.partial_bytes = self.waiting_bytes = 0
        self.datagrams_left = 0
        self._socket_turn = 0
        self._live, self._now, self._between_turns = live, now, between_turns
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

    def begin_datagrams(self, socket_turn: int) -> None:
        """The socket is at that turn."""
        if socket_turn != self._socket_turn:
            self._socket_turn, self.datagrams_left = socket_turn, self._live.config.session.turn_records

    def keep_datagrams(self, size: int) -> bool:
        """Whether so many bytes more may wait for the next turn."""
        kept = self.waiting_bytes + size <= self._live.config.session.receive_buffer_bytes
        self.waiting_bytes += size * kept
        return kept

    def wait(self, go_on: Callable[[], None]) -> None:
        """Call `go_on` in the next turn of the loop, in which there is something left; one after the other."""
        if not self._waiting:
            self._loop.call_soon(self._next_turn)
        self._waiting.append(go_on)

    def _next_turn(self) -> None:
        self._between_turns()
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
