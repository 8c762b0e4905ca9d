"""The peers a shard knows, and who owns a destination."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from shards.budget import Budget
from shards.counters import PeerDrops, Traffic
from shards.flow.flows import Discard, Flow, Sink, unpin
from shards.flow.prefixes import Prefixes, set_of
from shards.flow.queues import Pending
from shards.peer.carrier import Carrier, Lane
from shards.peer.choice import Choice
from shards.peer.multiplexer import Multiplexer
from shards.peer.pool import PoolHost, StreamPool, lanes_of
from shards.rest import Rest
from vpnd.api.reports import PeerTraffic
from vpnd.config.live import Live
from vpnd.metrics import Drops, Times
from vpnd.packet.flow import destination_of

CLOSED, OPEN = "closed", "open"


class PeerHost(PoolHost, Protocol):
    """What peers need of their shard."""

    choice: Choice
    rest: Rest

    def draw(self, below: int) -> int:
        """A random number."""

    def want_now(self, peer: Peer) -> None:
        """Packets began to wait: a session is wanted at once."""

    def tell_unreachable(self, buffer: memoryview, start: int, end: int) -> None:
        """There is no way for these records. borrowed: until this returns."""


class Sources(Prefixes[bool]):
    """The addresses one peer may send from: those for which it is the one that is sent to.

    Of a network a part may be somebody else's, and an exit node has the network of all addresses: what another peer
    has in it, be it a single address, is that peer's alone. `owned` says so of addresses in networks; an address of
    its own nobody else has.
    """

    owned: Callable[[int, int], bool] = staticmethod(lambda version, address: True)

    def find(self, version: int, address: int) -> bool | None:
        """True for what the peer may send from."""
        if address in self._hosts[version]:
            return True
        return super().find(version, address) and self.owned(version, address)


class Peer:
    """One peer. `sources`: the addresses it may send from, and by which it is reached (cryptokey routing).
    `budget`: what its sessions may use together. `drops`: what of its packets was dropped, either way. `rtts`: round
    trips of its sessions."""

    def __init__(self, peer_id: str, name: str, live: Live, host: PeerHost) -> None:
        self.peer_id, self.name = peer_id, name
        self.prefixes: tuple[str, ...] = ()
        self.sources = Sources()
        self.budget = Budget(live, host.now, host.rest.between_turns)
        self.rtts = Times()
        self.circuit = CLOSED
        self.drops = drops = PeerDrops(host.counts.drops)
        self.pending = Pending(live, drops, host.now, lambda: host.want_now(self))
        self.pool = StreamPool(peer_id, live, host, drops, self._lost)
        self.multiplexer = Multiplexer(live, self.pool, host.draw)
        self._host, self._live = host, live
        self._discard = Discard("circuit_open", drops, self._discarding)
        self._told_s = 0.0
        self._ended = Traffic()  # of the sessions that have ended

    def sink(self, key: int) -> Sink:
        """Where a flow's packets go: a lane; without one they are pending, or discarded if the circuit is open."""
        lane = self.pool.datagrams() if self._host.choice.datagrams(key) else None
        if lane is None:
            lane = self.multiplexer.pick() or self.pool.datagrams()
        if lane is not None:
            self._host.counts.streams_acquired += 1
            return lane
        return self._discard if self.circuit == OPEN else self.pending

    def set_circuit(self, state: str) -> None:
        """The state of the peer's circuit: open, half_open, closed."""
        self.circuit = state
        unpin(self._discard)
        if state == OPEN and not self.pool.lanes():
            unpin(self.pending)
            self.pending.empty(self._host.dispatch)

    def _discarding(self, buffer: memoryview, start: int, end: int) -> None:
        """Packets are dropped for an open circuit: tell control every circuit_breaker.reset_timeout, which decides
        how soon the peer is dialed again."""
        now_s = self._host.now()
        if now_s - self._told_s >= self._live.config.circuit_breaker.reset_timeout:
            self._told_s = now_s
            self._host.want_now(self)
        self._host.tell_unreachable(buffer, start, end)

    def lane_ready(self, lane: Lane) -> None:
        """A lane is open: send the pending packets."""
        self.pool.lane_ready(lane)
        self._send_pending()

    def _send_pending(self) -> None:
        unpin(self._discard)
        unpin(self.pending)
        if self.pending.queue:
            waited_s = self._host.now() - self.pending.queue.first().since_s
            self._host.counts.times["first_packet"].add(waited_s)
        self.pending.empty(self._host.dispatch)

    def datagrams_changed(self, carrier: Carrier) -> None:
        """Datagrams beside a session can be used from now on, or not any more."""
        self.pool.datagrams_changed(carrier, self._host.choice)
        if self.pool.datagrams() is not None:
            self._send_pending()

    def carrier_closed(self, carrier: Carrier) -> None:
        """Keep what it has counted; flows and queue go elsewhere."""
        self._ended = self._ended.plus(carrier.traffic())
        self.pool.carrier_closed(carrier)

    def _lost(self) -> None:
        """A session has ended. If it was the last and the circuit is open, packets are dropped, not pending."""
        if self.circuit == OPEN and not self.pool.lanes():
            self.set_circuit(OPEN)

    def end(self) -> None:
        """No longer a peer: close its sessions, drop what waits."""
        self.pool.drop_waiting("peer_forgotten")
        self.pending.drop_all("peer_forgotten")
        for sink in (self._discard, self.pending):
            unpin(sink)
        for carrier in self.pool.carriers:
            carrier.close("no longer a peer", failed=False, polite=True)

    def owners_changed(self, owned: Callable[[Flow], bool]) -> None:
        """Destinations have new owners: flows pinned here whose destination is not `owned` any more find their
        sink anew. The others stay where they are, or they would be reordered."""
        for sink in (self._discard, self.pending):
            unpin(sink)
        for carrier in self.pool.carriers:
            lost = {flow for lane in lanes_of(carrier) for flow in lane.flows if not owned(flow)}
            self.pool.abandon(carrier, lost)

    def queued(self) -> int:
        """Packets that wait, anywhere."""
        waiting = sum(carrier.queued() for carrier in self.pool.carriers)
        return self.pending.queue.packets + self.pool.held() + waiting

    def traffic(self) -> PeerTraffic:
        """Everything between this shard and the peer so far."""
        total = self._ended
        for carrier in self.pool.carriers:
            total = total.plus(carrier.traffic())
        rtt = tuple(self.rtts.counts) if self.rtts.counts[-1] else ()
        return PeerTraffic(peer_id=self.peer_id, drops=self.drops.records, rtt=rtt, **total._asdict())


class Unowned:
    """Destinations that no peer has, in networks where single addresses have owners: control is asked for them.

    Off the packet path: asked about when a flow begins, not with its packets. An address is asked for once in
    registry.negative_lifetime, and no more than registry.max_waiting addresses are; then `again()` lets all flows
    without a destination look for one with their next packet, so who goes on sending goes on asking. `ask(address)`
    asks control; `later(seconds, call)` is the loop's call_later.
    """

    def __init__(
        self,
        live: Live,
        ask: Callable[[int], None],
        again: Callable[[], None],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._live, self._ask, self._again, self._later = live, ask, again, later
        self._networks: Prefixes[bool] = Prefixes()
        self._asked: set[int] = set()
        self._waits = False

    def ask_in(self, networks: Iterable[str]) -> None:
        """Ask for addresses of these; also when control is a new one, which knows nothing of what was asked before."""
        self._networks = set_of(networks)
        self._asked.clear()
        self._again()

    def flow_begins(self, version: int, address: int) -> bool:
        """A flow begins to an address that nobody has: whether somebody may turn out to have it."""
        if version != 4 or not self._networks.find(version, address):
            return False
        if address in self._asked or len(self._asked) >= self._live.config.registry.max_waiting:
            return True
        if not self._waits:
            self._waits = True
            self._later(self._live.config.registry.negative_lifetime, self._retry)
        self._asked.add(address)
        self._ask(address)
        return True

    def _retry(self) -> None:
        self._waits = False
        self._asked.clear()
        self._again()


class PeerTable:
    """All peers by id and by address. `ask(address)` asks control who has an address; `later` as for Unowned;
    `tell_unreachable` as of PeerHost.

    Owner: shard loop.
    """

    def __init__(
        self,
        make: Callable[[str, str], Peer],
        drops: Drops,
        live: Live,
        ask: Callable[[int], None],
        later: Callable[[float, Callable[[], None]], object],
        tell_unreachable: Callable[[memoryview, int, int], None],
    ) -> None:
        self._make = make
        self._unowned = Unowned(live, ask, self.retry_unrouted, later)
        self._peers: dict[str, Peer] = {}
        self._owners: Prefixes[Peer | None] = Prefixes()
        self._no_route = Discard("no_route", drops, tell_unreachable)
        #: of those who may have an owner soon: programs are to try again, not to give up
        self._asked_for = Discard("no_route", drops, lambda *records: None)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, peer_id: str) -> Peer | None:
        return self._peers.get(peer_id)

    def sink_for(self, key: int) -> Sink:
        version, address = destination_of(key)
        peer = self._owners.find(version, address)
        if peer is not None:
            return peer.sink(key)
        return self._asked_for if self._unowned.flow_begins(version, address) else self._no_route

    def ask_owners(self, networks: tuple[str, ...]) -> None:
        """Of these networks single addresses have owners, whom control can be asked for: nobody has what is in them
        because of a network around it, be it to be sent to or to send from."""
        for network in networks:
            if self._owners.get(network) is None:
                around = self._owners.around(network)
                self._owners.add(network, None)
                if around is not None:
                    self._moved(around)
        self._unowned.ask_in(networks)

    def retry_unrouted(self) -> None:
        """Flows to addresses that nobody had look for an owner with their next packet."""
        unpin(self._no_route)
        unpin(self._asked_for)

    def owner(self, version: int, address: int) -> Peer | None:
        """The peer a destination is sent to."""
        return self._owners.find(version, address)

    def know(self, peer_id: str, name: str, prefixes: tuple[str, ...]) -> Peer:
        """A new peer, or new prefixes of a known one."""
        peer = self._peers.get(peer_id)
        if peer is None:
            peer = self._peers[peer_id] = self._make(peer_id, name)
            peer.sources.owned = functools.partial(self._owns, peer)
        if prefixes != peer.prefixes:
            touched = {peer: None}  # in order, each once
            for prefix in peer.prefixes:
                peer.sources.remove(prefix)
                if self._owners.get(prefix) is peer:
                    self._owners.remove(prefix)
            for prefix in prefixes:
                peer.sources.add(prefix, True)
                owner = self._owners.around(prefix)
                if owner is not None:
                    touched[owner] = None
                self._owners.add(prefix, peer)
            peer.prefixes = prefixes
            for each in touched:
                self._moved(each)
            self.retry_unrouted()
        peer.name = name
        return peer

    def _moved(self, peer: Peer) -> None:
        """What is around the peer's addresses, or within, belongs to somebody else than before."""
        peer.owners_changed(lambda flow: self._owner(flow) is peer)

    def _owns(self, peer: Peer, version: int, address: int) -> bool:
        return self._owners.find(version, address) is peer

    def _owner(self, flow: Flow) -> Peer | None:
        return self.owner(*destination_of(flow.key))

    def forget(self, peer_id: str) -> None:
        """No longer a peer: its sessions are closed, what waits for it is dropped."""
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return
        for prefix in peer.prefixes:
            if self._owners.get(prefix) is peer:
                self._owners.remove(prefix)
        peer.end()
