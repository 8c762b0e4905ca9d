"""Who is to be dialed, for which shard, and when. No I/O; time is an argument.

The goal: every shard has a session with every peer that has addresses. The rules:

    turn        the node with the smaller peer id dials at once, the other after `dial_stagger_s`: usually the
                session has arrived by then
    pace        never two dials for the same shard and peer within `min_interval_s`
    backoff     a failed dial, or a session that ended before packets flowed, makes the peer wait; a session
                in which packets flow forgets that. A peer that backs off is dialed for one shard at a time
    wanted      packets waiting in a shard end the backoff, not the pace
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable

from vpnd.api.messages import PeerReport
from vpnd.control.book import Held, SessionBook
from vpnd.discovery.registry import Member
from vpnd.resilience import Backoff

NEVER = math.inf


class _Peer:
    """Dialing state of one peer."""

    def __init__(self, member: Member, backoff: Backoff) -> None:
        self.member = member
        self.backoff = backoff
        self.not_before_s = -NEVER  # end of the backoff
        self.last_dial_s = -NEVER
        self.turn_s: dict[int, float] = {}  # shard -> its turn, its pace
        self.under_way: set[int] = set()  # shards being dialed for
        self.due_s = NEVER  # as it stands in the queue
        self.dials = 0
        self.failures = 0
        self.last_error = ""


class Planner:
    """Plans the dials of one node. Reads the session book; the owner enters sessions there and tells it here.

    Owner: control's loop.
    """

    def __init__(
        self,
        own_id: str,
        members: Iterable[Member],
        book: SessionBook,
        make_backoff: Callable[[], Backoff],
        *,
        dial_stagger_s: float,
        min_interval_s: float,
    ) -> None:
        self._own_id = own_id
        self._book = book
        self._stagger_s = dial_stagger_s
        self._min_interval_s = min_interval_s
        self._peers = {member.peer_id: _Peer(member, make_backoff()) for member in members}
        self._shards: set[int] = set()
        #: (due, peer id); entries whose time is no longer the peer's are skipped.
        self._queue: list[tuple[float, str]] = []

    def shard_ready(self, shard: int, now_s: float) -> None:
        """The shard takes sessions; those it has are in the book."""
        self._shards.add(shard)
        for peer in self._peers.values():
            self._lacking(peer, shard, now_s)
            self._reschedule(peer)

    def shard_left(self, shard: int) -> None:
        """The shard is gone, and its sessions are out of the book. Dials under way for it end as they may."""
        self._shards.discard(shard)
        for peer in self._peers.values():
            peer.turn_s.pop(shard, None)
            peer.under_way.discard(shard)
            self._reschedule(peer)

    def session_added(self, peer_id: str) -> None:
        """A session of the peer was entered into the book."""
        if peer := self._peers.get(peer_id):
            self._reschedule(peer)

    def session_up(self, peer_id: str) -> None:
        """Packets flow in a session with the peer: it works."""
        if peer := self._peers.get(peer_id):
            peer.backoff.reset()
            peer.not_before_s = -NEVER
            peer.last_error = ""
            self._reschedule(peer)

    def session_down(self, held: Held, reason: str, now_s: float) -> None:
        """A session has left the book because its shard said so."""
        if peer := self._peers.get(held.peer_id):
            if not held.up:
                # It was made and came to nothing: dialing again at once would turn in circles.
                self._fail(peer, f"the session ended at once: {reason}", now_s)
            self._lacking(peer, held.shard, now_s)
            self._reschedule(peer)

    def wanted(self, peer_id: str, now_s: float) -> None:
        """Packets for the peer wait."""
        if peer := self._peers.get(peer_id):
            peer.not_before_s = min(peer.not_before_s, max(now_s, peer.last_dial_s + self._min_interval_s))
            self._reschedule(peer)

    def take_due(self, now_s: float) -> list[tuple[Member, int]]:
        """The dials to start now; each must be followed by `dial_ended`."""
        taken = []
        while self._queue and self._queue[0][0] <= now_s:
            due_s, peer_id = heapq.heappop(self._queue)
            peer = self._peers[peer_id]
            if due_s != peer.due_s:
                continue
            peer.due_s = NEVER
            for shard in sorted(self._candidates(peer)):
                if self._due_s(peer, shard) <= now_s and not (peer.under_way and peer.backoff.failures):
                    peer.under_way.add(shard)
                    peer.turn_s[shard] = now_s + self._min_interval_s
                    peer.last_dial_s = now_s
                    peer.dials += 1
                    taken.append((peer.member, shard))
            self._reschedule(peer)
        return taken

    def dial_ended(self, peer_id: str, shard: int, error: str, now_s: float) -> bool:
        """A dial is over; `error` is empty when there is a session or nobody is to blame.

        Returns whether the failure is news, that is, not the same as before.
        """
        peer = self._peers[peer_id]
        peer.under_way.discard(shard)
        news = False
        if error:
            news = error != peer.last_error
            self._fail(peer, error, now_s)
        self._reschedule(peer)
        return news

    def next_due_s(self) -> float:
        """When `take_due` has something to do; infinite when nothing is planned."""
        while self._queue and self._queue[0][0] != self._peers[self._queue[0][1]].due_s:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else NEVER

    def report(self, now_s: float) -> tuple[PeerReport, ...]:
        """The peers for status."""
        return tuple(self._report(peer, now_s) for peer in self._peers.values())

    def _report(self, peer: _Peer, now_s: float) -> PeerReport:
        peer_id = peer.member.peer_id
        if self._book.connected(peer_id):
            state = "connected"
        elif peer.under_way or self._book.count(peer_id):
            state = "dialing"
        elif peer.backoff.failures and peer.due_s != NEVER:
            state = "backoff"
        else:
            state = "waiting"
        return PeerReport(
            name=peer.member.name,
            peer_id=peer_id,
            addresses=peer.member.addresses,
            state=state,
            last_error=peer.last_error,
            next_dial_s=-1.0 if peer.due_s == NEVER else max(0.0, peer.due_s - now_s),
            dials=peer.dials,
            dial_failures=peer.failures,
        )

    def _fail(self, peer: _Peer, error: str, now_s: float) -> None:
        peer.failures += 1
        peer.last_error = error
        peer.not_before_s = peer.backoff.fail(now_s)

    def _lacking(self, peer: _Peer, shard: int, now_s: float) -> None:
        """The shard may have come to lack a session with the peer: whose turn is it?"""
        wait_s = 0.0 if self._own_id < peer.member.peer_id else self._stagger_s
        peer.turn_s[shard] = max(peer.turn_s.get(shard, -NEVER), now_s + wait_s)

    def _candidates(self, peer: _Peer) -> list[int]:
        """Shards to dial the peer for, sooner or later."""
        if not peer.member.addresses:
            return []
        peer_id = peer.member.peer_id
        return [
            shard
            for shard in self._shards
            if shard not in peer.under_way and self._book.lacks(peer_id, shard)
        ]

    def _due_s(self, peer: _Peer, shard: int) -> float:
        return max(peer.not_before_s, peer.turn_s.get(shard, -NEVER))

    def _reschedule(self, peer: _Peer) -> None:
        due_s = min((self._due_s(peer, shard) for shard in self._candidates(peer)), default=NEVER)
        if peer.under_way and peer.backoff.failures:
            due_s = NEVER  # looked at again when the dial under way has ended
        if due_s != peer.due_s:
            peer.due_s = due_s
            if due_s != NEVER:
                heapq.heappush(self._queue, (due_s, peer.member.peer_id))
