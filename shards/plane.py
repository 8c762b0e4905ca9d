"""The data plane of a shard: peers, flows and sessions, and what happens between them.

It knows no process and no message: records come in by `run` and `dispatch`, sessions by `take`, and what it
has to say goes to a `PlaneEvents`. Packets of peers leave by the `write` it was given. So a test can run
several of them, joined by made-up sockets, on a made-up clock.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from random import Random
from typing import Protocol

from shards.flow.flows import Chunk, FlowTable, new_drops
from shards.flow.prefixes import set_of
from shards.inbound import Inbound
from shards.outbound import Outbound
from shards.peer.pool import PoolCounts
from shards.peer.table import Peer, PeerTable
from shards.peer.unowned import Unowned
from shards.recurring import Recurring
from shards.session.lane import Lane
from shards.session.link import Link
from shards.stream.session import Session
from vpnd.api.messages import SessionHandover
from vpnd.config.live import Live
from vpnd.packet.capability import Capabilities

log = logging.getLogger("shard")


class PlaneEvents(Protocol):
    """What the data plane tells, in the end to control."""

    def session_up(self, link: Link) -> None:
        """Packets flow in a session."""

    def session_down(self, link: Link, reason: str, failed: bool) -> None:
        """A session has ended."""

    def session_wanted(self, peer_id: str, sessions: int, urgent: bool) -> None:
        """So many are wanted with the peer from now on."""

    def owner_wanted(self, address: int) -> None:
        """Packets are for this IPv4 address, which no peer has."""


class Plane:
    """Owner: the shard's loop. It is the `LinkEvents` of its links and the `PeerHost` of its peers.

    `write(record)` gets each packet for this node, with its virtio_net_hdr in front; borrowed until it
    returns, OSError is a packet the kernel refused. `batch_done` is called when packets have come in. `now`:
    seconds of a monotonic clock finer than a millisecond. `random`: draws for picks and waits.
    """

    def __init__(
        self,
        live: Live,
        own: tuple[str, ...],
        hello: Capabilities,
        write: Callable[[memoryview], object],
        events: PlaneEvents,
        batch_done: Callable[[], None],
        now: Callable[[], float],
        random: Random,
    ) -> None:
        self.live, self.now, self.uniform, self.draw = live, now, random.uniform, random.randrange
        self._hello, self._events = hello, events
        self._loop = asyncio.get_running_loop()
        self.packets_sent = self.bytes_sent = 0
        self.session_errors = self.health_probes = self.health_failures = self.health_deaths = 0
        self.sessions_opened = self.sessions_closed = 0
        self.counts = PoolCounts()
        self.drops = new_drops()
        self.links: dict[int, Link] = {}
        self.peers = PeerTable(self._make_peer, self.drops, lambda *where: self.unowned.seen(*where))
        self.unowned = Unowned(live, events.owner_wanted, self.peers.look_again, self._loop.call_later)
        self.flows = FlowTable(live, self.peers.place)
        self.inbound = Inbound(write, set_of(own), self.drops)
        # A batch is a part of the ring, so that its room is given back while there is more to do.
        self.outbound = Outbound(self.flows, now, live.config.worker.ring_bytes // 4)
        self.batch_done = batch_done
        self.dispatch: Callable[[Chunk], None] = self.outbound.dispatch
        self._ended = False
        self._recurring = (
            Recurring(self._clean, lambda: live.config.worker.cleanup_interval),
            Recurring(self._look, lambda: live.config.multiplexer.auto_scaling_interval),
            Recurring(self._tidy, lambda: live.config.stream_pool.cleanup_interval),
            Recurring(self._warm, lambda: live.config.health.warm_interval),
        )

    def start(self) -> None:
        """Begin what is done from time to time."""
        for each in self._recurring:
            each.start()

    def configured(self) -> None:
        """The configuration in force is another one: what was waited for by the old one may be due."""
        for each in self._recurring:
            each.retime()
        for link in self.links.values():
            link.vitals.retime()

    def end(self, reason: str) -> None:
        """Close every session, politely."""
        self._ended = True
        for link in list(self.links.values()):
            link.close(reason, failed=False, polite=True)

    def own_changed(self, own: tuple[str, ...]) -> None:
        """Packets from peers may be addressed to these prefixes from now on."""
        self.inbound.own = set_of(own)

    # --- peers

    def owners_asked(self, networks: tuple[str, ...]) -> None:
        """Of these networks single addresses have owners, whom control can be asked for."""
        self.peers.reserve(networks)
        self.unowned.govern(networks)

    def _make_peer(self, peer_id: str, name: str) -> Peer:
        return Peer(peer_id, name, self.live, self, self.drops)

    def want(self, peer_id: str, sessions: int, urgent: bool) -> None:
        """See PoolHost."""
        if not self._ended:
            self._events.session_wanted(peer_id, sessions, urgent)

    def want_now(self, peer: Peer) -> None:
        """See PeerHost."""
        peer.pool.tell_wanted(urgent=True)
        self._loop.call_later(self.live.config.worker.pending_timeout, self._expire, peer)

    def _expire(self, peer: Peer) -> None:
        due_s = peer.waiting.expire(self.now())
        if due_s is not None:
            self._loop.call_later(max(0.0, due_s - self.now()), self._expire, peer)

    # --- sessions

    def take(self, message: SessionHandover, sock: socket.socket) -> bool:
        """A session from control; `sock` is non-blocking and ours. False when it is nobody's we know: nothing
        was taken."""
        peer = self.peers.get(message.peer_id)
        if peer is None:
            return False
        session = Session(
            initiator=message.initiator,
            cipher=message.cipher,
            send_key=message.send_key,
            send_nonce=message.send_nonce,
            receive_key=message.receive_key,
            receive_nonce=message.receive_nonce,
            leftover=message.leftover,
            hello=self._hello,
            settings=self.live.config.session,
            now_s=self.now(),
        )
        link = Link(
            sock, session, message.session_id, message.initiator, peer, self._hello,
            self.live, self.flows, self.inbound, self.drops, self, self.now,
        )  # fmt: skip
        self.links[link.session_id] = link
        peer.pool.add(link)
        self.sessions_opened += 1
        link.start()
        return True

    def lane_ready(self, lane: Lane) -> None:
        """See LinkEvents."""
        link = lane.link
        if len(link.lanes) == 1:
            log.info("session %x with %s is up", link.session_id, link.peer.name)
            self._events.session_up(link)
        link.peer.lane_ready(lane)

    def lane_closed(self, lane: Lane) -> None:
        """See LinkEvents."""
        lane.link.peer.pool.lane_closed(lane)

    def stream_failed(self, link: Link) -> None:
        """See LinkEvents."""
        link.peer.pool.stream_failed(link)

    def link_leaving(self, link: Link) -> None:
        """See LinkEvents."""
        link.peer.pool.peer_leaves(link)

    def link_suspect(self, link: Link) -> None:
        """See LinkEvents."""
        log.info("session %x with %s does not answer", link.session_id, link.peer.name)
        link.peer.pool.suspect(link)

    def link_closed(self, link: Link, reason: str, failed: bool) -> None:
        """See LinkEvents."""
        log.info("session %x with %s: %s", link.session_id, link.peer.name, reason)
        self.links.pop(link.session_id, None)
        self.sessions_closed += 1
        link.peer.link_closed(link)
        self._events.session_down(link, reason, failed)

    def network_changed(self, addresses: tuple[str, ...]) -> None:
        """The machine has other addresses, or has slept: end what cannot live on, look after the rest."""
        for link in list(self.links.values()):
            local = link.local_address()
            if local and addresses and local not in addresses:
                link.close("its local address is gone", failed=False)
            else:
                link.vitals.hurry()

    # --- from time to time

    def _clean(self) -> None:
        self.flows.clean(self.now())

    def _look(self) -> None:
        now_s = self.now()
        for peer in self.peers:
            if peer.pool.links:
                peer.multiplexer.look(now_s)

    def _tidy(self) -> None:
        now_s = self.now()
        for peer in self.peers:
            if peer.pool.links:
                peer.pool.clean(now_s)

    def _warm(self) -> None:
        """Peers that were used lately are to be reachable at once: ask again for what is missing."""
        since_s = self.now() - self.live.config.health.warm_for
        for peer in self.peers:
            if peer.multiplexer.used_s >= since_s and len(peer.pool.usable()) < peer.pool.scaled:
                peer.pool.tell_wanted(urgent=True)

    # --- what is counted

    def queued(self) -> int:
        """Packets that wait, anywhere."""
        return sum(peer.queued() for peer in self.peers)

    def unsent(self) -> int:
        """Bytes that wait for a session's turn, its socket, or an acknowledgement."""
        return sum(link.load() for link in self.links.values()) + sum(p.pool.held() for p in self.peers)

    def streams(self) -> int:
        """Open streams of all sessions."""
        return sum(len(link.lanes) for link in self.links.values())

    def pinned(self) -> int:
        """Flows that have a stream now."""
        return sum(len(lane.flows) for link in self.links.values() for lane in link.lanes.values())
