"""The peers a shard knows, their links, and who owns a destination."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from shards.flows import Drain, Sink, Waiting, unpin
from shards.prefixes import Prefixes
from vpnd.api.messages import PeerTraffic, SessionReport
from vpnd.packet.ring import SCRATCH

if TYPE_CHECKING:
    from shards.link import Link


class Peer:
    """One peer. `sources`: the addresses it may send from, and by which it is reached (cryptokey routing)."""

    def __init__(self, peer_id: str, name: str, waiting: Waiting) -> None:
        self.peer_id, self.name, self.waiting = peer_id, name, waiting
        self.prefixes: tuple[str, ...] = ()
        self.sources: Prefixes[bool] = Prefixes()
        self.links: set[Link] = set()
        self._ended = PeerTraffic(peer_id=peer_id)

    def count_ended(self, link: Link) -> None:
        """Keep what an ending link has counted."""
        self._ended = _add(self._ended, link.report())

    def traffic(self) -> PeerTraffic:
        """Everything between this shard and the peer so far."""
        total = self._ended
        for link in self.links:
            total = _add(total, link.report())
        return total

    def sink(self) -> Sink:
        """Where a flow's packets go now: the ready link with the least waiting, or the waiting room."""
        ready = [link for link in self.links if link.ready]
        if not ready:
            return self.waiting
        return min(ready, key=lambda link: (link.queue.bytes, len(link.flows), link.session_id))


def _add(total: PeerTraffic, session: SessionReport) -> PeerTraffic:
    return PeerTraffic(
        peer_id=total.peer_id,
        bytes_sent=total.bytes_sent + session.bytes_sent,
        bytes_received=total.bytes_received + session.bytes_received,
        packets_sent=total.packets_sent + session.packets_sent,
        packets_received=total.packets_received + session.packets_received,
    )


class PeerTable:
    """All peers by id and by address. Owner: shard loop."""

    def __init__(self, make_waiting: Callable[[str], Waiting], drops: dict[str, int]) -> None:
        self._make_waiting, self._drops = make_waiting, drops
        self._peers: dict[str, Peer] = {}
        self._owners: Prefixes[Peer] = Prefixes()
        self._no_route = Drain("no_route", drops)

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, peer_id: str) -> Peer | None:
        return self._peers.get(peer_id)

    def place(self, version: int, address: int) -> Sink:
        """The sink for a destination."""
        peer = self._owners.find(version, address)
        return self._no_route if peer is None else peer.sink()

    def know(self, peer_id: str, name: str, prefixes: tuple[str, ...]) -> Peer:
        """A new peer, or new prefixes of a known one."""
        peer = self._peers.get(peer_id)
        if peer is None:
            peer = self._peers[peer_id] = Peer(peer_id, name, self._make_waiting(peer_id))
        if prefixes != peer.prefixes:
            for prefix in peer.prefixes:
                peer.sources.remove(prefix)
                self._owners.remove(prefix)
            for prefix in prefixes:
                peer.sources.add(prefix, True)
                self._owners.add(prefix, peer)
            peer.prefixes = prefixes
            self._look_again(peer)
        peer.name = name
        return peer

    def forget(self, peer_id: str) -> Peer | None:
        """No longer a peer: what waits for it is dropped. Its links are the caller's to close."""
        peer = self._peers.pop(peer_id, None)
        if peer is None:
            return None
        for prefix in peer.prefixes:
            self._owners.remove(prefix)
        self._look_again(peer)
        while peer.waiting.queue:
            self._drops["peer_forgotten"] += peer.waiting.queue.take().packets
        return peer

    def _look_again(self, peer: Peer) -> None:
        """Destinations have new owners: every flow that this may touch finds its sink anew."""
        unpin(self._no_route)
        unpin(peer.waiting)
        for link in peer.links:
            unpin(link)

    def link_ready(self, link: Link) -> None:
        """What waited goes on over the first link that is ready."""
        waiting = link.peer.waiting
        unpin(waiting)
        waiting.empty_into(link)

    def link_closed(self, link: Link) -> None:
        """Its flows find another sink; what was queued goes there too, or is lost."""
        peer = link.peer
        peer.links.discard(link)
        peer.count_ended(link)
        unpin(link)
        sink = peer.sink()
        while link.queue:
            chunk = link.queue.take()
            if sink is peer.waiting or self._peers.get(peer.peer_id) is not peer:
                self._drops["session_lost"] += chunk.packets
            else:
                sink.submit(chunk.buffer, SCRATCH, len(chunk.buffer), chunk.packets)
        sink.flush()
