"""A Channel on an asyncio loop: messages come as synchronous calls. For supervisor and shards; control has trio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.errors import ProtocolViolation

#: How long messages are taken one after the other, where they have a share of the loop's time.
TURN_S = 0.001


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
