"""Datagrams that have outlived their session: its streams carry nothing any more, and datagrams still reach the peer.

A Carrier without streams, for all flows, until there is another session. Its keys are the session's, so it lives no
longer than that might have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from shards.counters import Traffic
from shards.flow.flows import Chunk, Flow
from shards.session.beside import DatagramLane
from shards.session.surroundings import Remote, Surroundings
from vpnd.errors import RemoteProtocolError
from vpnd.nat.paths import NEAR


class AloneEvents(Protocol):
    """What it tells. Never within a batch of outgoing packets."""

    def datagrams_changed(self, carrier: Alone) -> None:
        """Its lane may be used from now on, or not any more."""

    def alone_ended(self, alone: Alone, reason: str) -> None:
        """It has ended; its flows and its queue are to find other places. Once, and the last event."""


class Alone:
    """Owner: shard loop. What it has in common with its session: peer, id, age, and the lane."""

    #: the next session has to show that large segments arrive: they may be what got lost
    alone = doubted = True
    initiator = left = peer_left = leaving = suspect = usable = False
    rank = NEAR  # no better way takes its place: any session does
    opening = packets_sent = 0
    lanes: tuple[()] = ()

    def __init__(
        self,
        session_id: int,
        peer: Remote,
        opened_s: float,
        beside: DatagramLane[Any],
        events: AloneEvents,
        common: Surroundings,
    ) -> None:
        self.session_id, self.peer, self.opened_s = session_id, peer, opened_s
        self.closed = False
        self._now = common.now
        self.beside = beside
        self._events, self._outbound, self._counts = events, common.outbound, common.counts

    # --- the session of its lane

    def fail(self, error: RemoteProtocolError) -> None:
        """The peer has broken the protocol."""
        if not self.closed:
            self._counts.session_errors += 1
            self.close(f"protocol error: {error}")

    def datagrams_changed(self) -> None:
        if not self.closed:
            self._events.datagrams_changed(self)

    def hold(self, held: bool) -> None:
        """There are no streams."""

    def outlive(self, why: str) -> None:
        """The session has ended."""

    def age_s(self) -> float:
        """Of the session that it was beside, too."""
        return self._now() - self.opened_s

    # --- as a carrier

    def check_alive(self) -> None:
        self.beside.hurry()

    def open_lane(self) -> bool:
        return False

    def load(self) -> int:
        return 0 if self.closed else self.beside.queue.bytes

    def queued(self) -> int:
        return self.beside.queue.packets

    def least_delay_s(self) -> float | None:
        return None

    def traffic(self) -> Traffic:
        return self.beside.traffic()

    def barrier(self, then: Callable[[float], None]) -> None:
        """Nothing is acknowledged here: never answered."""

    def take_queued(self, flows: set[Flow] | None = None) -> list[Chunk]:
        return self.beside.queue.take_all(flows)

    def go_away(self) -> None:
        """There is no stream to say it in."""

    def close(self, reason: str, *, failed: bool = True, polite: bool = False) -> None:
        if not self.closed:
            self.closed = True
            self.beside.end()
            self._outbound.after_batch(lambda: self._events.alone_ended(self, reason))
