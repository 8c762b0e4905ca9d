"""The stream pool of one peer: which lanes are open on which sessions, and how a lane is left in order.

    opened    up to stream_pool.min_streams_per_peer always, up to the maximum when the multiplexer asks
    left      a lane that is idle, whose session is replaced, or which the peer has closed: its flows and their queued
              packets are held back until everything sent on it has arrived (a barrier: a ping behind it, answered),
              then they move to other lanes. So no flow is reordered and nothing is lost.
    lost      a lane whose session has ended: flows and queued packets move at once; packets in flight are lost
    outlived  datagrams beside a session that has ended still reach the peer: a carrier without lanes, which has all
              flows until there is a session again (shards/session/alone.py)

Control makes the sessions; the pool only says how many it wants. A session is replaced make-before-break:
the pool asks for one more, and leaves the old one when that is up. The side that dialed a session rotates it and closes
it when it is idle, so that the two nodes do not both do it. The new session may have gone to another shard of the peer,
so leaving takes both sides: the peer goes on until its shard has another session too, and then leaves as well; only
then are streams closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from shards.counters import Counts, Dropping
from shards.flow.flows import Chunk, Flow, unpin
from shards.flow.queues import ReorderBuffer
from shards.peer.carrier import Carrier, DatagramLane, Lane
from shards.peer.choice import Choice, keeps_order
from vpnd.config.live import Live
from vpnd.nat.paths import AROUND
from vpnd.resilience import Retry


def lanes_of(carrier: Carrier) -> list[Lane]:
    """All lanes of a session, that of datagrams too."""
    return [*carrier.lanes] if carrier.beside is None else [*carrier.lanes, carrier.beside]


class PoolHost(Protocol):
    """What a pool needs of its shard."""

    counts: Counts

    def now(self) -> float:
        """Seconds of the shard's monotonic clock."""

    def dispatch(self, chunk: Chunk) -> None:
        """Send records to where their flows go by the end of the batch."""

    def want(self, peer_id: str, sessions: int, urgent: bool) -> None:
        """Tell control how many sessions with the peer are wanted from now on."""

    def uniform(self, low: float, high: float) -> float:
        """A number drawn evenly."""


class StreamPool:
    """Owner: the peer's `Peer`, on the shard's loop. `carriers`: all that are not closed, also those being
    left. `drops`: the peer's."""

    def __init__(
        self, peer_id: str, live: Live, host: PoolHost, drops: Dropping, lost: Callable[[], None]
    ) -> None:
        self.carriers: list[Carrier] = []
        #: sessions the multiplexer wants for the load there is
        self.scaled = live.config.multiplexer.min_sessions
        self._peer_id, self._live, self._host, self._now = peer_id, live, host, host.now
        self._drops = drops
        self._loop = asyncio.get_running_loop()
        #: what flows are held back in, while their lane of this carrier is left
        self._reordering: dict[ReorderBuffer, Carrier] = {}
        self._replacing: set[Carrier] = set()
        self._rotating: set[Carrier] = set()
        #: lanes without flows, of sessions we have left, that wait for the peer to leave as well
        self._empty: set[Lane] = set()
        #: of the sessions there were when one was to be rotated: those the peer dialed, and all
        self._spare = self._present = 0
        self._wanted = 1  # what control takes for granted
        self._doubt = False
        self._retry_settings = live.config.retry
        self._retry = self._new_retry()
        self._lost = lost

    def lanes(self) -> list[Lane]:
        """Those a flow may be pinned to: of healthy sessions that stay, else of sessions that stay, else all."""
        every = [lane for carrier in self.carriers for lane in carrier.lanes if not lane.leaving]
        staying = [lane for lane in every if not lane.carrier.leaving]
        healthy = [lane for lane in staying if not lane.carrier.suspect]
        return healthy or staying or every

    def usable(self) -> list[Carrier]:
        """Sessions that carry packets and are not about to end."""
        return [carrier for carrier in self.carriers if carrier.usable]

    def streams(self) -> int:
        """Open lanes."""
        return sum(len(carrier.lanes) for carrier in self.carriers)

    def held(self) -> int:
        """Packets held back until what went before them has arrived."""
        return sum(buffer.queue.packets for buffer in self._reordering)

    # --- what carriers tell

    def add(self, carrier: Carrier) -> None:
        """A session was handed over. If the peer dialed it, it may have lost the sessions it had: check them."""
        if not carrier.initiator:
            self.look_after()
        self.carriers.append(carrier)

    def look_after(self, doubtful: Carrier | None = None) -> None:
        """Sessions may have ended unnoticed, as one of them seems to have: probe the others."""
        for carrier in self.carriers:
            if carrier is not doubtful:
                carrier.check_alive()

    def lane_ready(self, lane: Lane) -> None:
        """A stream is open. Sessions that were only waiting for their replacement are left."""
        self._host.counts.streams_opened += 1
        self._retry.reset()
        if lane.carrier.leaving:
            self.leave_lane(lane)  # it was opening when the session was left: it goes as the others did
            return
        if lane.carrier.suspect:
            return
        for carrier in self.carriers:
            if carrier.suspect:
                carrier.check_alive()  # there is a way: what waits does not have to wait for the usual deadline
        if self._doubt:
            self._doubt = False
            for carrier in self.carriers:
                if lane.carrier.doubted and not (
                    carrier.doubted or carrier.rank == AROUND or carrier.leaving
                ):
                    self.leave(carrier)  # before flows come that it would cost as much
        for carrier in self._replacing & set(self.carriers):
            if carrier is not lane.carrier and not carrier.leaving and lane.carrier.initiator:
                self.leave(carrier)
        for carrier in self.carriers:
            if carrier.peer_left and not carrier.left and carrier is not lane.carrier:
                self.leave(carrier)
        for carrier in self.carriers:
            if carrier.alone and carrier.beside is not None and not carrier.beside.leaving:
                self._leave_alone(carrier, carrier.beside, lane.carrier)
        for carrier in self.carriers:
            detour = carrier.rank > lane.carrier.rank
            small = carrier.doubted and not (carrier.suspect or lane.carrier.doubted)
            if (
                (detour or small)
                and carrier.initiator
                and not carrier.leaving
                and carrier.opened_s <= lane.carrier.opened_s
            ):
                self.leave(carrier)
        # Both sides may have made a replacement, and one that was under way is no longer needed.
        ours = [carrier for carrier in self.usable() if carrier.initiator and not carrier.suspect]
        for carrier in sorted(ours, key=lambda carrier: not carrier.doubted)[: -self.scaled]:
            self.leave(carrier)

    def lane_closed(self, lane: Lane) -> None:
        """The peer has closed a lane, the session lives: what we sent on it may still be on its way."""
        self._host.counts.streams_closed += 1
        self._empty.discard(lane)
        self.leave_lane(lane)
        self._end_if_left(lane.carrier)
        self._reopen_if_empty(lane.carrier)

    def _reopen_if_empty(self, carrier: Carrier) -> None:
        """If both sides closed their idle lanes at once none is left, and nobody would dial another session."""
        staying = any(not lane.leaving for lane in carrier.lanes)
        if carrier.initiator and not (staying or carrier.opening or carrier.leaving or carrier.closed):
            self._open_again(carrier)

    def lane_failed(self, carrier: Carrier, reason: str) -> None:
        """A stream of ours did not open. Retry with backoff; close the session after retry.max_attempts."""
        self._host.counts.streams_failed += 1
        if carrier.closed or carrier.lanes or carrier.leaving:
            return
        if self._live.config.retry != self._retry_settings:
            self._retry = self._new_retry()
        due_s = self._retry.fail(self._now())
        if due_s is None:
            carrier.close(f"no stream could be opened: {reason}")
        else:
            self._loop.call_later(max(0.0, due_s - self._now()), self._open_again, carrier)

    def _open_again(self, carrier: Carrier) -> None:
        staying = any(not lane.leaving for lane in carrier.lanes)
        if not (staying or carrier.leaving or carrier.closed or carrier.open_lane()):
            self.lane_failed(carrier, "the session takes no more")

    def suspect(self) -> None:
        """A session does not answer: ask for another one before this one ends. New flows go elsewhere; its own flows
        stay until the verdict, for packets in flight may still arrive, and nothing may overtake them."""
        self.tell_wanted(urgent=True)

    def doubt(self) -> None:
        """Large TCP segments seem to get lost in a session: whatever there is, ask for one more, with small ones."""
        self._doubt = True
        self.suspect()

    def peer_leaves(self, carrier: Carrier) -> None:
        """The peer leaves a session, and waits until we do: at once, or as soon as there is another session."""
        for lane in [lane for lane in self._empty if lane.carrier is carrier]:
            self._empty.discard(lane)
            lane.close()
        if carrier.left:
            return
        if any(other.usable and not other.suspect for other in self.carriers if other is not carrier):
            self.leave(carrier)
        else:
            self.tell_wanted(urgent=False)

    def carrier_closed(self, carrier: Carrier) -> None:
        """A session has ended: its flows and queued packets move."""
        if carrier not in self.carriers:
            return
        self._host.counts.streams_closed += len(carrier.lanes)
        self.carriers.remove(carrier)
        self._replacing.discard(carrier)
        self._rotating.discard(carrier)
        self._empty = {lane for lane in self._empty if lane.carrier is not carrier}
        self.abandon(carrier)
        for buffer in [buffer for buffer, of in self._reordering.items() if of is carrier]:
            self._release(buffer, None)
        if not self.carriers:
            self.scaled = self._live.config.multiplexer.min_sessions
            self._retry = self._new_retry()
        self.tell_wanted(urgent=False)
        self._lost()

    # --- leaving

    def abandon(self, carrier: Carrier, flows: set[Flow] | None = None) -> None:
        """Move its flows, or only those given, and their queued packets at once; packets in flight may be lost."""
        for lane in lanes_of(carrier):
            unpin(lane, flows)
        for chunk in carrier.take_queued(flows):
            self._host.dispatch(chunk)

    def drop_waiting(self, reason: str) -> None:
        """Drop all that waits here, under `reason`."""
        for carrier in self.carriers:
            for chunk in carrier.take_queued():
                chunk.drop(self._drops, reason)
        for buffer in self._reordering:
            while buffer.queue:
                buffer.queue.take().drop(self._drops, reason)

    def rotate(self, carrier: Carrier) -> None:
        """Replace a session: ask for another one, leave this one when that is up."""
        if carrier in self._replacing or carrier.leaving:
            return
        self._rotating.add(carrier)
        staying = [other for other in self.usable() if other is not carrier and other not in self._replacing]
        if sum(other.initiator and not other.suspect for other in staying) >= self.scaled:
            self.leave(carrier)  # there were more than are wanted: it needs no replacement
            return
        self._replacing.add(carrier)
        # What the peer has dialed is no replacement: it may be about to rotate that this very moment.
        self._spare = sum(not other.initiator for other in staying)
        self._present = sum(not other.leaving for other in self.carriers)
        self.tell_wanted(urgent=False)

    def leave(self, carrier: Carrier) -> None:
        """End a session without losing anything. Without another one its packets wait."""
        if carrier.closed:
            return
        carrier.go_away()
        if carrier in self._rotating:
            self._rotating.discard(carrier)
            self._host.counts.sessions_rotated += 1
        for lane in lanes_of(carrier):
            self.leave_lane(lane)
        self._loop.call_later(self._live.config.session.drain_timeout, self._end, carrier)

    def leave_lane(self, lane: Lane) -> None:
        """Close a lane without losing or reordering anything: its flows are held back until they can move."""
        if lane.leaving:
            return
        lane.leaving = True
        self._hold(lane.carrier, set(lane.flows), lane)

    def _leave_alone(self, alone: Carrier, lane: Lane, session: Carrier) -> None:
        """There is a session again. The peer may not know yet: what it sends is taken for a while."""
        lane.leaving = True
        self._move(alone, set(lane.flows), session)
        self._loop.call_later(self._live.config.session.drain_timeout, self._end, alone)

    def _hold(
        self, carrier: Carrier, flows: set[Flow], leaving: Lane | None, asked: Carrier | None = None
    ) -> None:
        """Hold flows back until what they sent over the carrier has arrived; then close the lane that is left. `asked`:
        the session whose answer says so, if it is another one."""
        buffer = ReorderBuffer(self._live, self._drops, self._now)
        for chunk in carrier.take_queued(flows):
            buffer.hold(chunk)
        for flow in flows:
            flow.pin(buffer)
        asked = asked or carrier
        self._reordering[buffer] = asked
        asked.barrier(lambda _: self._release(buffer, leaving))
        self._loop.call_later(self._live.config.session.drain_timeout, self._release, buffer, leaving)

    # --- datagrams beside sessions

    def datagrams(self) -> Lane | None:
        """Where a flow may go that keeps no order: beside a session that stays, if there is such a lane."""
        for carrier in self.carriers:
            lane = carrier.beside
            if lane is not None and lane.usable and not lane.leaving and not carrier.leaving:
                return lane
        return None

    def datagrams_changed(self, carrier: Carrier, choice: Choice) -> None:
        """Datagrams beside a session can be used from now on, or not any more: flows move, those that must keep their
        order as soon as what they have sent has arrived. A datagram that has not by the time a stream has been asked
        and has answered is lost."""
        lane = carrier.beside
        if lane is not None and lane.usable:
            if self.datagrams() is None:  # its session is left
                return
            for other in self.carriers:
                self._move(other, {f for each in other.lanes for f in each.flows if choice.datagrams(f.key)})
        elif lane is not None:
            self._move(carrier, set(lane.flows))

    def _move(self, carrier: Carrier, flows: set[Flow], asked: Carrier | None = None) -> None:
        ordered = {flow for flow in flows if keeps_order(flow.key)}
        if (asked or carrier).alone:  # it has nobody to ask
            ordered.clear()
        self.abandon(carrier, flows - ordered)
        if ordered:
            self._hold(carrier, ordered, None, asked)

    def _release(self, buffer: ReorderBuffer, lane: Lane | None) -> None:
        """Everything sent on the lane has arrived, or never will: its flows move."""
        carrier = self._reordering.pop(buffer, None)
        if carrier is None:
            return
        unpin(buffer)
        buffer.empty(self._host.dispatch)
        if lane is not None and not lane.closed:
            if carrier.left and not carrier.peer_left:
                self._empty.add(lane)
            else:
                lane.close()
        self._end_if_left(carrier)

    def _end_if_left(self, carrier: Carrier) -> None:
        """Close a session that is being left once no lane and no held packet of it is left."""
        if carrier.leaving and not carrier.lanes and carrier not in self._reordering.values():
            self._end(carrier)

    def _end(self, carrier: Carrier) -> None:
        if not carrier.closed:
            carrier.close("replaced", failed=False, polite=True)

    # --- time

    def tell_wanted(self, *, urgent: bool) -> None:
        """Tell control how many sessions are wanted: for the load, and one for each that is to be replaced."""
        leaving = sum(
            1 for carrier in self.carriers if carrier in self._replacing or carrier.leaving or carrier.suspect
        )
        multiplexer = self._live.config.multiplexer
        self.scaled = min(max(self.scaled, multiplexer.min_sessions), multiplexer.max_sessions)
        wanted = self.scaled + leaving
        if self._doubt:
            wanted = max(wanted, len(self.carriers) + 1)
        if any(not carrier.leaving for carrier in self._replacing):
            wanted = max(wanted, min(wanted + self._spare, self._present + 1))
        if wanted != self._wanted or urgent:
            self._wanted = wanted
            self._host.want(self._peer_id, wanted, urgent)

    def repeat_wanted(self) -> None:
        """Control has restarted, and assumes that one session is wanted."""
        self._wanted = 1
        self.tell_wanted(urgent=False)

    def maintain(self, now_s: float) -> None:
        """Open what is missing, close what is idle, replace what is old. Every stream_pool.cleanup_interval."""
        config = self._live.config
        before_s = now_s - config.stream_pool.idle_timeout
        for carrier in self.usable():
            if carrier.initiator and self._due_for_rotation(carrier, now_s):
                self.rotate(carrier)
        idle = [lane for lane in self.lanes() if lane.idle_since(now_s) <= before_s]
        spare = len(self.lanes()) - config.stream_pool.min_streams_per_peer
        for lane in idle:
            staying = sum(not other.leaving for other in lane.carrier.lanes)
            if spare > 0 and lane.ours and staying > 1:
                self.leave_lane(lane)
                spare -= 1
        usable = self.usable()
        # the multiplexer lets go first: what it still wants would only be dialed again
        for carrier in usable[self.scaled :]:
            lanes = carrier.lanes
            if carrier.initiator and spare > 0 and all(lane in idle and not lane.leaving for lane in lanes):
                self.leave(carrier)
                spare -= len(lanes)
        self.fill()
        for carrier in list(self.carriers):
            if carrier.alone and carrier.beside is not None:
                self._maintain_alone(carrier, carrier.beside, now_s)
        self.tell_wanted(urgent=False)  # a suspect may have recovered, the limits may be others

    def _maintain_alone(self, alone: Carrier, lane: DatagramLane, now_s: float) -> None:
        """Datagrams that have outlived their session are no substitute for one."""
        session = self._live.config.session
        if lane.silent_s(now_s) >= session.user_timeout or now_s - alone.opened_s >= session.max_age:
            alone.close("silent, or too old")
        elif not (lanes := self.lanes()):
            self.tell_wanted(urgent=True)
        elif not lane.leaving and not lanes[0].carrier.suspect:
            self._leave_alone(alone, lane, lanes[0].carrier)

    def fill(self) -> None:
        """Open streams up to the minimum, on sessions this side dialed, so that the two sides do not both do it."""
        carriers = [carrier for carrier in self.usable() if carrier.initiator]
        missing = self._live.config.stream_pool.min_streams_per_peer - self.streams()
        missing -= sum(carrier.opening for carrier in self.carriers)
        for _ in range(max(0, missing if carriers else 0)):
            self.open_one(carriers)

    def open_one(self, carriers: list[Carrier]) -> bool:
        """Open one more stream, on the session with the fewest."""
        return min(carriers, key=lambda carrier: len(carrier.lanes) + carrier.opening).open_lane()

    def _due_for_rotation(self, carrier: Carrier, now_s: float) -> bool:
        session, traffic = self._live.config.session, carrier.traffic()
        carried = max(traffic.bytes_sent, traffic.bytes_received)
        return now_s - carrier.opened_s >= session.max_age or carried >= session.max_bytes

    def _new_retry(self) -> Retry:
        retry = self._retry_settings = self._live.config.retry
        return Retry.by(retry, self._host.uniform)
