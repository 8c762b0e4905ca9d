"""A link: one session with its transport, on the asyncio loop, without a task or an await; and its lanes.

The transport's side of stages 4 and 5: `send` seals a span, `flush` writes what is sealed, `_read` decrypts and hands
on.

    opening ── first stream ready ──▶ up ── go-away, or being replaced ──▶ leaving ──▶ closed
       └──────────────────────────────┴───── transport ends, protocol broken, no sign of life ──▶ closed

Closing only marks: whatever finds the end, in the middle of a batch of packets or of events, `LinkEvents.link_closed`
comes behind it (`Outbound.after_batch`), and what is submitted to a closed lane until then goes back to `Outbound`.

Back-pressure. Out: sealed bytes wait only for a transport that is full; as long as it is, or the peer's window is shut,
packets wait unsealed in a fair queue (shards/flow/fair.py): a slow peer costs the ring nothing, and a small flow does
not wait for a large one. In: what was read goes into the TUN at once; a shard that is too slow reads its sockets late.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from typing import Protocol

from shards.counters import Traffic, sent
from shards.flow.fair import FairQueue
from shards.flow.flows import SPAN_BYTES, STAY, Chunk, Flow
from shards.inbound import Reassembly, received
from shards.session.alone import Alone
from shards.session.beside import DatagramLane
from shards.session.health import HealthTimer, Proof, SegmentWatch, Verdict
from shards.session.surroundings import Delivery, Fit, Remote, Surroundings
from shards.session.transport import Transport
from shards.stream.events import Data, GoneAway, Pong, StreamClosed, StreamReady, WindowOpened
from shards.stream.negotiate import Beside
from shards.stream.session import Session
from shards.stream.spec import MAX_FRAME_PAYLOAD_BYTES
from shards.stream.yamux import Stream
from vpnd.errors import FloodError, LocalProtocolError, RemoteProtocolError
from vpnd.nat.paths import Path
from vpnd.packet.offload import fit_span
from vpnd.packet.record import PACKET_OFFSET, survey


class LinkEvents(Protocol):
    """What a link tells. Never within a batch of outgoing packets."""

    def lane_ready(self, lane: StreamLane) -> None:
        """Packets can be sent over it."""

    def lane_closed(self, lane: StreamLane) -> None:
        """The peer has closed it while the session lives: its flows are still pinned to it."""

    def lane_failed(self, link: Link, reason: str) -> None:
        """A stream that this side opened did not come to be."""

    def link_leaving(self, link: Link) -> None:
        """The peer takes no new streams: it means to end the session."""

    def link_suspect(self, link: Link) -> None:
        """A probe was not answered in time."""

    def link_stuck(self, link: Link) -> None:
        """Its large TCP segments, or the peer's, seem not to arrive."""

    def link_in_doubt(self, link: Link) -> None:
        """It seems to carry nothing, while datagrams beside it reach the peer."""

    def link_recovered(self, link: Link) -> None:
        """It was suspect, and something was heard."""

    def datagrams_changed(self, carrier: Link | Alone) -> None:
        """Its lane of datagrams may be used from now on, or not any more."""

    def link_closed(self, link: Link, reason: str, failed: bool) -> None:
        """It has ended; its flows and its queue are to find other places. Once, and the last event."""


class StreamLane:
    """One open stream of a link, as flows see it: a Lane. Owner: its link.

    Both nodes pin flows to it, whoever opened the stream. `fit` makes of a span what the peer takes, if that is less
    than our TUN gives (see fit_span). `reassembly`: what the peer sends on the stream.
    """

    __slots__ = (
        "active_s", "carrier", "closed", "fit", "flows", "holding", "leaving", "most_bytes", "movable_before_s",
        "ours", "packets_sent", "reassembly", "seen_packets", "stream",
    )  # fmt: skip

    def __init__(self, link: Link, stream: Stream, fit: Fit | None, now_s: float) -> None:
        self.carrier, self.stream, self.ours, self.fit = link, stream, stream.ours, fit
        self.flows: set[Flow] = set()
        self.movable_before_s = STAY
        self.most_bytes = min(link.most_bytes, stream.send_window) if fit is None else SPAN_BYTES
        self.reassembly = Reassembly(link.peer.budget, link.peer.drops)
        self.closed = self.leaving = self.holding = False
        self.packets_sent = self.seen_packets = 0
        self.active_s = now_s  # when `idle_since` last saw traffic

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        self.carrier.send(self, buffer, start, end, packets)

    def flush(self) -> None:
        self.carrier.flush()

    def close(self) -> None:
        self.carrier.close_lane(self)

    def idle_since(self, now_s: float) -> float:
        packets = self.packets_sent + self.reassembly.packets
        if packets != self.seen_packets or self.flows:
            self.seen_packets, self.active_s = packets, now_s
        return self.active_s


class Link:
    """One session: a Carrier. Owner: shard loop. After `close` it may be read, and told anything without harm."""

    def __init__(
        self,
        transport: Transport,
        session: Session,
        session_id: int,
        initiator: bool,
        peer: Remote,
        events: LinkEvents,
        common: Surroundings,
        path: Path,
        make_beside: Callable[[Link, Beside, Fit | None], DatagramLane[Link | Alone]] | None = None,
        prove: bool = False,
    ) -> None:
        """`path`: how it reaches the peer. `make_beside`: of what the peer says of datagrams and what fits it, if this
        node takes any. `prove`: see that large segments arrive before packets are sent."""
        self.session_id, self.initiator, self.peer, self.path = session_id, initiator, peer, path
        self.now, self.queue = common.now, FairQueue(common.live, peer.drops)
        self.lanes: list[StreamLane] = []
        self.beside: DatagramLane[Link | Alone] | None = None
        self.rtt_s: float | None = None
        self.closed = self.left = self.peer_left = self.alone = False
        self.packets_sent = self.segments_sent = self.bytes_sent = 0
        self.opened_s = self.heard_s = self.now()
        self.health = HealthTimer(common.live, self, self._on_verdict)
        self._waited = 0  # packets that had to wait in the queue, of packets_sent
        self._seen_sent = self._seen_waited = 0  # both when `least_delay_s` was asked last
        self._segments, self._proof, self._prove = SegmentWatch(common.live), Proof(common.live), prove
        self._small_bytes = common.live.config.session.small_segment
        self._seen_by_look, self._in_flight = 0, False  # of `look_for_stuck`
        self._ended = Traffic()  # received on lanes that are gone
        self.transport, self._events, self._loop = transport, events, asyncio.get_running_loop()
        self._session, self.rest, self.most_bytes = session, session.rest, session.most_bytes
        self._outbound, self._counts = common.outbound, common.counts
        self._rtts, self._delays = common.counts.times["rtt"], common.counts.times["queue_delay"]
        self._inbound: Delivery = common.inbound
        self._hello, self._batch_done, self._make_beside = common.hello, common.batch_done, make_beside
        self._opening: set[Stream] = set()
        self._barriers: dict[int, tuple[float, Callable[[float], None]]] = {}
        self._undelivered: Data | None = None  # too much for a turn; the engine waits for it
        self._behind = False  # there is more than the peer may use of one turn
        self._full = self._holds = False  # it takes no more for now, or, closed, for ever; is to get no more
        self._unchecked, self._most_unsent = 0, common.live.config.session.not_sent_lowat_bytes
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0

    @property
    def rank(self) -> int:
        return self.path.rank

    def start(self) -> None:
        """Watch the transport; the initiator opens a stream. Events come from the next turn of the loop on."""
        self.transport.watch(functools.partial(self._run, self._read))
        if self.initiator and self._prove and self.segment_bytes() > self._small_bytes:
            self._proof.begin(self._session.ping, self.segment_bytes(), self.now())
        elif self.initiator:
            self.open_lane()
        self._session.ping(self.now())
        self.health.start()
        self._loop.call_soon(self._run, self._take_events)

    # --- out: stage 4

    def send(self, lane: StreamLane, buffer: memoryview, start: int, end: int, packets: int) -> None:
        """Seal the records in buffer[start:end], or queue them by flow; closed, give them back. `flush` ends a batch.

        borrowed: `buffer`, until this returns; SCRATCH bytes in front of `start` are overwritten.
        """
        if self._full or self.queue.packets or not self._seal(lane, buffer, start, end, packets):
            if self.closed:
                self._outbound.dispatch(Chunk(buffer, start, end, packets, self.now()))
            else:
                self.queue.put_span(self._outbound.flows, lane, buffer, start, end, self.now())
                self._send_queue()  # a part of a span may fit

    def _seal(self, lane: StreamLane, buffer: memoryview, start: int, end: int, packets: int) -> bool:
        session, stream = self._session, lane.stream
        size = end - start - packets * PACKET_OFFSET
        (whole, ends), unfit = survey(buffer, start, end, packets, MAX_FRAME_PAYLOAD_BYTES), 0
        if lane.fit is not None:  # here, and not before it waits: a record that was cut counts as one
            buffer, start, end, unfit = lane.fit(buffer, start, end)
            ends = [*range(start + MAX_FRAME_PAYLOAD_BYTES, end, MAX_FRAME_PAYLOAD_BYTES), end]
        if start < end and not session.send(stream, buffer, start, ends):
            self.flush()
            if self.closed or not session.send(stream, buffer, start, ends):
                return False
        counts = self._counts
        if unfit:
            self.peer.drops.plain("too_big", unfit)
            packets -= unfit
        lane.packets_sent += packets
        self.packets_sent += packets
        self.segments_sent += whole - unfit
        self.bytes_sent += size
        counts.packets_sent += packets
        counts.segments_sent += whole - unfit
        counts.bytes_sent += size
        return True

    def flush(self) -> None:
        """Write what is sealed; the rest when the transport takes more."""
        if self.closed:
            return
        try:
            view: memoryview | None = self._session.data_to_send()
            while view:
                count = self.transport.send(view)
                self._unchecked += count
                view = self._session.data_sent(count)
        except BlockingIOError:
            self._wait_writable()
        except OSError as error:
            self.close(f"send: {os.strerror(error.errno or 0)}", failed=not self.leaving, lasts=True)
            return
        if self._unchecked >= self._most_unsent:
            # A socket takes more than TCP_NOTSENT_LOWAT in one call, which would wait there and not in the fair queue.
            self._unchecked = 0
            if not self._full and self.transport.unsent() > self._most_unsent:
                self._wait_writable()

    def _wait_writable(self) -> None:
        if not self._full:
            self._full = True
            self.transport.wait_writable(functools.partial(self._run, self._on_writable))

    def _on_writable(self) -> None:
        self._full = self._holds
        self.flush()
        self._send_queue()

    def _send_queue(self) -> None:
        """Seal what waits, as long as the transport and the peer's windows take it."""
        queue = self.queue
        if not queue.packets:
            return
        now_s, waited = self.now(), self._waited
        while not self._full and (flow := queue.first(now_s)) is not None:
            lane, chunk = flow.sink, flow.backlog.chunks[0]  # type: ignore[union-attr]
            assert isinstance(lane, StreamLane)  # what waits here is pinned to a lane of this link
            if self._seal(lane, chunk.buffer, chunk.start, chunk.end, chunk.packets):
                queue.sent(flow, now_s)
                flow.last_s = now_s
                self._waited += chunk.packets
                if len(self._session.data_to_send()) >= self._most_unsent:
                    self.flush()
            elif not self._full:
                queue.block(flow)
        if self._waited != waited:
            self._delays.add(queue.delay_s)
        self.flush()

    # --- in: stage 5

    def _read(self) -> None:
        """One read, and everything that is whole in it, as far as the peer's turn goes."""
        if self._behind:
            return
        session = self._session
        try:
            count = self.transport.recv_into(session.receive_buffer())
        except BlockingIOError:
            return
        except OSError as error:
            # The end of a session that is being left may come as a reset: the peer had not read our last pings.
            self.close(f"receive: {os.strerror(error.errno or 0)}", failed=not self.leaving, lasts=True)
            return
        if not count:
            self.close("closed by the peer", failed=not self.leaving)
            return
        session.received(count)
        self._take_events()
        if self.health.health.failures and not self.closed:
            self.health.check()

    def _take_events(self) -> None:
        session, budget, sources = self._session, self.peer.budget, self.peer.sources
        next_event, deliver = session.next_event, self._inbound.deliver_untrusted
        self.heard_s = now_s = self.now()
        session.budget = budget.turn(now_s)
        event, self._undelivered = self._undelivered or next_event(now_s), None
        while event is not None:
            if type(event) is Data:
                stream, view = event.stream, event.view
                reached, records = deliver(sources, stream.context, view, session.budget)
                session.budget -= records
                session.consumed(stream, reached)
                if reached < len(view):
                    self._undelivered = Data(stream, view[reached:], event.last)
                if event.last or self._undelivered is not None:
                    break
            else:
                self._on_event(event)
                if self.closed:
                    return
            event = next_event(now_s)
        budget.left = session.budget
        if session.budget <= 0 and not self._behind:
            self._behind = True
            budget.wait(functools.partial(self._run, self._go_on))
        self._batch_done()
        if session.data_to_send():
            self.flush()
        if session.timed or self._timer is not None:
            self._arm(now_s)

    def _go_on(self) -> None:
        self._behind = False
        self._take_events()

    def _on_event(self, event: object) -> None:
        match event:
            case StreamReady(stream=stream, hello=hello, beside=beside):
                fits = hello.offloads & self._hello.offloads == self._hello.offloads
                fits = fits and hello.max_record >= self._hello.max_record
                fit = None if fits else functools.partial(fit_span, capabilities=hello)
                lane = self._add_lane(stream, fit)
                stream.context = lane.reassembly
                if beside.receiver and self._make_beside is not None:
                    self.beside = self._make_beside(self, beside, fit)
            case WindowOpened():
                self.queue.unblock()
                self._send_queue()
            case Pong(value=value) if self._proof.answered(value):
                if not self._proof.under_way:
                    self.open_lane()
            case Pong(value=value, rtt_s=rtt_s):
                self.rtt_s = rtt_s
                self._rtts.add(rtt_s)
                self.peer.rtts.add(rtt_s)
                if value in self._barriers:
                    sent_s, then = self._barriers.pop(value)
                    then(sent_s)
            case StreamClosed(stream=stream, reason=reason):
                self._remove_lane(stream, reason)
            case GoneAway() if fault := event.fault():
                self.close(f"the peer gives up: {fault}")
            case GoneAway():
                self.peer_left = True
                self._events.link_leaving(self)

    # --- streams and order

    def _add_lane(self, stream: Stream, fit: Fit | None) -> StreamLane:
        self._opening.discard(stream)
        lane = StreamLane(self, stream, fit, self.now())
        self.lanes.append(lane)
        self._events.lane_ready(lane)
        return lane

    def _remove_lane(self, stream: Stream, reason: str) -> None:
        self._opening.discard(stream)
        lane = next((lane for lane in self.lanes if lane.stream is stream), None)
        if lane is None:
            self._events.lane_failed(self, reason)
            return
        self.lanes.remove(lane)
        lane.closed = True
        self._no_more_of(lane.reassembly)
        self._events.lane_closed(lane)

    def _no_more_of(self, reassembly: Reassembly) -> None:
        self._ended = self._ended.plus(received(reassembly))
        reassembly.take()

    def open_lane(self, beside: Beside | None = None) -> bool:
        try:
            stream = self._session.open_stream(self.now(), beside)
        except LocalProtocolError:
            return False
        self._opening.add(stream)
        self._flush_soon()
        return True

    def close_lane(self, lane: StreamLane) -> None:
        if not self.closed:
            self._session.close_stream(lane.stream)
            self._arm(self.now())
            self._flush_soon()

    def go_away(self) -> None:
        if not self.closed:
            self.left = True
            self._session.go_away()
            self._flush_soon()

    def barrier(self, then: Callable[[float], None]) -> None:
        if not self.closed:
            now_s = self.now()
            self._barriers[self._session.ping(now_s)] = now_s, then
            self._flush_soon()

    def _flush_soon(self) -> None:
        """Flush when what runs now, maybe in the middle of a batch, is done; take what happened within."""
        if not self.closed:
            self._loop.call_soon(self._run, self._take_local_events)

    def _take_local_events(self) -> None:
        heard_s = self.heard_s
        self._take_events()
        self.heard_s = heard_s  # nothing came from the peer

    # --- time and end

    def _run(self, step: Callable[[], None]) -> None:
        """One step of work on peer's bytes: what it may raise ends the session, not the shard."""
        if self.closed:
            return
        try:
            step()
        except RemoteProtocolError as error:
            self.fail(error)

    def fail(self, error: RemoteProtocolError) -> None:
        """The peer has broken the protocol, in the session or beside it."""
        if self.closed:
            return
        self._counts.session_errors += 1
        self._counts.session_floods += isinstance(error, FloodError)
        self._send_last_words()  # a go-away that says so
        self.close(f"protocol error: {error}")

    def _send_last_words(self) -> None:
        try:
            self.transport.send(self._session.data_to_send())
        except OSError:
            pass  # the peer sees the connection end, which says nearly the same

    def _arm(self, now_s: float) -> None:
        due_s = self._session.next_timer_s()
        if self._timer is not None:
            if due_s is not None and self._timer_due_s <= due_s:
                return
            self._timer.cancel()
            self._timer = None
        if due_s is not None and not self.closed:
            self._timer_due_s = due_s
            self._timer = self._loop.call_later(max(0.0, due_s - now_s), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if not self.closed:
            self._session.handle_timer(self.now())
            self._run(self._take_local_events)

    def _on_verdict(self, verdict: Verdict) -> None:
        match verdict:
            case Verdict.PROBE:
                self._probe()
            case Verdict.SUSPECT:
                self._counts.health_failures += 1
                self.look_for_stuck()  # before another session is asked for
                self._probe()
                self._events.link_suspect(self)
            case Verdict.RECOVERED:
                self._events.link_recovered(self)
            case Verdict.DEAD:
                self._counts.health_failures += 1
                self._counts.health_deaths += 1
                self.close("no sign of life", lasts=True)

    def _probe(self) -> None:
        self._counts.health_probes += 1
        self._session.ping(self.now())
        self._flush_soon()

    def check_alive(self) -> None:
        self.health.hurry()
        if self.beside is not None:
            self.beside.doubt()

    def look_for_stuck(self) -> None:
        """Something on the way may drop what is larger than its MTU, or all of TCP, and nobody hears of it."""
        if self._proof.failed(self.now()):
            self.close("large segments do not arrive", failed=False)
            self._events.link_stuck(self)
        busy, self._seen_by_look = self.packets_sent != self._seen_by_look, self.packets_sent
        if self.closed:
            return
        # Else nothing can be stuck, and there may be thousands of them.
        tcp = self.transport.tcp_state() if busy or self._in_flight or self.suspect else None
        if tcp is not None:
            self._in_flight = tcp.unacknowledged > 0
            if self._segments.look(tcp, self.health.health.suspect, self.now()):
                self._events.link_stuck(self)
        if self.beside is not None:
            self.beside.look(tcp, self.transport, self.bytes_sent, self._full)

    def hold(self, held: bool) -> None:
        """What is sealed now might be lost; what waits goes in datagrams when the session ends."""
        self._holds = self._full = held
        if held:
            self._events.link_in_doubt(self)
        else:
            self._on_writable()

    def outlive(self, why: str) -> None:
        self.close(why, lasts=True)

    def close(self, reason: str, *, failed: bool = True, polite: bool = False, lasts: bool = False) -> None:
        # `lasts`: it is not the peer that has ended it, so its datagrams may still reach it.
        if self.closed:
            return
        if polite:
            self._session.go_away()
            self._send_last_words()
        self.closed = self._full = True
        for lane in self.lanes:
            lane.closed = lane.leaving = lane.holding = True
        if self.beside is not None:
            self.beside.session_ends(lasts and not self.leaving)
        if self._timer is not None:
            self._timer.cancel()
        self.health.stop()
        self.transport.close(discard=not polite)
        self._barriers.clear()
        self._outbound.after_batch(functools.partial(self._tell_closed, reason, failed))

    def _tell_closed(self, reason: str, failed: bool) -> None:
        # Its buffers, a megabyte, go now: the garbage collector does not know how large a link is.
        del self._session, self.rest
        self._undelivered = None
        for lane in self.lanes:
            lane.reassembly.take()
        self._events.link_closed(self, reason, failed)

    # --- what others look at

    @property
    def leaving(self) -> bool:
        return self.left or self.peer_left

    @property
    def suspect(self) -> bool:
        return self._segments.stuck or self.health.health.suspect

    @property
    def usable(self) -> bool:
        return not self.closed and not self.leaving and any(not lane.leaving for lane in self.lanes)

    @property
    def opening(self) -> int:
        return len(self._opening)

    def load(self) -> int:
        if self.closed:
            return 0
        waiting = self.queue.bytes + (self.beside.queue.bytes if self.beside is not None else 0)
        return waiting + len(self._session.data_to_send()) + self.transport.outstanding()

    def queued(self) -> int:
        return self.queue.packets + (self.beside.queue.packets if self.beside is not None else 0)

    def take_queued(self, flows: set[Flow] | None = None) -> list[Chunk]:
        beside = self.beside.queue.take_all(flows) if self.beside is not None else []
        return self.queue.take_all(flows) + beside

    def datagrams_changed(self) -> None:
        if not self.closed:
            self._events.datagrams_changed(self)

    def least_delay_s(self) -> float | None:
        direct = (self.packets_sent - self._seen_sent) - (self._waited - self._seen_waited)
        self._seen_sent, self._seen_waited = self.packets_sent, self._waited
        least_s = self.queue.least_delay_s()
        return None if direct else least_s

    def traffic(self) -> Traffic:
        total = self._ended.plus(sent(self))
        for each in self._receiving():
            total = total.plus(received(each))
        return total if self.beside is None else total.plus(self.beside.traffic())

    def _receiving(self) -> list[Reassembly]:
        return [lane.reassembly for lane in self.lanes]

    def segment_bytes(self) -> int:
        """The largest TCP segment that is sent; 0 where there is none."""
        return 0 if self.closed or (tcp := self.transport.tcp_state()) is None else tcp.segment_bytes

    @property
    def doubted(self) -> bool:
        return self._segments.stuck or 0 < self.segment_bytes() <= self._small_bytes
