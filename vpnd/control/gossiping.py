"""Connections to other members over which directories become equal: who is a neighbour, and messages to and from them.

A neighbour is a member with which there is at least one stream of `GOSSIP`. This node keeps up membership.neighbours of
them, chosen at random (discovery.bootstrap among them), and takes part with whoever comes. Every
membership.neighbour_rotation it dials one more and leaves the one it dialed first: members that found their neighbours
while the network was cut in two would otherwise stay among themselves when it is whole again.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import trio

from vpnd.adapter.dial import DialError, NotAdmitted
from vpnd.adapter.framing import read_message_untrusted, write_message
from vpnd.adapter.host import Host
from vpnd.config.multiaddrs import parse
from vpnd.control.common import Common, Waits
from vpnd.control.relaying import may_answer
from vpnd.control.state import OwnNetwork
from vpnd.errors import RemoteProtocolError
from vpnd.membership.gossip import Outcome
from vpnd.membership.messages import MAX_MESSAGE
from vpnd.membership.refusal import MembershipRefused

GOSSIP = "/vpnd/gossip/1.0.0"
#: Reasons no honest neighbour is refused for.
HOSTILE = frozenset({"forged", "malformed"})

log = logging.getLogger(__name__)


class _Link:
    """One stream with a neighbour. `heard`: it has said something. `ending`: nothing more is queued."""

    def __init__(self, stream: Any, peer_id: str, *, dialed: bool) -> None:
        self.stream, self.peer_id, self.dialed = stream, peer_id, dialed
        self.queue: deque[bytes] = deque()
        self.queued = 0
        self.more = trio.Event()
        self.heard = self.ending = False
        self.ended = trio.Event()
        self.scope = trio.CancelScope()


class Gossiping:
    """The neighbours of one node. Owner: control's loop; `run` once.

    `act` is given whatever comes of a message. `not_admitted` is called when a member turns this node away.
    """

    def __init__(
        self,
        own: OwnNetwork,
        common: Common,
        *,
        act: Callable[[Outcome], None],
        not_admitted: Callable[[], None],
    ) -> None:
        self._own, self._act, self._not_admitted = own, act, not_admitted
        self._live, self._count, self._seldom = common.live, common.count, common.seldom
        self._now_ms, self._dice = common.now_ms, common.dice
        self._links: dict[str, list[_Link]] = {}
        self._dialing: set[str] = set()
        self._waits = Waits(common)
        self._woken = trio.Event()
        self._bootstrap: dict[str, tuple[str, ...]] = {}
        for endpoint in map(parse, self._live.config.discovery.bootstrap):
            address = str(endpoint._replace(peer_id=""))
            self._bootstrap[endpoint.peer_id] = (*self._bootstrap.get(endpoint.peer_id, ()), address)
        self._live.watch(lambda config: config.retry, self.begin_anew)

    def neighbours(self) -> tuple[str, ...]:
        """The peer ids of those there is a stream with."""
        return tuple(self._links)

    def wake(self) -> None:
        """There are others to dial, or other reasons to."""
        if len(self._links) < self._live.config.membership.neighbours:
            self._woken.set()

    def begin_anew(self) -> None:
        """The network changed: whoever could not be dialed is tried again at once."""
        self._waits.clear()
        self.wake()

    def send(self, messages: Iterable[tuple[str, bytes]]) -> None:
        """Queue messages for neighbours. What a queue has no room for is dropped: comparing finds it later."""
        room = self._live.config.membership.gossip_queue
        for peer_id, message in messages:
            for link in self._links.get(peer_id, ())[:1]:
                if link.ending or link.queued + len(message) > room:
                    self._count("gossip_dropped")
                    continue
                link.queue.append(message)
                link.queued += len(message)
                link.more.set()

    async def farewell(self, peer_id: str) -> None:
        """Say what was queued for a neighbour, leave it time to hear it, within process.stop_timeout; then end."""
        links = list(self._links.get(peer_id, ()))
        with trio.move_on_after(self._live.config.process.stop_timeout):
            for link in links:
                link.ending = True
                link.more.set()
            for link in links:
                await link.ended.wait()
        for link in links:
            link.scope.cancel()

    async def serve(self, stream: Any) -> None:
        """A stream another member opened. It takes the place of one it opened before."""
        peer_id = str(stream.muxed_conn.peer_id)
        now_ms = self._now_ms()
        if not self._own.is_member(now_ms) or self._own.directory.find(peer_id, now_ms) is None:
            await stream.reset()
            return
        for link in self._links.get(peer_id, ()):
            if not link.dialed:
                link.scope.cancel()
        await self._converse(_Link(stream, peer_id, dialed=False))

    async def run(self, host: Host) -> None:
        async with trio.open_nursery() as nursery:
            rotate_s = trio.current_time() + self._live.config.membership.neighbour_rotation
            while True:
                self._woken = trio.Event()
                now_s = trio.current_time()
                lacking = self._live.config.membership.neighbours - len(self._links.keys() | self._dialing)
                if now_s >= rotate_s:
                    rotate_s = now_s + self._live.config.membership.neighbour_rotation
                    lacking = max(1, lacking)
                chosen, again_s = self._choose(lacking, now_s)
                for peer_id, addresses in chosen:
                    self._dialing.add(peer_id)
                    nursery.start_soon(self._dial, host, peer_id, addresses)
                with trio.move_on_at(min(rotate_s, again_s)):
                    await self._woken.wait()

    def _choose(self, lacking: int, now_s: float) -> tuple[list[tuple[str, tuple[str, ...]]], float]:
        """Whom to dial now, with their addresses; and when to look again."""
        now_ms = self._now_ms()
        if lacking <= 0 or not self._own.is_member(now_ms):
            return [], math.inf
        known = {
            member.peer_id: member.multiaddrs
            for member in self._own.directory.members(now_ms)
            if member.multiaddrs
        }
        for peer_id, addresses in self._bootstrap.items():
            known[peer_id] = tuple(dict.fromkeys((*known.get(peer_id, ()), *addresses)))
        busy = self._links.keys() | self._dialing | {self._own.peer_id}
        members = [(peer_id, addresses) for peer_id, addresses in known.items() if peer_id not in busy]
        waits = [self._waits.until_s(peer_id) for peer_id, _ in members]
        ready = [one for one, until_s in zip(members, waits, strict=True) if until_s <= now_s]
        chosen = self._dice.sample(ready, min(lacking, len(ready)))
        later = [until_s for until_s in waits if until_s > now_s]
        return chosen, min(later, default=math.inf) if len(chosen) < lacking else math.inf

    async def _dial(self, host: Host, peer_id: str, addresses: tuple[str, ...]) -> None:
        """One neighbour, from the dial to the end of its stream. Whatever goes wrong stays in here."""
        link = None
        try:
            link = _Link(await host.open_stream(addresses, peer_id, GOSSIP), peer_id, dialed=True)
            await self._converse(link)
        except DialError as error:
            log.debug("no stream with the member %s: %s", peer_id, error)
            if isinstance(error, NotAdmitted):
                self._not_admitted()
        except Exception:
            log.exception("the exchange with the member %s failed unexpectedly", peer_id)
        finally:
            self._dialing.discard(peer_id)
            if link is not None and link.heard:
                self._waits.reset(peer_id)
            else:
                near = any(may_answer(address, host.listen_addresses()) for address in addresses)
                rest_s = 0.0 if near or not self._links else self._live.config.membership.neighbour_rotation
                self._waits.fail(peer_id, rest_s)
            self._woken.set()

    async def _converse(self, link: _Link) -> None:
        """A stream, until one side has enough of it."""
        peers = self._links.setdefault(link.peer_id, [])
        peers.append(link)
        self._dialing.discard(link.peer_id)
        self._trim()
        if len(peers) == 1:
            self._act(self._own.gossip.connected(link.peer_id, self._now_ms(), dialed=link.dialed))
        try:
            with link.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, link)
                    await self._read_untrusted(link)
                    nursery.cancel_scope.cancel()
        finally:
            link.ended.set()
            peers.remove(link)
            if not peers:
                del self._links[link.peer_id]
                self._own.gossip.disconnected(link.peer_id)
            self.wake()
            await self._reset(link)

    async def _reset(self, link: _Link) -> None:
        with trio.move_on_after(self._live.config.p2p.stream_timeout) as scope:
            scope.shield = True
            try:
                await link.stream.reset()
            except Exception:  # the connection has ended already: nothing is left to reset
                return

    def _trim(self) -> None:
        """One more was dialed than is kept: the one dialed first may go."""
        dialed = [link for links in self._links.values() for link in links if link.dialed]
        for link in dialed[: max(0, len(dialed) - self._live.config.membership.neighbours)]:
            link.scope.cancel()

    async def _read_untrusted(self, link: _Link) -> None:
        while True:
            try:
                message = await read_message_untrusted(link.stream, MAX_MESSAGE)
            except RemoteProtocolError as error:
                self._refuse(link, MembershipRefused("too_long", str(error)))
                return
            except Exception as error:  # of libp2p, in great variety: the stream is over
                log.debug("the stream with %s has ended: %r", link.peer_id, error)
                return
            link.heard = True
            # answers go where the question came from: two machines may have one identity, or one stream be dead
            self._links[link.peer_id].sort(key=lambda one: one is not link)
            self._count("gossip_received")
            try:
                outcome = self._own.gossip.receive_untrusted(link.peer_id, message, self._now_ms())
            except MembershipRefused as refusal:
                self._refuse(link, refusal)
                return
            self._act(outcome)
            if HOSTILE.intersection(outcome.refused):
                self._seldom.warn(
                    "gossip", f"{link.peer_id} sent statements that are forged or malformed", link.peer_id
                )
                return

    def _refuse(self, link: _Link, refusal: MembershipRefused) -> None:
        self._count(f"refused_{refusal.reason}")
        self._seldom.warn("gossip", f"left the member {link.peer_id}: {refusal}", link.peer_id)

    async def _write(self, link: _Link) -> None:
        try:
            while True:
                while link.queue:
                    message = link.queue.popleft()
                    link.queued -= len(message)
                    with trio.fail_after(self._live.config.p2p.stream_timeout):
                        await write_message(link.stream, message)
                    self._count("gossip_sent")
                if link.ending:
                    return
                await link.more.wait()
                link.more = trio.Event()
        except Exception as error:  # of libp2p, in great variety: the stream is over
            log.debug("the stream with %s has ended: %r", link.peer_id, error)
            link.scope.cancel()
