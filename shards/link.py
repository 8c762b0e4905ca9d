"""A link: one session with its socket, on the asyncio loop, without a task or an await.

The socket's side of stages 4 and 5: `submit` seals a span, `flush` writes what is sealed, `on_readable`
decrypts and hands on.

Time here is time.monotonic: the loop's own clock counts in milliseconds, too coarse for a round trip.

Back-pressure. Out: sealed bytes wait only for a socket that is full; as long as it is, and as long as the
peer's window is shut, packets wait unsealed in a bounded queue and are dropped beyond it, so that a slow
peer costs the ring nothing. In: what was read goes into the TUN at once, which does not block; a shard that
is too slow is a socket that is read late.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from shards.adapt import adapt
from shards.flows import Chunk, Flow, Queue
from shards.inbound import Inbound, Reassembly
from shards.peers import Peer
from shards.stream.events import Data, GoneAway, Pong, StreamClosed, StreamReady, WindowOpened
from shards.stream.session import Session
from shards.stream.yamux import Stream
from vpnd.api.messages import SessionReport
from vpnd.config.schema import Session as Settings
from vpnd.errors import RemoteProtocolError
from vpnd.packet.capability import Capabilities
from vpnd.packet.record import PACKET_OFFSET
from vpnd.packet.ring import SCRATCH

log = logging.getLogger(__name__)

#: Linux' TCP_NOTSENT_LOWAT (include/uapi/linux/tcp.h); the socket module has no name for it.
TCP_NOTSENT_LOWAT = 25


class LinkEvents(Protocol):
    """What a link tells its shard; the counts are of all links together."""

    packets_sent: int
    bytes_sent: int
    streams_opened: int
    streams_closed: int
    session_errors: int

    def batch_done(self) -> None:
        """A batch of packets has come in."""

    def link_ready(self, link: Link) -> None:
        """Packets can be sent over it."""

    def link_closed(self, link: Link, reason: str) -> None:
        """It has ended; its flows and its queue are the shard's to place anew."""


class Link:
    """One session. Owner: shard loop. After `close` only `report` may be called.

    `events` is the shard: it hears of a link that got ready, that ended, that waits for room in the ring.
    """

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        session_id: int,
        initiator: bool,
        peer: Peer,
        hello: Capabilities,
        settings: Settings,
        buffer_size: int,
        inbound: Inbound,
        drops: dict[str, int],
        events: LinkEvents,
    ) -> None:
        self.session_id, self.initiator, self.peer = session_id, initiator, peer
        self.flows: set[Flow] = set()
        self.queue = Queue(settings.queue_bytes, buffer_size)
        self.rtt_s: float | None = None
        self.closed = False
        self.packets_sent = self.bytes_sent = 0
        self._loop = asyncio.get_running_loop()
        self._opened_s = monotonic()
        self._sock, self._session, self._settings = sock, session, settings
        self._hello, self._inbound, self._drops, self._events = hello, inbound, drops, events
        self._stream: Stream | None = None
        self._streams: dict[Stream, Reassembly] = {}
        self._adapt_to: Capabilities | None = None
        self._writer_on = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        self._tune(sock)

    def start(self) -> None:
        """Watch the socket; the initiator opens the stream. Events come from the next turn of the loop on."""
        now_s = monotonic()
        self._loop.add_reader(self._sock, self.on_readable)
        if self.initiator:
            self._session.open_stream(now_s)
        self._session.ping(now_s)
        self._loop.call_later(5.0, self._ping)
        self._loop.call_soon(self._run, self._take_events)

    def _tune(self, sock: socket.socket) -> None:
        """Socket options of a data session. Only the congestion control may be refused (unknown to the kernel, or
        not in net.ipv4.tcp_allowed_congestion_control): the system's is then as good as any."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, self._settings.not_sent_lowat_bytes)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._settings.user_timeout * 1000))
        if self._settings.congestion_control:
            try:
                name = self._settings.congestion_control.encode()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
            except OSError as error:
                log.debug("congestion control %s: %s", self._settings.congestion_control, error)

    # --- out: stage 4

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        """Seal the records in buffer[start:end], or queue them, or drop them when the queue is full.

        borrowed: `buffer`, until this returns; SCRATCH bytes in front of `start` are overwritten. Call `flush` at the
        end of a batch.
        """
        if self._adapt_to is not None:
            buffer, start, end, unfit = adapt(buffer, start, end, self._adapt_to)
            self._drops["too_big"] += unfit
            packets -= unfit
            if start == end:
                return
        sealed = not self.queue and not self._writer_on and self._seal(buffer, start, end, packets)
        if not sealed and not self.queue.put(Chunk(buffer, start, end, packets, monotonic())):
            self._drops["queue_full"] += packets

    def _seal(self, buffer: memoryview, start: int, end: int, packets: int) -> bool:
        session, stream = self._session, self._stream
        if stream is None:
            return False
        if not session.try_send(stream, buffer, start, end):
            self.flush()
            if not session.try_send(stream, buffer, start, end):
                return False
        size = end - start
        self.packets_sent += packets
        self.bytes_sent += size - packets * PACKET_OFFSET
        self._events.packets_sent += packets
        self._events.bytes_sent += size - packets * PACKET_OFFSET
        return True

    def flush(self) -> None:
        """Write what is sealed; the rest when the socket is writable again."""
        session = self._session
        try:
            while view := session.data_to_send():
                session.data_sent(self._sock.send(view))
        except BlockingIOError:
            if not self._writer_on and not self.closed:
                self._writer_on = True
                self._loop.add_writer(self._sock, self._run, self._on_writable)
        except OSError as error:
            self.close(f"send: {os.strerror(error.errno or 0)}")

    def _on_writable(self) -> None:
        if self._writer_on:
            self._writer_on = False
            self._loop.remove_writer(self._sock)
        self.flush()
        self._send_queue()

    def _send_queue(self) -> None:
        """Seal what waits, as long as the socket and the peer's window take it."""
        queue = self.queue
        while queue and not self._writer_on and not self.closed:
            chunk = queue.first()
            if not self._seal(chunk.buffer, SCRATCH, len(chunk.buffer), chunk.packets):
                break
            queue.take()
            if len(self._session.data_to_send()) >= self._settings.not_sent_lowat_bytes:
                self.flush()
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
            self.close(f"receive: {os.strerror(error.errno or 0)}")
            return
        if not count:
            self.close("closed by the peer")
            return
        session.received(count)
        self._take_events()

    def _take_events(self) -> None:
        session = self._session
        next_event, deliver, sources = session.next_event, self._inbound.deliver_untrusted, self.peer.sources
        now_s = monotonic()
        while (event := next_event(now_s)) is not None:
            if type(event) is Data:
                stream = event.stream
                deliver(sources, stream.context, event.view)
                session.consumed(stream, len(event.view))
            else:
                self._on_event(event)
                if self.closed:
                    return
        self._events.batch_done()
        self.flush()
        self._arm(now_s)

    def _on_event(self, event: object) -> None:
        match event:
            case StreamReady(stream=stream, hello=hello):
                stream.context = self._streams[stream] = Reassembly()
                self._events.streams_opened += 1
                if self._stream is None:
                    self._stream = stream
                    fits = hello.offloads & self._hello.offloads == self._hello.offloads
                    fits = fits and hello.max_record >= self._hello.max_record
                    self._adapt_to = None if fits else hello
                    self._events.link_ready(self)
                    self._send_queue()
            case WindowOpened():
                self._send_queue()
            case Pong(rtt_s=rtt_s):
                self.rtt_s = rtt_s
            case StreamClosed(stream=stream, reason=reason):
                if self._streams.pop(stream, None) is not None:
                    self._events.streams_closed += 1
                if stream is self._stream or (self._stream is None and self.initiator):
                    self.close(f"stream closed: {reason}")
            case GoneAway():
                self.close("the peer went away")

    # --- time and end

    def _run(self, step: Callable[[], None]) -> None:
        """One step of work on peer's bytes: what it may raise ends the session, not the shard."""
        if self.closed:
            return
        try:
            step()
        except RemoteProtocolError as error:
            self._events.session_errors += 1
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
            self._session.handle_timer(monotonic())
            self._run(self._take_events)

    def _ping(self) -> None:
        if not self.closed:
            self._session.ping(monotonic())
            self.flush()
            self._loop.call_later(5.0, self._ping)

    def close(self, reason: str, polite: bool = False) -> None:
        """End the session; what waits in its queue goes to another link of the peer, or is dropped as session_lost.

        `polite` tells the peer first, so that it does not take the end for a failure.
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
        self._sock.close()
        self._events.streams_closed += len(self._streams)
        self._events.link_closed(self, reason)

    @property
    def ready(self) -> bool:
        """A stream is open: packets can be sent."""
        return self._stream is not None and not self.closed

    @property
    def streams(self) -> int:
        """Open streams."""
        return 0 if self.closed else len(self._streams)

    def report(self) -> SessionReport:
        """For `vpnd status`."""
        return SessionReport(
            peer_id=self.peer.peer_id,
            session_id=self.session_id,
            initiator=self.initiator,
            state="up" if self.ready else "opening",
            rtt_ms=None if self.rtt_s is None else self.rtt_s * 1000,
            streams=self.streams,
            bytes_sent=self.bytes_sent,
            bytes_received=sum(each.bytes for each in self._streams.values()),
            packets_sent=self.packets_sent,
            packets_received=sum(each.packets for each in self._streams.values()),
            queued_bytes=self.queue.bytes,
            age_s=monotonic() - self._opened_s,
        )
