"""An event loop whose time is made up: it jumps from one thing that is due to the next."""

from __future__ import annotations

import abc
import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Handle:
    """What a callback can be called off by; stands in for asyncio.Handle and asyncio.TimerHandle."""

    __slots__ = ("args", "callback", "cancelled")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback, self.args, self.cancelled = callback, args, False

    def cancel(self) -> None:
        self.cancelled = True


class Watched(abc.ABC):
    """The part of a made-up socket the loop looks at; readiness is level-triggered, as epoll's is here."""

    def __init__(self) -> None:
        self.reader: Handle | None = None
        self.writer: Handle | None = None
        self.scheduled = False

    @abc.abstractmethod
    def readable(self) -> bool:
        """Whether a read would give something."""

    @abc.abstractmethod
    def writable(self) -> bool:
        """Whether a write would take something."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """As much of a loop as the data plane uses. An exception leaves `run_until`: in a shard it is the end."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self._due: list[tuple[float, int, Handle]] = []
        self._count = itertools.count()

    def time(self) -> float:
        return self.now_s

    def get_debug(self) -> bool:
        return False

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = Handle(callback, args)
        heapq.heappush(self._due, (when, next(self._count), handle))
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        assert delay >= 0.0
        return self.call_at(self.now_s + delay, callback, *args)

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_at(self.now_s, callback, *args)

    # --- sockets

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        fd.reader = Handle(callback, args)
        self.look(fd)

    def remove_reader(self, fd: Any) -> bool:
        was, fd.reader = fd.reader, None
        return was is not None

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> None:
        fd.writer = Handle(callback, args)
        self.look(fd)

    def remove_writer(self, fd: Any) -> bool:
        was, fd.writer = fd.writer, None
        return was is not None

    def again(self, fd: Any) -> None:
        """See Descriptors: here a socket is its own number, and is watched until it is not."""

    def look(self, watched: Watched) -> None:
        """Something about the socket may have changed: whoever waits for it is called in the next turn."""
        if not watched.scheduled and self._ready(watched):
            watched.scheduled = True
            self.call_soon(self._turn, watched)

    @staticmethod
    def _ready(watched: Watched) -> bool:
        return bool(
            (watched.reader is not None and watched.readable())
            or (watched.writer is not None and watched.writable())
        )

    def _turn(self, watched: Watched) -> None:
        watched.scheduled = False
        if (reader := watched.reader) is not None and watched.readable():
            reader.callback(*reader.args)
        if (writer := watched.writer) is not None and watched.writable():
            writer.callback(*writer.args)
        self.look(watched)

    # --- running

    def run_until(self, until_s: float) -> None:
        """Everything that is due up to a moment, which is then now."""
        while self._due and self._due[0][0] <= until_s:
            self.run_one()
        self.now_s = until_s

    def run_one(self) -> None:
        """What is due next."""
        when, _, handle = heapq.heappop(self._due)
        if not handle.cancelled:
            self.now_s = max(self.now_s, when)
            handle.callback(*handle.args)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, this is the running loop."""
        asyncio._set_running_loop(self)
        try:
            yield
        finally:
            asyncio._set_running_loop(None)
