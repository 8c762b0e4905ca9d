"""The data plane of a shard: peers, flows and sessions, and what happens between them.

It knows no process and no message: records come in by `run` and `dispatch`, sessions by `take`, and what it
has to say goes to a `PlaneEvents`. Packets of peers leave by the `write` it was given. So a test can run
several of them, joined by made-up sockets, on a made-up clock.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from random import Random
from typing import Protocol

from shards.counters import Counts
from shards.datagram.spec import MAX_TOKEN
from shards.flow.flows import Chunk, FlowTable
from shards.flow.prefixes import set_of
from shards.inbound import Inbound
from shards.outbound import Outbound
from shards.peer.choice import Choice
from shards.peer.pool import lanes_of
from shards.peer.table import Peer, PeerTable
from shards.rest import Rest
from shards.session.alone import Alone
from shards.session.bare import BareLink
from shards.session.beside import DatagramLane
from shards.session.link import Link, StreamLane
from shards.session.surroundings import Fit, Surroundings
from shards.session.transport import Transport
from shards.session.udp import DatagramSocket
from shards.stream.negotiate import NOWHERE, Beside
from shards.stream.session import Session
from shards.unreachable import Unreachable
from vpnd.api.aio import Recurring
from vpnd.config.live import Live
from vpnd.logs import Seldom
from vpnd.nat.paths import RELAYED
from vpnd.packet.record import Capabilities
from vpnd.session import SUBNET_NODE, Established

log = logging.getLogger("shard")

#: So often within carrier.stall_timeout sessions are looked at; somewhat sooner where packets are sent, for that takes
#: no wake-up of its own.
STALL_LOOKS = 4
_SOONER = 0.7


class PlaneEvents(Protocol):
    """What the data plane tells, in the end to control."""

    def session_up(self, link: Link) -> None:
        """Packets flow in a session."""

    def session_down(self, link: Link, reason: str, failed: bool) -> None:
        """A session has ended."""

    def session_wanted(self, peer_id: str, sessions: int, urgent: bool) -> None:
        """So many are wanted with the peer from now on."""

    def sessions_doubted(self, peer_id: str) -> None:
        """A session with the peer seems to carry nothing: those of other shards may not either."""

    def segments_stuck(self, peer_id: str) -> None:
        """Large TCP segments seem not to reach the peer: sessions are to be made with small ones."""

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
        local: tuple[str, ...],
        hello: Capabilities,
        write: Callable[[memoryview], object],
        events: PlaneEvents,
        counts: Counts,
        batch_done: Callable[[], None],
        now: Callable[[], float],
        random: Random,
    ) -> None:
        self.live, self.counts, self.now = live, counts, now
        self.uniform, self.draw = random.uniform, random.randrange
        self._events = events
        self._loop = asyncio.get_running_loop()
        self.links: dict[int, Link] = {}
        self.choice = Choice(live)
        self.rest = Rest(live, now)
        #: where datagrams come and go; None: everything goes over streams
        self.datagrams: DatagramSocket | None = None
        self._told_outside = 0  # its port there, as peers know it
        self._token = functools.partial(random.randrange, 1, MAX_TOKEN)
        self._peer_of: dict[Link | Alone, Peer] = {}
        self.tell_unreachable = Unreachable(live, write, now, counts).tell
        self.peers = PeerTable(
            lambda peer_id, name: Peer(peer_id, name, live, self),
            counts.drops,
            live,
            events.owner_wanted,
            self._loop.call_later,
            self.tell_unreachable,
        )
        self.flows = FlowTable(live, self.peers.sink_for, counts)
        self.inbound = Inbound(write, set_of(local), counts)
        # A batch is a part of the ring, so that its room is given back while there is more to do.
        self.outbound = Outbound(self.flows, counts, now, live.config.worker.ring_bytes // 4)
        self._common = Surroundings(live, self.outbound, self.inbound, counts, hello, now, batch_done)
        self._seldom = Seldom(log, live, now)
        self._ended = False
        self._quiet = False  # the last look for stalls found nothing on its way
        self._stalls = Recurring(
            live, lambda config: config.carrier.stall_timeout / STALL_LOOKS, self._look_for_stalls
        )
        self.outbound.when_due = self._look_before_sending
        self._recurring = (
            self._stalls,
            Recurring(
                live, lambda config: config.worker.cleanup_interval, lambda: self.flows.forget_idle(now())
            ),
            Recurring(live, lambda config: config.multiplexer.auto_scaling_interval, self._scale),
            Recurring(live, lambda config: config.stream_pool.cleanup_interval, self._maintain_pools),
            Recurring(live, lambda config: config.health.warm_interval, self._warm),
            Recurring(live, lambda config: config.status.sample_interval, self._rest),
        )
        live.watch(lambda config: config.health.interval, self._retime_health)

    def start(self) -> None:
        for each in self._recurring:
            each.start()

    def _retime_health(self) -> None:
        for link in self.links.values():
            link.health.retime()

    def end(self, reason: str) -> None:
        self._ended = True
        for carrier in list(self._peer_of):
            carrier.close(reason, failed=False, polite=True)
        self.outbound.settle()

    def local_changed(self, local: tuple[str, ...]) -> None:
        """Packets from peers may be addressed to these prefixes from now on."""
        self.inbound.local = set_of(local)

    # --- peers

    def dispatch(self, chunk: Chunk) -> None:
        self.outbound.dispatch(chunk)

    def want(self, peer_id: str, sessions: int, urgent: bool) -> None:
        if not self._ended:
            self._events.session_wanted(peer_id, sessions, urgent)

    def want_now(self, peer: Peer) -> None:
        peer.pool.tell_wanted(urgent=True)
        self._loop.call_later(self.live.config.worker.pending_timeout, self._expire, peer)

    def _expire(self, peer: Peer) -> None:
        due_s = peer.pending.expire(self.now())
        if due_s is not None:
            self._loop.call_later(max(0.0, due_s - self.now()), self._expire, peer)

    # --- sessions

    def take(self, session_id: int, established: Established, transport: Transport) -> bool:
        """A session from control. False when it is nobody's we know: nothing was taken."""
        peer = self.peers.get(established.peer_id)
        if peer is None:
            return False
        path, beside, make_beside = established.path, NOWHERE, None
        if self.datagrams is not None and path.kind != RELAYED:
            beside = Beside(self.datagrams.receiver(), self.datagrams.port, self.datagrams.outside)
            make_beside = functools.partial(self._make_beside, self.datagrams, established, beside)
        session = Session(established, self._common.hello, self.live.config.session, self.now(), beside)
        if established.protocol == SUBNET_NODE:
            link: Link = BareLink(transport, session, session_id, peer, self, self._common, path)
        else:
            initiator = established.initiator
            prove = any(carrier.doubted for carrier in peer.pool.carriers)
            common = self._common
            link = Link(
                transport, session, session_id, initiator, peer, self, common, path, make_beside, prove
            )
        self.links[link.session_id] = link
        self._peer_of[link] = peer
        peer.pool.add(link)
        self.counts.sessions_opened += 1
        link.start()
        return True

    def _make_beside(
        self,
        socket: DatagramSocket,
        established: Established,
        ours: Beside,
        link: Link,
        theirs: Beside,
        fit: Fit | None,
    ) -> DatagramLane[Link | Alone]:
        """The lane of datagrams beside a session whose peer takes them; if there is one, it hears where the peer is."""
        host, port = link.transport.remote()
        # Where the peer says, and where it listens for sessions, which a router may have given another number.
        ports = (
            (theirs.port, theirs.outside, port) if established.initiator else (theirs.port, theirs.outside)
        )
        hosts = [(host, each) for each in ports if host and each]
        if link.beside is not None:
            link.beside.learn(hosts)
            return link.beside
        return DatagramLane(
            link, established, ours.receiver, theirs, hosts, fit, socket, self._common, self._token
        )

    def datagrams_changed(self, carrier: Link | Alone) -> None:
        peer = self._peer_of[carrier]
        if carrier.beside is not None:
            how = "are used" if carrier.beside.usable else "are not used any more"
            self._say(carrier, "datagrams", f": datagrams beside it {how}")
            if (
                not carrier.beside.usable
            ):  # where a NAT's address is another one, neither do sessions, and nobody says so
                peer.pool.look_after()
        peer.datagrams_changed(carrier)

    def lane_ready(self, lane: StreamLane) -> None:
        link = lane.carrier
        if len(link.lanes) == 1:
            self._say(link, "up", " is up")
            self._events.session_up(link)
        self._peer_of[link].lane_ready(lane)

    def _say(self, carrier: Link | Alone, kind: str, what: str) -> None:
        """A member can make and end sessions as often as it likes."""
        text = f"session {carrier.session_id:x} with {carrier.peer.name}{what}"
        self._seldom.log(logging.INFO, kind, text, carrier.peer.peer_id)

    def lane_closed(self, lane: StreamLane) -> None:
        self._peer_of[lane.carrier].pool.lane_closed(lane)

    def lane_failed(self, link: Link, reason: str) -> None:
        self._say(link, "stream", f": a stream did not open: {reason}")
        self._peer_of[link].pool.lane_failed(link, reason)

    def link_leaving(self, link: Link) -> None:
        self._peer_of[link].pool.peer_leaves(link)

    def link_suspect(self, link: Link) -> None:
        self._say(link, "suspect", " does not answer")
        self._peer_of[link].pool.suspect()

    def link_stuck(self, link: Link) -> None:
        self._say(link, "stuck", ": large segments seem not to arrive")
        self._events.segments_stuck(link.peer.peer_id)
        if not link.closed:
            self._peer_of[link].pool.doubt()

    def link_in_doubt(self, link: Link) -> None:
        self._peer_of[link].pool.look_after(link)
        self._events.sessions_doubted(link.peer.peer_id)

    def link_recovered(self, link: Link) -> None:
        self._say(link, "recovered", " answers again")

    def link_closed(self, link: Link, reason: str, failed: bool) -> None:
        self._say(link, "closed", f": {reason}")
        del self.links[link.session_id]
        self.counts.sessions_closed += 1
        peer = self._peer_of.pop(link)
        beside = link.beside
        if beside is not None and not beside.closed:
            link.beside = None
            if self.peers.get(peer.peer_id) is peer:
                alone = Alone(link.session_id, peer, link.opened_s, beside, self, self._common)
                self._peer_of[alone] = peer
                peer.pool.carriers.append(alone)
                beside.adopt(alone)
            else:
                beside.end()
        peer.carrier_closed(link)
        self._events.session_down(link, reason, failed)

    def alone_ended(self, alone: Alone, reason: str) -> None:
        self._say(alone, "alone ended", f": datagrams without it end: {reason}")
        self._peer_of.pop(alone).carrier_closed(alone)

    def network_changed(self, addresses: tuple[str, ...]) -> None:
        """The machine has other addresses, or has slept: end what cannot live on, look after the rest."""
        for link in list(self.links.values()):
            local = link.transport.local_address()
            if local and addresses and local not in addresses:
                link.close("its local address is gone", failed=False, lasts=True)
            else:
                link.check_alive()
        for alone in self.alone():
            alone.check_alive()

    # --- from time to time

    def _tell_outside(self, socket: DatagramSocket) -> None:
        """A NAT's port for this node has become known: peers that have been told another one, and do not hear from it
        in datagrams, get it with one more stream."""
        now_s, self._told_outside = self.now(), socket.outside
        for link in self.links.values():
            if link.beside is not None and link.beside.silent_s(now_s) and not link.leaving:
                link.open_lane(Beside(link.beside.receiver, socket.port, socket.outside))

    def _scale(self) -> None:
        now_s = self.now()
        if self.datagrams is not None and self.datagrams.outside != self._told_outside:
            self._tell_outside(self.datagrams)
        for link in self.links.values():
            link.look_for_stuck()
            link.health.look()
        for peer in self.peers:
            if peer.pool.carriers:
                peer.multiplexer.rebalance(now_s)

    def _look_before_sending(self) -> None:
        self._quiet = False  # what is sent now is on its way, and to be looked after
        self._stalls.start()

    def _look_for_stalls(self) -> None:
        """Again and again while anything is on its way; then before the next packet."""
        self.outbound.due_s = self.now() + self.live.config.carrier.stall_timeout / STALL_LOOKS * _SOONER
        looks = [link.beside.look_for_stall() for link in self.links.values() if link.beside is not None]
        before, self._quiet = self._quiet, not any(looks)
        if before and self._quiet:
            self._stalls.close()

    def _rest(self) -> None:
        for link in self.links.values():
            link.rest()

    def _maintain_pools(self) -> None:
        now_s = self.now()
        for peer in self.peers:
            if peer.pool.carriers:
                peer.pool.maintain(now_s)

    def _warm(self) -> None:
        """Peers that were used lately are to be reachable at once: ask again for what is missing."""
        since_s = self.now() - self.live.config.health.warm_for
        for peer in self.peers:
            if peer.multiplexer.used_s >= since_s and len(peer.pool.usable()) < peer.pool.scaled:
                peer.pool.tell_wanted(urgent=True)

    # --- what is counted

    def alone(self) -> list[Alone]:
        """Datagrams that have outlived their sessions."""
        return [carrier for carrier in self._peer_of if isinstance(carrier, Alone)]

    def queued(self) -> int:
        """Packets that wait, anywhere."""
        return self.outbound.waiting() + sum(peer.queued() for peer in self.peers)

    def all_sent(self) -> bool:
        """Whether nothing waits for a session's turn, its transport, an acknowledgement, or another lane."""
        return not (
            self.outbound.waiting()
            or any(carrier.load() for carrier in self._peer_of)
            or any(peer.pool.held() for peer in self.peers)
        )

    def streams(self) -> int:
        return sum(len(link.lanes) for link in self.links.values())

    def pinned(self) -> int:
        """Flows that have a stream now."""
        return sum(len(lane.flows) for carrier in self._peer_of for lane in lanes_of(carrier))
