"""The stream pool of one peer: which lanes are open on which sessions, and how one is left without harm.

    opened    up to stream_pool.min_streams_per_peer always, up to the maximum when the multiplexer asks
    left      a lane that is idle, whose session is replaced, or which the peer has closed: its flows and what
              waits of them are held back until everything sent on it has arrived (a barrier: a ping behind
              it, answered), then they find other lanes. So a flow is never reordered and nothing is lost.
    lost      a lane whose session is gone: flows and what waits find other lanes at once; what was on its way
    is lost

Sessions are made by control; the pool only says how many it wants. A session is replaced make-before-break:
one more is wanted, and when it is there the old one is left. Who dialed a session rotates it and closes it
when it is idle, so that both nodes do not do it twice. The new one may have gone to another shard of the peer,
so leaving takes both: the peer goes on until its shard has another way too, and says so by leaving as well;
only then are streams closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from shards.flow.flows import Chunk, Flow, unpin
from shards.flow.queues import Holding
from vpnd.config.live import Live
from vpnd.resilience.backoff import Backoff
from vpnd.resilience.retry import Retry

if TYPE_CHECKING:
    from shards.session.lane import Lane
    from shards.session.link import Link


class PoolCounts:
    """Of all pools of a shard together."""

    def __init__(self) -> None:
        self.opened = self.closed = self.failed = self.acquired = self.rotated = 0


class PoolHost(Protocol):
    """What a pool needs of its shard."""

    counts: PoolCounts

    def dispatch(self, chunk: Chunk) -> None:
        """Records find their flows' sinks anew."""

    def want(self, peer_id: str, sessions: int, urgent: bool) -> None:
        """So many sessions with the peer are wanted from now on."""

    def uniform(self, low: float, high: float) -> float:
        """A number drawn evenly."""


class StreamPool:
    """Owner: the peer's `Peer`, on the shard's loop. `links`: all that are not closed, also those being
    left."""

    def __init__(
        self,
        peer_id: str,
        live: Live,
        host: PoolHost,
        drops: dict[str, int],
        now: Callable[[], float],
        lost: Callable[[], None],
    ) -> None:
        self.links: list[Link] = []
        #: sessions the multiplexer wants for the load there is
        self.scaled = live.config.multiplexer.min_sessions
        self._peer_id, self._live, self._host, self._drops, self._now = peer_id, live, host, drops, now
        self._loop = asyncio.get_running_loop()
        self._holdings: dict[Holding, Link] = {}
        self._replacing: set[Link] = set()
        self._rotating: set[Link] = set()
        #: lanes without flows, of sessions we have left, that wait for the peer to leave as well
        self._empty: set[Lane] = set()
        #: of the sessions there were when one was to be rotated: those the peer dialed, and all
        self._spare = self._present = 0
        self._wanted = 1  # what control takes for granted
        self._retry_settings = live.config.retry
        self._retry = self._new_retry()
        self._lost = lost

    def lanes(self) -> list[Lane]:
        """Those a flow may be pinned to, best first: of healthy sessions that stay; else of any that is
        open."""
        every = [lane for link in self.links for lane in link.lanes.values() if not lane.leaving]
        staying = [lane for lane in every if not lane.link.leaving]
        healthy = [lane for lane in staying if not lane.link.vitals.suspect]
        return healthy or staying or every

    def usable(self) -> list[Link]:
        """Sessions that carry packets and are not about to end."""
        return [link for link in self.links if link.usable]

    def streams(self) -> int:
        """Open lanes."""
        return sum(len(link.lanes) for link in self.links)

    def held(self) -> int:
        """Packets held back until what went before them has arrived."""
        return sum(holding.queue.packets for holding in self._holdings)

    # --- what links tell

    def add(self, link: Link) -> None:
        """A session was handed over. If the peer made it, it may have lost those it had: look after them."""
        if not link.initiator:
            self.look_after()
        self.links.append(link)

    def look_after(self) -> None:
        """Sessions may have ended without a word: find out."""
        for link in self.links:
            link.vitals.hurry()

    def lane_ready(self, lane: Lane) -> None:
        """A stream is open. What was only waiting for a way out takes it."""
        self._host.counts.opened += 1
        self._retry.reset()
        if lane.link.leaving:
            self._leave_lane(lane)  # it was opening when the session was left: it goes as the others did
            return
        if lane.link.vitals.suspect:
            return
        for link in self._replacing & set(self.links):
            if link is not lane.link and not link.leaving and lane.link.initiator:
                self.leave(link)
        for link in self.links:
            if link.peer_left and not link.left and link is not lane.link:
                self.leave(link)
        # Both sides may have made a replacement, and one that was under way is no longer needed.
        ours = [link for link in self.usable() if link.initiator and not link.vitals.suspect]
        for link in ours[: -self.scaled]:
            self.leave(link)

    def lane_closed(self, lane: Lane) -> None:
        """The peer has closed a lane, the session lives: what we sent on it may still be on its way."""
        self._host.counts.closed += 1
        self._empty.discard(lane)
        self._leave_lane(lane)
        self._end_if_left(lane.link)
        self._keep_way(lane.link)

    def _keep_way(self, link: Link) -> None:
        """Both sides may close their idle lanes at once and leave none: a session without one is of no use, and
        nobody would dial another."""
        staying = any(not lane.leaving for lane in link.lanes.values())
        if link.initiator and not (staying or link.opening or link.leaving or link.closed):
            self._open_again(link)

    def stream_failed(self, link: Link) -> None:
        """A stream of ours did not open. Try again, later and later; give the session up in the end."""
        self._host.counts.failed += 1
        if link.closed or link.lanes or link.leaving:
            return
        if self._live.config.retry != self._retry_settings:
            self._retry = self._new_retry()
        due_s = self._retry.fail(self._now())
        if due_s is None:
            link.close("no stream could be opened")
        else:
            self._loop.call_later(max(0.0, due_s - self._now()), self._open_again, link)

    def _open_again(self, link: Link) -> None:
        staying = any(not lane.leaving for lane in link.lanes.values())
        if not (staying or link.leaving or link.closed or link.open_stream()):
            self.stream_failed(link)

    def suspect(self, link: Link) -> None:
        """A session does not answer: make another one before this one breaks. New flows go elsewhere; those it has wait
        for the verdict, for if it is only slow, what is on its way arrives, and nothing may overtake it."""
        self.tell_wanted(urgent=True)

    def peer_leaves(self, link: Link) -> None:
        """The peer wants to end a session, and waits until we do: at once, or as soon as there is another way."""
        for lane in [lane for lane in self._empty if lane.link is link]:
            self._empty.discard(lane)
            link.close_lane(lane)
        if link.left:
            return
        if any(other.usable and not other.vitals.suspect for other in self.links if other is not link):
            self.leave(link)
        else:
            self.tell_wanted(urgent=False)

    def link_closed(self, link: Link) -> None:
        """A session is gone."""
        if link not in self.links:
            return
        self._host.counts.closed += len(link.lanes)
        self.links.remove(link)
        self._replacing.discard(link)
        self._rotating.discard(link)
        self._empty = {lane for lane in self._empty if lane.link is not link}
        self.abandon(link)
        for holding in [holding for holding, of in self._holdings.items() if of is link]:
            self._release(holding, None)
        if not self.links:
            self.scaled = self._live.config.multiplexer.min_sessions
            self._retry = self._new_retry()
        self.tell_wanted(urgent=False)
        self._lost()

    # --- leaving

    def abandon(self, link: Link, flows: set[Flow] | None = None) -> None:
        """Its flows, or only those given, and what waits of them go elsewhere at once; what is on its way may
        be lost."""
        chunks = link.queue.take_all(flows)
        for lane in link.lanes.values():
            unpin(lane, flows)
        for chunk in chunks:
            self._host.dispatch(chunk)

    def drop_waiting(self, reason: str) -> None:
        """Nobody will come for what waits here."""
        for link in self.links:
            self._drops[reason] += sum(chunk.packets for chunk in link.queue.take_all())
        for holding in self._holdings:
            while holding.queue:
                self._drops[reason] += holding.queue.take().packets

    def rotate(self, link: Link) -> None:
        """Replace a session that has served long enough: wait for another one, then leave this one."""
        if link in self._replacing or link.leaving:
            return
        self._rotating.add(link)
        staying = [other for other in self.usable() if other is not link and other not in self._replacing]
        if sum(other.initiator and not other.vitals.suspect for other in staying) >= self.scaled:
            self.leave(link)  # there were more than are wanted: it needs no replacement
            return
        self._replacing.add(link)
        # What the peer has dialed is no replacement: it may be about to rotate that this very moment.
        self._spare = sum(not other.initiator for other in staying)
        self._present = sum(not other.leaving for other in self.links)
        self.tell_wanted(urgent=False)

    def leave(self, link: Link) -> None:
        """End a session without losing anything; there must be others, or packets wait."""
        link.go_away()
        if link in self._rotating:
            self._rotating.discard(link)
            self._host.counts.rotated += 1
        for lane in list(link.lanes.values()):
            self._leave_lane(lane)
        self._loop.call_later(self._live.config.session.drain_timeout, self._end, link)

    def close_idle(self, lane: Lane) -> None:
        """Close a lane nobody uses."""
        self._leave_lane(lane)

    def _leave_lane(self, lane: Lane) -> None:
        if lane.leaving:
            return
        lane.leaving = True
        link = lane.link
        holding = Holding(self._live, self._drops, self._now)
        for chunk in link.queue.take_all(lane.flows):
            holding.hold(chunk)
        for flow in list(lane.flows):
            flow.pin(holding)
        self._holdings[holding] = link
        if link.closed:
            self._release(holding, lane)
            return
        link.barrier(lambda _: self._release(holding, lane))
        self._loop.call_later(self._live.config.session.drain_timeout, self._release, holding, lane)

    def _release(self, holding: Holding, lane: Lane | None) -> None:
        """Everything has arrived, or nothing more will: the flows go on elsewhere."""
        link = self._holdings.pop(holding, None)
        if link is None:
            return
        unpin(holding)
        holding.empty(self._host.dispatch)
        if lane is not None and not lane.closed:
            if link.left and not link.peer_left:
                self._empty.add(lane)
            else:
                link.close_lane(lane)
        self._end_if_left(link)

    def _end_if_left(self, link: Link) -> None:
        """The last one to need the session closes it: the side that was told of its end, when nothing is left
        on it."""
        if link.leaving and not link.lanes and link not in self._holdings.values():
            self._end(link)

    def _end(self, link: Link) -> None:
        if not link.closed:
            link.close("replaced", failed=False, polite=True)

    # --- time

    def tell_wanted(self, *, urgent: bool) -> None:
        """Say how many sessions are wanted: for the load, and one for each that is about to be replaced."""
        leaving = sum(
            1 for link in self.links if link in self._replacing or link.leaving or link.vitals.suspect
        )
        multiplexer = self._live.config.multiplexer
        self.scaled = min(max(self.scaled, multiplexer.min_sessions), multiplexer.max_sessions)
        wanted = self.scaled + leaving
        if any(not link.leaving for link in self._replacing):
            wanted = max(wanted, min(wanted + self._spare, self._present + 1))
        if wanted != self._wanted or urgent:
            self._wanted = wanted
            self._host.want(self._peer_id, wanted, urgent)

    def repeat_wanted(self) -> None:
        """Control has started anew and takes one session for granted."""
        self._wanted = 1
        self.tell_wanted(urgent=False)

    def clean(self, now_s: float) -> None:
        """Open what is missing, close what is idle, replace what is old. Every stream_pool.cleanup_interval."""
        config = self._live.config
        before_s = now_s - config.stream_pool.idle_timeout
        for link in self.usable():
            if link.initiator and self._worn(link, now_s):
                self.rotate(link)
        idle = [lane for lane in self.lanes() if lane.idle_since(now_s) <= before_s]
        spare = len(self.lanes()) - config.stream_pool.min_streams_per_peer
        for lane in idle:
            staying = sum(not other.leaving for other in lane.link.lanes.values())
            if spare > 0 and lane.stream.ours and staying > 1:
                self.close_idle(lane)
                spare -= 1
        usable = self.usable()
        # the multiplexer lets go first: what it still wants would only be dialed again
        for link in usable[self.scaled :]:
            lanes = link.lanes.values()
            if link.initiator and spare > 0 and all(lane in idle and not lane.leaving for lane in lanes):
                self.leave(link)
                spare -= len(lanes)
        self.fill()
        self.tell_wanted(urgent=False)  # a suspect may have recovered, the limits may be others

    def fill(self) -> None:
        """Open streams up to the minimum; only who dialed a session opens them there, so that both do not."""
        links = [link for link in self.usable() if link.initiator]
        missing = self._live.config.stream_pool.min_streams_per_peer - self.streams()
        missing -= sum(link.opening for link in self.links)
        for _ in range(max(0, missing if links else 0)):
            self.open_one(links)

    def open_one(self, links: list[Link]) -> bool:
        """One stream more, on the session with the fewest."""
        return min(links, key=lambda link: len(link.lanes) + link.opening).open_stream()

    def _worn(self, link: Link, now_s: float) -> bool:
        session = self._live.config.session
        carried = max(link.bytes_sent, link.received()[1])
        return now_s - link.opened_s >= session.max_age or carried >= session.max_bytes

    def _new_retry(self) -> Retry:
        retry = self._retry_settings = self._live.config.retry
        backoff = Backoff(retry.initial_interval, retry.max_interval, retry.multiplier, self._host.uniform)
        return Retry(backoff, retry.max_attempts)
