"""A link: one session with its socket, on the asyncio loop, without a task or an await.

The socket's side of stages 4 and 5: `send` seals a span, `flush` writes what is sealed, `on_readable`
decrypts and hands on.

    opening ── first stream ready ──▶ up ── go-away, or being replaced ──▶ leaving ──▶ closed
       └──────────────────────────────┴───────── socket ends, protocol broken, no sign of life ──▶ closed

Back-pressure. Out: sealed bytes wait only for a socket that is full; as long as it is, and as long as the
peer's window is shut, packets wait unsealed in a fair queue (shards/flow/fair.py), so that a slow peer costs the
ring nothing and a small flow does not wait for a large one. In: what was read goes into the TUN at once,
which does not block; a shard that is too slow is a socket that is read late.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

from shards.flow.fair import FairQueue
from shards.flow.flows import Chunk, FlowTable
from shards.inbound import Inbound
from shards.peer.table import Peer
from shards.session.adapt import adapt
from shards.session.events import LinkEvents
from shards.session.lane import Lane
from shards.session.transport import SIOCOUTQ, SIOCOUTQNSD, discard, endpoints, outstanding, tune
from shards.session.vitals import Vitals
from shards.stream.events import Data, GoneAway, Pong, StreamClosed, StreamReady, WindowOpened
from shards.stream.session import Session
from shards.stream.yamux import Stream
from vpnd.config.live import Live
from vpnd.errors import LocalProtocolError, RemoteProtocolError
from vpnd.packet.capability import Capabilities
from vpnd.packet.record import PACKET_OFFSET


class Link:
    """One session. Owner: shard loop. After `close` only `report` may be called; `now` is the clock of
    everything."""

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        session_id: int,
        initiator: bool,
        peer: Peer,
        hello: Capabilities,
        live: Live,
        flows: FlowTable,
        inbound: Inbound,
        drops: dict[str, int],
        events: LinkEvents,
        now: Callable[[], float],
    ) -> None:
        self.session_id, self.initiator, self.peer, self.events, self.now = (
            session_id, initiator, peer, events, now,
        )  # fmt: skip
        self.queue = FairQueue(live, drops)
        self.lanes: dict[Stream, Lane] = {}
        self.rtt_s: float | None = None
        #: `leaving`: it is about to end, for we have said so (`left`), or the peer has (`peer_left`), or both
        self.closed = self.leaving = self.left = self.peer_left = False
        self.opened_s = self.heard_s = now()
        self.vitals = Vitals(self, live)
        self.packets_sent = self.bytes_sent = 0
        #: packets that had to wait in the queue, of packets_sent
        self.waited = 0
        self._ended = [0, 0]  # packets and bytes received on lanes that are gone
        self._loop = asyncio.get_running_loop()
        self._sock, self._session, self._live = sock, session, live
        self._hello, self._flows, self._inbound, self._drops = hello, flows, inbound, drops
        self._opening: set[Stream] = set()
        self._barriers: dict[int, tuple[float, Callable[[float], None]]] = {}
        self._writer_on = False
        self._unchecked = 0
        self._most_unsent = live.config.session.not_sent_lowat_bytes
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        tune(sock, live.config.session)

    def start(self) -> None:
        """Watch the socket; the initiator opens a stream. Events come from the next turn of the loop on."""
        self._loop.add_reader(self._sock, self.on_readable)
        if self.initiator:
            self.open_stream()
        self._session.ping(self.now())
        self.vitals.watch()
        self._loop.call_soon(self._run, self._take_events)

    # --- out: stage 4

    def send(self, lane: Lane, buffer: memoryview, start: int, end: int, packets: int) -> None:
        """Seal the records in buffer[start:end], or queue them by flow.

        borrowed: `buffer`, until this returns; SCRATCH bytes in front of `start` are overwritten. Call
        `flush` at the end of a batch.
        """
        if self._writer_on or self.queue.packets or not self._seal(lane, buffer, start, end, packets):
            if self.closed:  # the socket ended under our hands; the flows have new sinks
                self.events.dispatch(Chunk(buffer, start, end, packets, self.now()))
            else:
                lane.queue_span(self._flows, buffer, start, end, self.now())

    def _seal(self, lane: Lane, buffer: memoryview, start: int, end: int, packets: int) -> bool:
        session, stream = self._session, lane.stream
        size = end - start - packets * PACKET_OFFSET
        unfit = 0
        if lane.adapt_to is not None:  # here, and not before it waits: a record that was cut counts as one
            buffer, start, end, unfit = adapt(buffer, start, end, lane.adapt_to)
        if not session.try_send(stream, buffer, start, end):
            self.flush()
            if self.closed or not session.try_send(stream, buffer, start, end):
                return False
        if unfit:
            self._drops["too_big"] += unfit
            packets -= unfit
        lane.packets_sent += packets
        self.packets_sent += packets
        self.bytes_sent += size
        self.events.packets_sent += packets
        self.events.bytes_sent += size
        return True

    def flush(self) -> None:
        """Write what is sealed; the rest when the socket is writable again."""
        session = self._session
        try:
            while view := session.data_to_send():
                count = self._sock.send(view)
                session.data_sent(count)
                self._unchecked += count
        except BlockingIOError:
            self._wait_writable()
        except OSError as error:
            self.close(f"send: {os.strerror(error.errno or 0)}", failed=not self.leaving)
            return
        if self._unchecked >= self._most_unsent:
            # A socket takes more than TCP_NOTSENT_LOWAT in one call; what is beyond it would wait there, in
            # order of arrival, instead of in the fair queue.
            self._unchecked = 0
            if not self._writer_on and outstanding(self._sock, SIOCOUTQNSD) > self._most_unsent:
                self._wait_writable()

    def _wait_writable(self) -> None:
        if not self._writer_on and not self.closed:
            self._writer_on = True
            self._loop.add_writer(self._sock, self._run, self._on_writable)

    def _on_writable(self) -> None:
        if self._writer_on:
            self._writer_on = False
            self._loop.remove_writer(self._sock)
        self.flush()
        self._send_queue()

    def _send_queue(self) -> None:
        """Seal what waits, as long as the socket and the peer's windows take it."""
        queue = self.queue
        if not queue.packets:
            return
        now_s = self.now()
        while not self._writer_on and not self.closed and (flow := queue.first(now_s)) is not None:
            lane, chunk = flow.sink, flow.backlog.chunks[0]  # type: ignore[union-attr]
            assert isinstance(lane, Lane)  # what waits here is pinned to a lane of this link
            if self._seal(lane, chunk.buffer, chunk.start, chunk.end, chunk.packets):
                queue.sent(flow, now_s)
                flow.last_s = now_s
                self.waited += chunk.packets
                if len(self._session.data_to_send()) >= self._most_unsent:
                    self.flush()
            elif not self._writer_on and not self.closed:
                queue.block(flow)
        if not self.closed:
            self.flush()

    # --- in: stage 5

    def on_readable(self) -> None:
        """The socket has bytes: one read, and everything that is whole in it."""
        self._run(self._read)

    def _read(self) -> None:
        session = self._session
        try:
            count = self._sock.recv_into(session.receive_buffer())
        except BlockingIOError:
            return
        except OSError as error:
            # The end of a session that is being left may come as a reset: the peer had not read our last pings.
            self.close(f"receive: {os.strerror(error.errno or 0)}", failed=not self.leaving)
            return
        if not count:
            self.close("closed by the peer", failed=not self.leaving)
            return
        session.received(count)
        self._take_events()
        if self.vitals.suspect:
            self.vitals.check()

    def _take_events(self) -> None:
        session = self._session
        next_event, deliver, sources = session.next_event, self._inbound.deliver_untrusted, self.peer.sources
        self.heard_s = now_s = self.now()
        while (event := next_event(now_s)) is not None:
            if type(event) is Data:
                stream = event.stream
                deliver(sources, stream.context, event.view)
                session.consumed(stream, len(event.view))
            else:
                self._on_event(event)
                if self.closed:
                    return
        self.events.batch_done()
        self.flush()
        self._arm(now_s)

    def _on_event(self, event: object) -> None:
        match event:
            case StreamReady(stream=stream, hello=hello):
                self._opening.discard(stream)
                fits = hello.offloads & self._hello.offloads == self._hello.offloads
                fits = fits and hello.max_record >= self._hello.max_record
                lane = self.lanes[stream] = Lane(self, stream, None if fits else hello, self.now())
                stream.context = lane.reassembly
                self.events.lane_ready(lane)
            case WindowOpened():
                self.queue.unblock()
                self._send_queue()
            case Pong(value=value, rtt_s=rtt_s):
                self.rtt_s = rtt_s
                if value in self._barriers:
                    sent_s, then = self._barriers.pop(value)
                    then(sent_s)
            case StreamClosed(stream=stream):
                self._opening.discard(stream)
                closed = self.lanes.pop(stream, None)
                if closed is None:
                    self.events.stream_failed(self)
                    return
                closed.closed = True
                self._ended[0] += closed.reassembly.packets
                self._ended[1] += closed.reassembly.bytes
                self.events.lane_closed(closed)
            case GoneAway():
                self.leaving = self.peer_left = True
                self.events.link_leaving(self)

    # --- streams and order

    def open_stream(self) -> bool:
        """Begin a stream: lane_ready, or stream_failed, follows. False when the session takes no more."""
        try:
            stream = self._session.open_stream(self.now())
        except LocalProtocolError:
            return False
        self._opening.add(stream)
        self.flush_soon()
        return True

    def close_lane(self, lane: Lane) -> None:
        """No more of ours on it; lane_closed follows when the peer has closed its side."""
        if not self.closed:
            self._session.close_stream(lane.stream)
            self._arm(self.now())
            self.flush_soon()

    def go_away(self) -> None:
        """Begin to end the session: neither side opens streams any more."""
        self.leaving = self.left = True
        self._session.go_away()
        self.flush_soon()

    def barrier(self, then: Callable[[float], None]) -> None:
        """Call `then` once the peer has taken everything sent so far, with the time of this call. If the link
        ends, never."""
        now_s = self.now()
        self._barriers[self._session.ping(now_s)] = now_s, then
        self.flush_soon()

    def flush_soon(self) -> None:
        """Flush when what runs now, maybe in the middle of a batch, is done; take what happened within."""
        if not self.closed:
            self._loop.call_soon(self._run, self._take_local_events)

    def _take_local_events(self) -> None:
        heard_s = self.heard_s
        self._take_events()
        self.heard_s = heard_s  # nothing came from the peer

    def probe(self) -> None:
        """Ask for a sign of life."""
        self._session.ping(self.now())
        self.flush_soon()

    # --- time and end

    def _run(self, step: Callable[[], None]) -> None:
        """One step of work on peer's bytes: what it may raise ends the session, not the shard."""
        if self.closed:
            return
        try:
            step()
        except RemoteProtocolError as error:
            self.events.session_errors += 1
            self.close(f"protocol error: {error}")

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

    def close(self, reason: str, *, failed: bool = True, polite: bool = False) -> None:
        """End the session; what waits in its queue goes to another link of the peer, or waits for one.

        `failed`: not by our will. `polite` tells the peer first, so that it does not take the end for a
        failure.
        """
        if self.closed:
            return
        self.closed = True
        if polite:
            self._session.go_away()
            try:
                self._sock.send(self._session.data_to_send())
            except OSError:
                pass  # the peer sees the socket close, which says the same
        self._loop.remove_reader(self._sock)
        if self._writer_on:
            self._loop.remove_writer(self._sock)
        if self._timer is not None:
            self._timer.cancel()
        self.vitals.stop()
        if not polite:
            discard(self._sock)
        self._sock.close()
        self._barriers.clear()
        for lane in self.lanes.values():
            lane.closed = True
        self._loop.call_soon(self._forget_session)
        self.events.link_closed(self, reason, failed)

    def _forget_session(self) -> None:
        """Nobody is within a call of it any more: its buffers, a megabyte, go now. The link refers to itself by its
        lanes, and waits for the garbage collector, which does not know how large it is."""
        del self._session

    # --- what others look at

    @property
    def usable(self) -> bool:
        """Packets can be sent, and it is not about to end."""
        return not self.closed and not self.leaving and any(not lane.leaving for lane in self.lanes.values())

    @property
    def opening(self) -> int:
        """Streams of ours that are not open yet."""
        return len(self._opening)

    def load(self) -> int:
        """Bytes that are ahead of the next packet: in our queue, sealed, and in the kernel until
        acknowledged."""
        if self.closed:
            return 0
        return self.queue.bytes + len(self._session.data_to_send()) + outstanding(self._sock, SIOCOUTQ)

    def local_address(self) -> str:
        """The local IP address of its socket; empty if the kernel does not know any more."""
        try:
            return str(self._sock.getsockname()[0]).removeprefix("::ffff:")
        except OSError:
            return ""

    def endpoints(self) -> tuple[str, str]:
        """See shards.session.transport.endpoints."""
        return endpoints(self._sock)

    def received(self) -> tuple[int, int]:
        """Packets and bytes received, on all streams it ever had."""
        each = [lane.reassembly for lane in self.lanes.values()]
        packets, size = self._ended
        return packets + sum(one.packets for one in each), size + sum(one.bytes for one in each)
