"""The peers a shard knows, their sessions, and who owns a destination."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from shards.flow.flows import Drain, Flow, Sink, unpin
from shards.flow.prefixes import Prefixes
from shards.flow.queues import Waiting
from shards.peer.multiplexer import Multiplexer
from shards.peer.pool import PoolHost, StreamPool
from vpnd.api.reports import PeerTraffic
from vpnd.config.live import Live
from vpnd.packet.flow import destination_of

if TYPE_CHECKING:
    from shards.session.lane import Lane
    from shards.session.link import Link

CLOSED, OPEN = "closed", "open"


class PeerHost(PoolHost, Protocol):
    """What peers need of their shard."""

    def now(self) -> float:
        """The clock of everything."""

    def draw(self, below: int) -> int:
        """A random number."""

    def want_now(self, peer: Peer) -> None:
        """Packets wait: a session is wanted."""


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
    """One peer. `sources`: the addresses it may send from, and by which it is reached (cryptokey routing)."""

    def __init__(self, peer_id: str, name: str, live: Live, host: PeerHost, drops: dict[str, int]) -> None:
        self.peer_id, self.name = peer_id, name
        self.prefixes: tuple[str, ...] = ()
        self.sources = Sources()
        self.circuit = CLOSED
        self.waiting = Waiting(live, drops, host.now, lambda: host.want_now(self))
        self.pool = StreamPool(peer_id, live, host, drops, host.now, self._lost)
        self.multiplexer = Multiplexer(live, self.pool, host.draw)
        self._host, self._live = host, live
        self._barred = Drain("circuit_open", drops, self._knocked)
        self._knocked_s = 0.0
        self._ended = [0, 0, 0, 0]

    def sink(self) -> Sink:
        """Where a new flow's packets go: a lane; without one the waiting room, or nowhere if the circuit is
        open."""
        lane = self.multiplexer.pick()
        if lane is not None:
            self._host.counts.acquired += 1
            return lane
        return self._barred if self.circuit == OPEN else self.waiting

    def set_circuit(self, state: str) -> None:
        """The peer is to be left alone, or not any more."""
        self.circuit = state
        unpin(self._barred)
        if state == OPEN and not self.pool.lanes():
            unpin(self.waiting)
            self.waiting.drop_all("circuit_open")

    def _knocked(self) -> None:
        """Packets are dropped for an open circuit: say so now and then, for it decides how soon it is tried
        again."""
        now_s = self._host.now()
        if now_s - self._knocked_s >= self._live.config.circuit_breaker.reset_timeout:
            self._knocked_s = now_s
            self._host.want_now(self)

    def lane_ready(self, lane: Lane) -> None:
        """What waited goes on."""
        self.pool.lane_ready(lane)
        unpin(self._barred)
        unpin(self.waiting)
        self.waiting.empty(self._host.dispatch)

    def link_closed(self, link: Link) -> None:
        """Keep what it has counted; flows and queue go elsewhere."""
        packets, size = link.received()
        for place, count in enumerate((link.bytes_sent, size, link.packets_sent, packets)):
            self._ended[place] += count
        self.pool.link_closed(link)

    def _lost(self) -> None:
        """A session is gone. If it was the last, packets wait or not, by the state of the circuit."""
        if self.circuit == OPEN and not self.pool.lanes():
            self.set_circuit(OPEN)

    def end(self) -> None:
        """No longer a peer: sessions are closed, what waits is dropped."""
        self.pool.drop_waiting("peer_forgotten")
        self.waiting.drop_all("peer_forgotten")
        for sink in (self._barred, self.waiting):
            unpin(sink)
        for link in list(self.pool.links):
            link.close("no longer a peer", failed=False, polite=True)

    def look_again(self, owned: Callable[[Flow], bool]) -> None:
        """Destinations have new owners: flows pinned here whose destination is not `owned` any more find their
        sink anew. The others stay where they are, or they would be reordered."""
        for sink in (self._barred, self.waiting):
            unpin(sink)
        for link in list(self.pool.links):
            lost = {flow for lane in link.lanes.values() for flow in lane.flows if not owned(flow)}
            self.pool.abandon(link, lost)

    def queued(self) -> int:
        """Packets that wait, anywhere."""
        return (
            self.waiting.queue.packets
            + self.pool.held()
            + sum(link.queue.packets for link in self.pool.links)
        )

    def traffic(self) -> PeerTraffic:
        """Everything between this shard and the peer so far."""
        sent, received, packets_sent, packets_received = self._ended
        for link in self.pool.links:
            packets, size = link.received()
            sent += link.bytes_sent
            received += size
            packets_sent += link.packets_sent
            packets_received += packets
        return PeerTraffic(
            peer_id=self.peer_id,
            bytes_sent=sent,
            bytes_received=received,
            packets_sent=packets_sent,
            packets_received=packets_received,
        )


class PeerTable:
    """All peers by id and by address. `unowned(version, address)` is told of a flow to an address that nobody has.

    Owner: shard loop.
    """

    def __init__(
        self,
        make: Callable[[str, str], Peer],
        drops: dict[str, int],
        unowned: Callable[[int, int], None] = lambda version, address: None,
    ) -> None:
        self._make, self._unowned = make, unowned
        self._peers: dict[str, Peer] = {}
        self._owners: Prefixes[Peer | None] = Prefixes()
        self._no_route = Drain("no_route", drops)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, peer_id: str) -> Peer | None:
        return self._peers.get(peer_id)

    def place(self, version: int, address: int) -> Sink:
        """The sink for a destination."""
        peer = self._owners.find(version, address)
        if peer is not None:
            return peer.sink()
        self._unowned(version, address)
        return self._no_route

    def reserve(self, networks: tuple[str, ...]) -> None:
        """Nobody has what is in these because of a network around it, be it to be sent to or to send from."""
        for network in networks:
            if self._owners.get(network) is None:
                around = self._owners.around(network)
                self._owners.add(network, None)
                if around is not None:
                    self._moved(around)

    def look_again(self) -> None:
        """Flows to addresses that nobody had look for an owner with their next packet."""
        unpin(self._no_route)

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
            self.look_again()
        peer.name = name
        return peer

    def _moved(self, peer: Peer) -> None:
        """What is around the peer's addresses, or within, belongs to somebody else than before."""
        peer.look_again(lambda flow: self._owner(flow) is peer)

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
