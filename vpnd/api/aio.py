"""A Channel on an asyncio loop: messages come as synchronous calls. For supervisor and shards; control has trio."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.errors import ProtocolViolation

log = logging.getLogger(__name__)


class LoopChannel:
    """Watches `channel` on the running loop.

    `on_message(message, descriptors)` owns the descriptors. `on_closed(error)` is called once, after which the
    channel is closed: the other process is gone (ChannelClosed), or broke the message table (ProtocolViolation).
    """

    def __init__(
        self,
        channel: Channel,
        on_message: Callable[[messages.Message, list[int]], None],
        on_closed: Callable[[ChannelClosed | ProtocolViolation], None],
    ) -> None:
        self._channel, self._on_message, self._on_closed = channel, on_message, on_closed
        self._loop = asyncio.get_running_loop()
        self._fd = channel.fileno()
        self._writing = False
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

    def _readable(self) -> None:
        while not self.closed:
            try:
                received = self._channel.receive()
            except (ChannelClosed, ProtocolViolation) as error:
                self._end(error)
                return
            if received is None:
                return
            self._on_message(*received)

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
        if self._writing:
            self._loop.remove_writer(self._fd)
        self._channel.close()
