"""Message channels on a trio loop; those to the shards, and what each of these has to know: peers and circuits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping

import trio

from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.discovery.registry import Change, Member

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


class ShardLink:
    """Control's side of one shard. `greeted`: it was told of all peers. `ready`: it has told what it holds and takes
    sessions."""

    def __init__(self, index: int, channel: TrioChannel) -> None:
        self.index = index
        self.channel = channel
        self.greeted = self.ready = False
        self.scope = trio.CancelScope()

    @property
    def takes_sessions(self) -> bool:
        """False also while the shard does not read what it was sent."""
        return self.ready and not self.channel.backlog

    def greet(self, told: Iterable[messages.Message]) -> None:
        """Tell it everybody (`greeting`); from now on it is told what changes. Raises ChannelClosed."""
        self.greeted = True
        for message in told:
            self.channel.send(message)


def known(member: Member) -> messages.PeerKnown:
    """What a shard has to know of a member."""
    return messages.PeerKnown(peer_id=member.peer_id, name=member.name, prefixes=member.prefixes)


def greeting(
    members: Iterable[Member], circuits: Mapping[str, str], governed: tuple[str, ...] = ()
) -> list[messages.Message]:
    """What a shard that has just arrived is told. `circuits`: of the peers whose is not closed. `governed`: networks in
    which single addresses have owners."""
    told: list[messages.Message] = [messages.OwnersAsked(networks=governed)] if governed else []
    for member in members:
        told.append(known(member))
        if state := circuits.get(member.peer_id):
            told.append(messages.PeerCircuit(peer_id=member.peer_id, state=state))
    return [*told, messages.PeersComplete()]


def news(change: Change) -> list[messages.Message]:
    """What the shards are told when members change, in an order in which no prefix ever has two owners."""
    told: list[messages.Message] = [
        messages.PeerForgotten(peer_id=member.peer_id) for member in change.removed
    ]
    owners = {prefix: after.peer_id for _, after in change.changed for prefix in after.prefixes}
    for before, after in change.changed:
        if any(owners.get(prefix, after.peer_id) != after.peer_id for prefix in before.prefixes):
            # Another one takes over what it gives up: it lets go first.
            told.append(messages.PeerKnown(peer_id=after.peer_id, name=after.name, prefixes=()))
    told += [known(after) for _, after in change.changed]
    return told + [known(member) for member in change.added]


def tell(links: Iterable[ShardLink], told: Iterable[messages.Message]) -> list[int]:
    """Send to those of the shards that were greeted. Returns the shards whose channel turned out to be closed."""
    told, closed = tuple(told), []
    for link in links:
        if link.greeted:
            try:
                for message in told:
                    link.channel.send(message)
            except ChannelClosed:
                closed.append(link.index)
    return closed
