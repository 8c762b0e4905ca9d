"""A message channel on a trio loop: one task that reads it, one that sends what did not fit at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import trio

from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed

#: Gets each message and its descriptors; those it has not taken out of the list are closed behind it.
Handler = Callable[[messages.Message, list[int]], None]


class TrioChannel:
    """Owns a Channel. Sending never waits, so one process that does not read holds up nobody."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._unsent = trio.Event()
        self._closed = False

    @property
    def backlog(self) -> bool:
        """True while the other process does not keep up with its messages."""
        return self._channel.backlog

    def send(self, message: messages.Message, descriptors: tuple[int, ...] = ()) -> None:
        """See Channel.send; may be called before `run`. Raises ChannelClosed."""
        self._channel.send(message, descriptors)
        if self._channel.backlog:
            self._unsent.set()

    def tell(self, message: messages.Message) -> None:
        """Send; the other side's end is noticed where it is listened to."""
        with contextlib.suppress(ChannelClosed):
            self.send(message)

    async def run(self, handler: Handler) -> None:
        """Pass on what comes until the end, which is always an exception out of Channel (in a group).

        ChannelClosed: the other process is gone. ProtocolViolation: it broke the rules.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            while True:
                await trio.lowlevel.wait_readable(self._channel.fileno())
                while (received := self._channel.receive()) is not None:
                    message, descriptors = received
                    try:
                        handler(message, descriptors)
                    finally:
                        for fd in descriptors:
                            os.close(fd)
                    # A process that never stops talking must not keep the others from being heard.
                    await trio.lowlevel.checkpoint()

    async def _write(self) -> None:
        while True:
            await self._unsent.wait()
            self._unsent = trio.Event()
            while self._channel.backlog:
                await trio.lowlevel.wait_writable(self._channel.fileno())
                self._channel.flush()

    def close(self) -> None:
        """Close this end. `run` must have ended, or be about to be cancelled."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._channel.fileno())
            self._channel.close()
