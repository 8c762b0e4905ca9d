"""Channels on an asyncio loop: messages come as synchronous calls; and what else a process with such a loop needs. All
but control, which has trio.
"""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import Callable
from time import monotonic
from typing import Any

from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.errors import ProtocolViolation

log = logging.getLogger(__name__)

#: How long messages are taken one after the other, where they have a share of the loop's time.
TURN_S = 0.001


def end_at_bug(end: Callable[[str], object]) -> None:
    """Have an exception that leaves a callback of the running loop `end` its process, with the reason: whatever it left
    half done is gone then, and a new process begins."""

    def on_bug(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        log.error("%s", context.get("message", "error"), exc_info=context.get("exception"))
        end("an error of its own")

    asyncio.get_running_loop().set_exception_handler(on_bug)


class Recurring:
    """Does `work` once at `start` and then after every interval, in seconds, that `interval_s` finds in the
    configuration in force, until `close`, which `work` may call, too. Owner: the loop it is made on."""

    def __init__(self, live: Live, interval_s: Callable[[Config], float], work: Callable[[], object]) -> None:
        self._live, self._interval_s, self._work = live, interval_s, work
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0
        live.watch(interval_s, self._retime)

    def start(self) -> None:
        self._wait_until(self._loop.time() + self._interval_s(self._live.config))
        self._work()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = 0.0

    def _retime(self) -> None:
        """The interval is another one: what is due within it stays, the rest comes earlier."""
        due_s = self._loop.time() + self._interval_s(self._live.config)
        if due_s < self._due_s:
            self._wait_until(due_s)

    def _wait_until(self, due_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due_s = due_s
        self._timer = self._loop.call_at(due_s, self.start)


class LoopChannel:
    """Watches `channel` on the running loop.

    `on_message(message, descriptors)` owns the descriptors. `share`: of the loop's time, what messages may take that
    come one after the other; the other process waits then. `on_closed(error)` is called once, after which the
    channel is closed: the other process is gone (ChannelClosed), or broke the message table (ProtocolViolation).
    """

    def __init__(
        self,
        channel: Channel,
        on_message: Callable[[messages.Message, list[int]], None],
        on_closed: Callable[[ChannelClosed | ProtocolViolation], None],
        share: float = 1.0,
    ) -> None:
        self._channel, self._on_message, self._on_closed = channel, on_message, on_closed
        self._loop = asyncio.get_running_loop()
        self._fd = channel.fileno()
        self._writing = False
        # how long messages have taken, less their share of the time since
        self._share, self._spent_s, self._rested_s = share, 0.0, monotonic()
        self._resting: asyncio.TimerHandle | None = None
        self.closed = False
        self._loop.add_reader(self._fd, self._readable)

    def send(self, message: messages.Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send or queue. After the channel closed this does nothing: `on_closed` has told."""
        if self.closed:
            return
        try:
            self._channel.send(message, descriptors)
        except ChannelClosed as error:
            self._end(error)
            return
        self._watch_writable()

    def _watch_writable(self) -> None:
        if self._channel.backlog and not self._writing:
            self._writing = True
            self._loop.add_writer(self._fd, self._writable)

    def _writable(self) -> None:
        try:
            self._channel.flush()
        except ChannelClosed as error:
            self._end(error)
            return
        if not self._channel.backlog:
            self._writing = False
            self._loop.remove_writer(self._fd)

    @property
    def unread(self) -> int:
        """Messages that wait for the other process to read."""
        return self._channel.unread

    def _readable(self) -> None:
        began_s = monotonic()
        self._spent_s = max(0.0, self._spent_s - (began_s - self._rested_s) * self._share)
        while not self.closed:
            try:
                received = self._channel.receive()
            except (ChannelClosed, ProtocolViolation) as error:
                self._end(error)
                return
            if received is None:
                break
            self._on_message(*received)
            if self._share < 1.0 and self._spent_s + monotonic() - began_s > TURN_S:
                break
        self._rested_s = monotonic()
        self._spent_s += self._rested_s - began_s
        if self._share < 1.0 and self._spent_s > TURN_S and not self.closed:
            self._loop.remove_reader(self._fd)
            self._resting = self._loop.call_later(self._spent_s / self._share, self._go_on)

    def _go_on(self) -> None:
        self._resting = None
        self._loop.add_reader(self._fd, self._readable)

    def _end(self, error: ChannelClosed | ProtocolViolation) -> None:
        if not self.closed:
            self.close()
            self._on_closed(error)

    def close(self) -> None:
        """Close without telling `on_closed`. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fd)
        if self._resting is not None:
            self._resting.cancel()
        if self._writing:
            self._loop.remove_writer(self._fd)
        self._channel.close()


class Descriptors:
    """Watches descriptors on the running loop, as asyncio's `add_reader` promises: until it is told not to, also after
    errors. A descriptor is closed after nobody watches it any more.

    libuv gives a descriptor up at its first event with EPOLLERR (`uv_poll_start`), and uvloop calls once more who
    watches it, and never again. What they leave unread then they never hear of: a connection's reset behind its last
    data, or what changes after a netlink socket had too many messages. So errors are heard from an epoll of their own,
    which costs nothing where there are none.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._readers: dict[int, Callable[[], object]] = {}
        self._writers: dict[int, Callable[[], object]] = {}
        self._errors = select.epoll()
        self._loop.add_reader(self._errors.fileno(), self._failed)

    def close(self) -> None:
        self._loop.remove_reader(self._errors.fileno())
        self._errors.close()

    def add_reader(self, fd: int, readable: Callable[[], object]) -> None:
        self._known(fd)
        self._readers[fd] = readable
        self._loop.add_reader(fd, readable)

    def remove_reader(self, fd: int) -> None:
        """Idempotent."""
        self._loop.remove_reader(fd)
        if self._readers.pop(fd, None) is not None:
            self._forget(fd)

    def add_writer(self, fd: int, writable: Callable[[], object]) -> None:
        self._known(fd)
        self._writers[fd] = writable
        self._loop.add_writer(fd, writable)

    def remove_writer(self, fd: int) -> None:
        """Idempotent."""
        self._loop.remove_writer(fd)
        if self._writers.pop(fd, None) is not None:
            self._forget(fd)

    def again(self, fd: int) -> None:
        """An error of `fd` was received that is not its end. It is gone by that, and nothing else would tell of it."""
        self._loop.call_soon(self._arm, fd)

    def _known(self, fd: int) -> None:
        if fd not in self._readers and fd not in self._writers:
            self._errors.register(fd, 0)  # EPOLLERR and EPOLLHUP are told always

    def _forget(self, fd: int) -> None:
        if fd not in self._readers and fd not in self._writers:
            self._errors.unregister(fd)

    def _failed(self) -> None:
        for fd, _ in self._errors.poll(0):
            # Called from here: where this comes before the loop's own event, arming takes that away.
            for watching in (self._readers, self._writers):
                call = watching.get(fd)
                if call is not None:
                    call()
            self._arm(fd)

    def _arm(self, fd: int) -> None:
        """Have the loop watch it anew, as far as anybody still does."""
        loop, readable, writable = self._loop, self._readers.get(fd), self._writers.get(fd)
        if readable is not None:
            loop.remove_reader(fd)
        if writable is not None:
            loop.remove_writer(fd)
        if readable is not None:
            loop.add_reader(fd, readable)
        if writable is not None:
            loop.add_writer(fd, writable)
