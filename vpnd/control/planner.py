"""Who is to be dialed, for which shard, and when. No I/O; time is an argument.

The goal: every shard has as many sessions as it wants with every peer that has addresses; one until it says
otherwise. The rules:

    turn        the node with the smaller peer id dials at once, the other after p2p.dial_stagger: usually the
                session has arrived by then. A peer that has to be met is called at once by both: of two such calls
                one stands. A peer that cannot dial this node is not waited for
    pace        never two dials for the same shard and peer within retry.initial_interval, nor two at once
    backoff     a failed dial, or a session that ended before packets flowed, makes the peer wait; a session
                in which packets flow forgets that. A peer that backs off is dialed for one shard at a time
    circuit     an open circuit lets nobody dial for circuit_breaker.reset_timeout, then one probe for one shard.
                The backoff goes on growing from probe to probe, and the longer of both waits counts
    wanted      packets waiting in a shard end the backoff, neither the pace nor the circuit's wait: a dead peer is
                probed every reset_timeout while somebody talks to it, and seldom while nobody does
    limit       never more sessions with a peer than p2p.max_sessions_per_peer, those under way among them

What a failure is, and when it counts, is in `dialstate`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from vpnd.api.reports import PeerReport
from vpnd.config.live import Live
from vpnd.control.book import Held, SessionBook
from vpnd.control.dialstate import NEVER, CircuitChange, Dial, PeerDials
from vpnd.discovery.registry import Member
from vpnd.resilience import Circuit, Uniform

#: Sessions a shard wants with a peer until it says otherwise, where there are few peers.
WANTED = 1


class Planner:
    """Plans the dials of one node. Reads the session book; the owner enters sessions there and tells it here.

    Owner: control's loop.
    """

    def __init__(
        self,
        own_id: str,
        members: Iterable[Member],
        book: SessionBook,
        live: Live,
        uniform: Uniform,
        can_meet: Callable[[str], bool] = lambda peer_id: False,
        dials_at_once: Callable[[Member], bool] = lambda member: False,
    ) -> None:
        """`can_meet`: whether a peer could be met at a relay, without an address of its own. `dials_at_once`: whether
        it is not to be waited for."""
        self._can_meet, self._dials_at_once = can_meet, dials_at_once
        self._own_id = own_id
        self._book = book
        self._live = live
        self._uniform = uniform
        self._changes: list[CircuitChange] = []
        self._shards: set[int] = set()
        #: (due, peer id); entries whose time is no longer the peer's are skipped.
        self._queue: list[tuple[float, str]] = []
        self._peers: dict[str, PeerDials] = {}
        for member in members:
            self._peers[member.peer_id] = self._new(member)
        live.watch(lambda config: (config.p2p, config.retry, config.circuit_breaker), self._other_settings)

    def _new(self, member: Member) -> PeerDials:
        return PeerDials(member, self._live, self._uniform, self._changes.append)

    # --- what changes around the peers

    def _other_settings(self) -> None:
        for peer in self._peers.values():
            peer.other_settings()
            self._reschedule(peer)

    def network_changed(self) -> None:
        """Addresses or routes of the machine changed: every peer is tried at once, dials under way are forgotten."""
        for peer in self._peers.values():
            peer.begin_anew()
            self._reschedule(peer)

    def relays_changed(self) -> None:
        """Peers can be met at other relays than before: those there is no session with are tried at once."""
        for peer in self._peers.values():
            if not self._book.count(peer.member.peer_id):
                peer.wait_no_more()
            self._reschedule(peer)

    def member_added(self, member: Member, now_s: float) -> None:
        """A new peer, or one that was removed before."""
        peer = self._peers[member.peer_id] = self._new(member)
        for shard in self._shards:
            self._lacking(peer, shard, now_s)
        self._reschedule(peer)

    def member_changed(self, member: Member) -> None:
        """Other addresses are tried at once; dials under way to the old ones are forgotten. Not more often than every
        retry.max_interval: somebody's addresses that keep changing would have this node knock at them all day."""
        peer = self._peers[member.peer_id]
        moved = (peer.member.addresses, peer.member.relays) != (member.addresses, member.relays)
        peer.member = member
        if moved and peer.last_dial_s >= peer.settled_s:
            peer.settled_s = peer.last_dial_s + self._live.config.retry.max_interval
            peer.begin_anew()
            self._reschedule(peer)

    def member_removed(self, peer_id: str) -> None:
        """No longer a peer. Dials under way are forgotten."""
        self._peers.pop(peer_id, None)

    def shard_ready(self, shard: int, now_s: float) -> None:
        """The shard takes sessions; those it has are in the book."""
        self._shards.add(shard)
        for peer in self._peers.values():
            self._lacking(peer, shard, now_s)
            self._reschedule(peer)

    def shard_left(self, shard: int, now_s: float) -> None:
        """The shard is gone, and its sessions are out of the book. Dials for it are forgotten."""
        self._shards.discard(shard)
        for peer in self._peers.values():
            peer.shard_left(shard)
            if peer.present and not self._book.connected(peer.member.peer_id):
                peer.gone(now_s)
            self._reschedule(peer)

    # --- sessions

    def session_added(self, peer_id: str) -> None:
        """A session of the peer was entered into the book."""
        if peer := self._peers.get(peer_id):
            self._reschedule(peer)

    def session_up(self, held: Held) -> None:
        """Packets flow in a session with the peer: it works."""
        if peer := self._peers.get(held.peer_id):
            peer.worked(inbound=not held.initiator)
            self._reschedule(peer)

    def session_down(self, held: Held, reason: str, failed: bool, now_s: float) -> None:
        """A session has left the book because its shard said so; `failed`: not by anybody's will."""
        if peer := self._peers.get(held.peer_id):
            connected = self._book.connected(held.peer_id)
            if not held.up:
                # It was made and came to nothing: dialing again at once would turn in circles.
                error = f"the session ended at once: {reason}"
                peer.failed(error, held.since_s, now_s, connected=connected, blame=failed)
            elif failed and not connected:
                peer.lost(reason, held.since_s, now_s)
            if held.up and not connected:
                peer.gone(now_s)
            self._lacking(peer, held.shard, now_s)
            self._reschedule(peer)

    def wanted(self, peer_id: str, shard: int, sessions: int, urgent: bool, now_s: float) -> None:
        """The shard wants so many sessions with the peer; `urgent`: packets wait."""
        peer = self._peers.get(peer_id)
        if peer is None or shard not in self._shards:
            return
        lacking = sessions > self._wanted(peer, shard)
        peer.wanted[shard] = sessions
        if lacking:
            self._lacking(peer, shard, now_s)
        if urgent:
            peer.urgent_s = now_s
            pace_s = peer.last_dial_s + self._live.config.retry.initial_interval
            peer.not_before_s = min(peer.not_before_s, max(now_s, pace_s))
        self._reschedule(peer)

    def wanted_by(self, peer_id: str, shard: int) -> int:
        """Sessions the shard wants with the peer."""
        peer = self._peers.get(peer_id)
        return self._wanted(peer, shard) if peer is not None else 0

    def _wanted(self, peer: PeerDials, shard: int) -> int:
        """What the shard has said, or is taken for granted: in a large network nothing before packets wait."""
        said = peer.wanted.get(shard)
        if said is not None:
            return said
        return WANTED if len(self._peers) <= self._live.config.p2p.eager_peers else 0

    # --- dials

    def take_due(self, now_s: float) -> list[Dial]:
        """The dials to start now; each must be followed by `dial_ended`, unless it was forgotten."""
        taken = []
        while self._queue and self._queue[0][0] <= now_s:
            due_s, peer_id = heapq.heappop(self._queue)
            peer = self._peers.get(peer_id)
            if peer is None or due_s != peer.due_s:
                continue
            peer.due_s = NEVER
            for shard in sorted(self._candidates(peer)):
                if self._may_dial(peer, shard, now_s):
                    dial = Dial(peer.member, shard, now_s, peer.retry.failures > 0)
                    peer.under_way.add(dial)
                    peer.turn_s[shard] = now_s + self._live.config.retry.initial_interval
                    peer.last_dial_s = now_s
                    peer.dials += 1
                    taken.append(dial)
            self._reschedule(peer)
        return taken

    def _may_dial(self, peer: PeerDials, shard: int, now_s: float) -> bool:
        """Asked for one shard after the other: what was begun for those before counts."""
        if self._due_s(peer, shard) > now_s or self._room(peer) <= 0:
            return False
        return self._book.connected(peer.member.peer_id) or peer.breaker.take(now_s)

    def dial_ended(self, dial: Dial, error: str, now_s: float, *, blame: bool = True) -> bool:
        """A dial is over; `error` is empty when there is a session or the dial was called off. `blame`: whether
        an error counts against the peer.

        Returns whether the failure is news, that is, not the same as before. One that was forgotten is none.
        """
        peer = self._peers.get(dial.member.peer_id)
        if peer is None or not self.expects(dial):
            return False
        peer.under_way.discard(dial)
        news = False
        if error:
            news = error != peer.last_error
            connected = self._book.connected(dial.member.peer_id)
            peer.failed(error, dial.begun_s, now_s, connected=connected, blame=blame)
        self._reschedule(peer)
        return news

    def member(self, peer_id: str) -> Member | None:
        """A peer as it is now."""
        peer = self._peers.get(peer_id)
        return peer.member if peer is not None else None

    def expects(self, dial: Dial) -> bool:
        """Whether that dial is under way and was not forgotten."""
        peer = self._peers.get(dial.member.peer_id)
        return peer is not None and dial in peer.under_way

    def next_due_s(self) -> float:
        """When `take_due` has something to do; infinite when nothing is planned."""
        while self._queue:
            due_s, peer_id = self._queue[0]
            peer = self._peers.get(peer_id)
            if peer is not None and peer.due_s == due_s:
                return due_s
            heapq.heappop(self._queue)
        return NEVER

    # --- what is told

    def take_circuit_changes(self) -> list[CircuitChange]:
        """The changes of circuits since it was asked last, in their order."""
        changes = list(self._changes)
        self._changes.clear()
        return changes

    def circuits(self) -> dict[str, Circuit]:
        """Peer id -> circuit, of those that are not closed."""
        return {
            peer_id: peer.breaker.state
            for peer_id, peer in self._peers.items()
            if peer.breaker.state is not Circuit.CLOSED
        }

    def report(self, now_s: float) -> tuple[PeerReport, ...]:
        """The peers for status; of more than status.max_peers those first that something is known to happen with."""
        peers: Iterable[PeerDials] = self._peers.values()
        most = self._live.config.status.max_peers
        if len(self._peers) > most:
            count = self._book.count
            peers = heapq.nsmallest(
                most,
                peers,
                key=lambda peer: (not count(peer.member.peer_id), not (peer.dials or peer.under_way)),
            )
        return tuple(self._report(peer, now_s) for peer in peers)

    def unreachable(self) -> list[str]:
        """Peer ids of those without a session that could not be dialed, or whose addresses nobody knows."""
        return [
            peer_id
            for peer_id, peer in self._peers.items()
            if not self._book.count(peer_id)
            and not peer.under_way
            and (peer.last_error or not peer.member.addresses)
        ]

    def _report(self, peer: PeerDials, now_s: float) -> PeerReport:
        peer_id = peer.member.peer_id
        if self._book.connected(peer_id):
            state = "connected"
        elif peer.under_way or self._book.count(peer_id):
            state = "dialing"
        elif (peer.retry.failures or peer.breaker.state is not Circuit.CLOSED) and peer.due_s != NEVER:
            state = "backoff"
        else:
            state = "waiting"
        return PeerReport(
            name=peer.member.name,
            peer_id=peer_id,
            addresses=peer.member.addresses,
            state=state,
            last_error=peer.last_error,
            seen_s=-1.0 if state == "connected" or peer.gone_s == -NEVER else now_s - peer.gone_s,
            next_dial_s=-1.0 if peer.due_s == NEVER else max(0.0, peer.due_s - now_s),
            dials=peer.dials,
            dial_failures=peer.failures,
            circuit=str(peer.breaker.state),
            circuit_opened=peer.breaker.opened,
            virtual_ips=peer.member.virtual_ips,
            routes=peer.member.routes,
            source=peer.member.source,
            protocol=peer.member.protocol,
        )

    # --- when

    def _lacking(self, peer: PeerDials, shard: int, now_s: float) -> None:
        """The shard may have come to lack a session with the peer: whose turn is it?"""
        wait_s = 0.0
        if (
            self._own_id > peer.member.peer_id
            and self._wanted(peer, shard)
            and not self._dials_at_once(peer.member)
        ):
            wait_s = self._live.config.p2p.dial_stagger
        peer.turn_s[shard] = max(peer.turn_s.get(shard, -NEVER), now_s + wait_s)

    def _room(self, peer: PeerDials) -> int:
        held = self._book.count(peer.member.peer_id) + len(peer.under_way)
        return self._live.config.p2p.max_sessions_per_peer - held

    def _candidates(self, peer: PeerDials) -> list[int]:
        """Shards to dial the peer for, sooner or later. Who has never said where it is, is met for packets alone: most
        likely it is nowhere."""
        peer_id = peer.member.peer_id
        nowhere = not peer.member.addresses
        if nowhere and not self._can_meet(peer_id) or self._room(peer) <= 0:
            return []
        busy = {dial.shard for dial in peer.under_way}
        return [
            shard
            for shard in self._shards
            if shard not in busy
            and (shard in peer.wanted or not nowhere)
            and self._book.count_of(peer_id, shard) < self._wanted(peer, shard)
        ]

    def _due_s(self, peer: PeerDials, shard: int) -> float:
        """When a dial may begin; infinite while one under way has to end first."""
        due_s = max(peer.not_before_s, peer.turn_s.get(shard, -NEVER))
        if peer.under_way and peer.retry.failures:
            return NEVER
        if peer.breaker.state is Circuit.CLOSED or self._book.connected(peer.member.peer_id):
            return due_s
        return NEVER if peer.under_way else max(due_s, peer.breaker.not_before_s)

    def _reschedule(self, peer: PeerDials) -> None:
        if not peer.under_way and not self._book.on_trial(peer.member.peer_id):
            peer.breaker.release()  # the probe, if there was one, has ended without a verdict
        due_s = min((self._due_s(peer, shard) for shard in self._candidates(peer)), default=NEVER)
        if due_s != peer.due_s:
            peer.due_s = due_s
            if due_s != NEVER:
                heapq.heappush(self._queue, (due_s, peer.member.peer_id))
