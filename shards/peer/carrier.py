"""What the pool and the multiplexer of a peer know of its sessions: carriers, and lanes in them.

Another way to carry packets (over datagrams, say) is another class with these members; nothing here asks what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from shards.counters import Traffic
from shards.flow.flows import Chunk, Flow, Sink


class Lane(Sink, Protocol):
    """An ordered part of a carrier, to which flows are pinned: what is submitted arrives in order, or not at all."""

    #: its flows are on their way to other lanes, or it is closed
    leaving: bool
    #: nothing can be submitted any more
    closed: bool

    @property
    def carrier(self) -> Carrier:
        """What it is a part of."""

    @property
    def ours(self) -> bool:
        """Whether this side opened it; it closes what it opened."""

    def close(self) -> None:
        """Nothing more of ours is sent on it; an event follows when the peer has closed its side."""

    def idle_since(self, now_s: float) -> float:
        """Since when nothing has gone either way and no flow was here; asked for now and then."""


class DatagramLane(Lane, Protocol):
    """A lane that keeps no order."""

    #: datagrams reach the peer, and flows are better off there
    usable: bool

    def traffic(self) -> Traffic:
        """Everything in datagrams so far, both ways; it is part of the carrier's."""

    def silent_s(self, now_s: float) -> float:
        """For how long datagrams have not reached the peer."""


class Carrier(Protocol):
    """A session with a peer. Its events come as methods of whoever made it, between batches only."""

    #: this side dialed: who did opens the first lanes, rotates it and closes it when it is idle
    initiator: bool
    opened_s: float
    #: the session has ended, datagrams beside it have not: there are no lanes any more
    alone: bool

    @property
    def rank(self) -> int:
        """How good the way is that it takes (vpnd.nat.paths): once there is a carrier by a better way, this one is
        left."""

    # --- whether it is alive

    #: it has ended; the event follows after the batch
    closed: bool
    #: we have said that it is about to end, the peer has
    left: bool
    peer_left: bool

    @property
    def leaving(self) -> bool:
        """One of the two sides has said so."""

    @property
    def suspect(self) -> bool:
        """A probe was not answered in time, and nothing was heard since."""

    @property
    def doubted(self) -> bool:
        """Its large TCP segments seem to get lost, or it has small ones, session.small_segment: where large ones
        arrive, one with those is better."""

    def check_alive(self) -> None:
        """Something happened that sessions do not always survive: find out now."""

    # --- what it can carry

    @property
    def lanes(self) -> Sequence[Lane]:
        """Those that are open, also while they are left."""

    @property
    def beside(self) -> DatagramLane | None:
        """Datagrams, if both nodes take them: what is lost there is lost, and nothing waits for it."""

    @property
    def opening(self) -> int:
        """Lanes this side has asked for that are not open yet."""

    @property
    def usable(self) -> bool:
        """Packets can be sent, and it is not about to end."""

    def open_lane(self) -> bool:
        """Ask for one more: an event tells what came of it. False when there may be no more."""

    # --- how full it is

    def load(self) -> int:
        """Bytes that are ahead of the next packet, up to those that the peer has not acknowledged."""

    def queued(self) -> int:
        """Packets that wait for their turn."""

    def least_delay_s(self) -> float | None:
        """The least time that a packet sent since the last call had to wait; None when one did not have to, or none
        was sent."""

    def traffic(self) -> Traffic:
        """Everything so far, both ways."""

    # --- how it is left in order

    def barrier(self, then: Callable[[float], None]) -> None:
        """Call `then` once the peer has taken everything sent so far, with the time of this call. If the carrier
        ends, never."""

    def take_queued(self, flows: set[Flow] | None = None) -> list[Chunk]:
        """Take what waits here, of all flows or of these, in order: it is the caller's now."""

    def go_away(self) -> None:
        """Begin to end it: neither side opens lanes any more."""

    def close(self, reason: str, *, failed: bool = True, polite: bool = False) -> None:
        """End it; what was on its way may be lost. `failed`: not by our will. `polite`: tell the peer first, so that
        it does not take the end for a failure."""
