"""A simulated node: a real data plane, and a control of which only the I/O is made up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.counters import Counts
from shards.peer.pool import lanes_of
from shards.peer.table import Peer
from shards.plane import Plane
from shards.session.beside import DatagramLane
from shards.session.link import Link, StreamLane
from shards.session.udp import DatagramSocket
from simulation.datagrams import FakeUdp
from simulation.packets import ICMP, Batch, number_of, protocol, seen
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.control.book import Held, SessionBook
from vpnd.control.dialstate import NEVER, Dial
from vpnd.control.planner import Planner
from vpnd.discovery.registry import Member
from vpnd.metrics import OUTBOUND_DROPS
from vpnd.packet.record import MAX_RECORD_BYTES, Capabilities
from vpnd.session import Established

if TYPE_CHECKING:
    from simulation.network import Connection
    from simulation.world import World

HELLO = Capabilities(offloads=0, max_record=MAX_RECORD_BYTES, mtu=1400)
SHARD = 0


class Node:
    """`name` is its peer id. `address` is its virtual IP, `place` where it is on the network."""

    def __init__(self, world: World, name: str, address: str, place: str, config: Config) -> None:
        self.world, self.name, self.address, self.place = world, name, address, place
        self.source = number_of(address)
        self.members: dict[str, Member] = {}
        self.live = Live(config)
        # the highest limits so far: what there is goes only when it is idle
        self._most_sessions = config.multiplexer.max_sessions
        self._most_streams = config.stream_pool.max_streams_per_peer
        self.book = SessionBook(world.random.getrandbits)
        self.planner = Planner(name, (), self.book, self.live, world.random.uniform)
        self.plane = Plane(
            self.live, (f"{address}/32",), HELLO, self._write, self, Counts(), self._batch_done,
            world.loop.time, world.random,
        )  # fmt: skip
        self.connections: dict[int, Connection] = {}  # by session id
        self.dials: dict[Dial, list[object]] = {}
        self._arriving_on: Connection | None = None
        self._in_datagrams = False
        self._watch_arrivals()
        self._watch_batches()
        self.udp: FakeUdp | None = None
        if config.carrier.choice != "streams":
            self.udp = FakeUdp(world.network, name, place)
            self.plane.datagrams = DatagramSocket(
                self.udp,
                world.loop,  # type: ignore[arg-type]
                0,
                4001,
                self.live,
                self.plane.counts,
                world.loop.time,
                self._batch_done,
                world.random.randrange,  # type: ignore[arg-type]
                self.plane.rest.between_turns,
            )
        self.planner.shard_ready(SHARD, world.loop.now_s)
        self.plane.start()

    def _watch_arrivals(self) -> None:
        """Know of each packet on which connection it came."""
        take = self.plane.inbound.deliver_untrusted

        def deliver(sources: object, reassembly: object, *rest: object) -> object:
            connection = None
            for link in self.plane._peer_of:
                if any(lane.reassembly is reassembly for lane in lanes_of(link)):
                    connection = self.connections[link.session_id]
                    self._in_datagrams = link.beside is not None and link.beside.reassembly is reassembly
            assert connection is not None, "payload of a stream that is not there"
            self._arriving_on = connection
            return take(sources, reassembly, *rest)  # type: ignore[arg-type]

        self.plane.inbound.deliver_untrusted = deliver  # type: ignore[method-assign,assignment]

    def _watch_batches(self) -> None:
        """No batch is begun within another."""
        go_through, inside = self.plane.outbound._send, [False]

        def send(*batch: object) -> object:
            assert not inside[0], "a batch within a batch"
            inside[0] = True
            done = go_through(*batch)  # type: ignore[arg-type]
            inside[0] = False
            return done

        self.plane.outbound._send = send  # type: ignore[method-assign,assignment]

    # --- packets

    def send(self, records: list[bytes]) -> None:
        """Packets of an application, through the ring."""
        batch = Batch(records)
        while self.plane.outbound.run(batch):  # type: ignore[arg-type]
            pass

    def _write(self, view: memoryview) -> None:
        if protocol(view) == ICMP:  # what a program is told of a packet of its own; nobody sent it
            return
        assert self._arriving_on is not None
        self.world.arrived(self, seen(view), self._arriving_on, self._in_datagrams)

    def _batch_done(self) -> None:
        pass

    # --- the plane tells, as over a channel: a moment later

    def session_up(self, link: Link) -> None:
        self._later(self._on_up, link.session_id)

    def session_down(self, link: Link, reason: str, failed: bool) -> None:
        self.world.closed(self, link, reason, failed)
        self._later(self._on_down, link.session_id, reason, failed)

    def owner_wanted(self, address: int) -> None:
        """See shards.plane.PlaneEvents: no contract here gives addresses away."""
        raise AssertionError(address)

    def sessions_doubted(self, peer_id: str) -> None:
        """There is no other shard."""

    def segments_stuck(self, peer_id: str) -> None:
        """See shards.plane.PlaneEvents: the made-up network takes segments of any size."""
        raise AssertionError(peer_id)

    def session_wanted(self, peer_id: str, sessions: int, urgent: bool) -> None:
        self._later(self._on_wanted, peer_id, sessions, urgent)

    def _later(self, callback: object, *args: object) -> None:
        self.world.loop.call_later(self.world.channel_s, callback, *args)

    def _on_up(self, session_id: int) -> None:
        if held := self.book.up(session_id, SHARD):
            self.planner.session_up(held)
        self.settle()

    def _on_down(self, session_id: int, reason: str, failed: bool) -> None:
        if held := self.book.down(session_id, SHARD):
            self.planner.session_down(held, reason, failed, self.world.loop.now_s)
        self.settle()

    def _on_wanted(self, peer_id: str, sessions: int, urgent: bool) -> None:
        self.planner.wanted(peer_id, SHARD, sessions, urgent, self.world.loop.now_s)
        self.settle()

    # --- control

    def know(self, member: Member) -> None:
        """A new peer, or one that is set otherwise."""
        before = self.members.get(member.peer_id)
        self.members[member.peer_id] = member
        new = self.plane.peers.get(member.peer_id) is None
        peer = self.plane.peers.know(member.peer_id, member.name, member.prefixes)
        if new:
            peer.pool.tell_wanted(urgent=False)
        if before is None:
            self.planner.member_added(member, self.world.loop.now_s)
        else:
            self.planner.member_changed(member)
        self.settle()

    def forget(self, peer_id: str) -> None:
        """No longer a peer."""
        if self.members.pop(peer_id, None) is not None:
            self._forget_dials(peer_id)
            self.planner.member_removed(peer_id)
            self.plane.peers.forget(peer_id)
            self.settle()

    def configure(self, config: Config) -> None:
        """`vpnd reload`."""
        self.live.take(config)
        self._most_sessions = max(self._most_sessions, config.multiplexer.max_sessions)
        self._most_streams = max(self._most_streams, config.stream_pool.max_streams_per_peer)
        self.settle()

    def network_changed(self) -> None:
        """The machine says so, whether or not it matters."""
        self._forget_dials(None)
        self.planner.network_changed()
        self.plane.network_changed((self.place,))
        self.settle()

    def _forget_dials(self, peer_id: str | None) -> None:
        for dial in list(self.dials):
            if peer_id is None or dial.member.peer_id == peer_id:
                self.dials.pop(dial)

    def settle(self) -> None:
        """What follows from what the planner was told."""
        for change in self.planner.take_circuit_changes():
            if peer := self.plane.peers.get(change.member.peer_id):
                peer.set_circuit(change.new)
        due_s = self.planner.next_due_s()
        if due_s != NEVER:
            self.world.loop.call_at(max(due_s, self.world.loop.now_s), self._dial)

    def _dial(self) -> None:
        for dial in self.planner.take_due(self.world.loop.now_s):
            self.dials[dial] = []
            self.world.dial(self, dial)
        if self.planner.next_due_s() > self.world.loop.now_s:
            self.settle()

    def dialed(self, dial: Dial, session: Established | None, connection: Connection | None) -> bool:
        """A dial has come to its end. False when nobody wants the session any more."""
        if self.dials.pop(dial, None) is None:
            return False
        taken = False
        if session is not None and connection is not None and self.room(dial.member.peer_id):
            self.take(session, connection, 0)
            taken = True
        error = "" if session is not None else "no answer"
        self.planner.dial_ended(dial, error, self.world.loop.now_s)
        self.settle()
        return taken

    def room(self, peer_id: str) -> bool:
        return self.book.count(peer_id) < self.live.config.p2p.max_sessions_per_peer

    def take(self, session: Established, connection: Connection, end: int) -> None:
        """A session for the shard; its descriptor and keys are a moment under way."""
        session_id = self.book.new_id()
        self.connections[session_id] = connection
        self.book.add(Held(session_id, session.peer_id, SHARD, session.initiator, self.world.loop.now_s))
        self.planner.session_added(session.peer_id)
        transport = connection.ends[end]
        transport.tune(self.live.config.session)
        if self.plane.take(session_id, session, transport):
            self.world.opened(self, self.plane.links[session_id], connection)
        else:
            transport.close(discard=False)
            self._later(self._on_down, session_id, "unknown", False)
        self.settle()

    # --- what must hold

    def check(self) -> None:
        """At any moment between two callbacks."""
        plane = self.plane
        dropped = sum(plane.counts.drops[reason] for reason in OUTBOUND_DROPS)
        assert plane.counts.packets_from_tun == plane.counts.packets_sent + dropped + plane.queued(), (
            "the books"
        )
        assert plane.counts.streams_opened - plane.counts.streams_closed == plane.streams(), (
            "streams are counted"
        )
        assert plane.counts.sessions_opened - plane.counts.sessions_closed == len(plane.links)
        for flow in plane.flows.flows.values():
            sink = flow.sink
            assert sink is None or flow in sink.flows
            if isinstance(sink, StreamLane | DatagramLane):
                assert not sink.closed or plane.outbound._unsettled, (
                    "a flow is pinned to a lane that is closed"
                )
                assert sink in lanes_of(sink.carrier)
        for peer in plane.peers:
            self._check_limits(peer)

    def _check_limits(self, peer: Peer) -> None:
        """Each side keeps to its limits in what it begins: both may do so at once."""
        alone = [carrier for carrier in peer.pool.carriers if carrier.alone]
        assert len(alone) <= self.live.config.p2p.max_sessions_per_peer
        assert all(self.plane._peer_of.get(carrier) is peer for carrier in alone)
        links = [carrier for carrier in peer.pool.carriers if not carrier.alone]
        for link in links:
            assert self.plane.links.get(link.session_id) is link
        assert len(links) <= self.live.config.p2p.max_sessions_per_peer, "more sessions than there may be"
        dialed = [link for link in links if link.initiator and link.usable and not link.suspect]
        staying = [link for link in dialed if link not in peer.pool._replacing]
        # One that was a suspect has got its replacement and may recover after all.
        most = len(links) if self.world.in_trouble(self, peer.peer_id) else self._most_sessions
        assert len(staying) <= most, "more sessions than multiplexer.max_sessions"
        ours = [lane for link in links for lane in link.lanes if lane.stream.ours and not lane.leaving]
        # A session that replaces another begins with a stream, whatever there is.
        assert len(ours) <= self._most_streams + len(links), "more streams than max_streams_per_peer"
