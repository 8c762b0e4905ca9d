"""One established session, sans-IO: bytes in, events out, packets in, bytes out.

    socket ─ receive_buffer(), received() ─▶ ┌─────────┐ ─ next_event() ─▶ StreamReady, Data, …
                                             │ Session │
    socket ◀─ data_to_send(), data_sent() ── └─────────┘ ◀─ open_stream(), send(), consumed(), …

It knows no socket, loop or clock: time is an argument in seconds, of any monotonic clock. Everything here
is synchronous and does a bounded amount of work. One Noise message is opened at a time, and only when its
predecessor's plaintext is used up, so a batch of packets is decrypted while it is hot and copied once.

A packet's bytes are touched twice here: by the cipher on the way out (ring → send buffer) and on the way
in (receive buffer → plaintext).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from shards.stream import spec
from shards.stream.events import Data, Event
from shards.stream.negotiate import NOWHERE, SUBNET_NODE, Beside, packet_protocol
from shards.stream.noise import Opener, Sealer
from shards.stream.table import StreamTable
from shards.stream.yamux import Stream, StreamState
from vpnd import session
from vpnd.config.schema import Session as Settings
from vpnd.errors import RemoteProtocolError
from vpnd.packet.record import MIN_RECORD_BYTES, Capabilities
from vpnd.session import Established

_READY = StreamState.READY
_NEGOTIATING = StreamState.NEGOTIATING
_CLOSED = StreamState.CLOSED
_HEADER_BYTES = spec.HEADER_BYTES
_PLAIN_DATA = spec.PLAIN_DATA
_LEAST_PACKET_BYTES = spec.HEADER_BYTES + MIN_RECORD_BYTES
_words = spec.HEADER_WORDS.unpack_from
_fields = spec.HEADER.unpack_from


class Session:
    """The engine of one session. Owner: the shard's loop; not thread-safe.

    RemoteProtocolError means the peer broke the protocol: the session is dead, next_event() raises it again,
    nothing is sent any more, and streams end without a StreamClosed; what data_to_send() holds, a go-away at its end,
    may still be sent. LocalProtocolError means the caller has a bug: nothing was done, the session lives.
    """

    def __init__(
        self,
        established: Established,
        hello: Capabilities,
        settings: Settings,
        now_s: float,
        beside: Beside = NOWHERE,
    ) -> None:
        """`hello` and `beside` are told to the peer on every stream that has a HELLO. LocalProtocolError: `established`
        cannot be the state of a session."""
        self._hello = hello
        cipher, leftover = established.cipher, established.leftover
        send_nonce, receive_nonce = established.send_nonce, established.receive_nonce
        self._sealer = Sealer(
            established.send_key,
            send_nonce,
            settings.send_buffer_bytes,
            settings.control_reserve_bytes,
            cipher,
        )
        self._opener = Opener(
            established.receive_key, receive_nonce, settings.receive_buffer_bytes, len(leftover), cipher
        )
        self._table = StreamTable(
            initiator=established.initiator,
            sealer=self._sealer,
            protocol=SUBNET_NODE
            if established.protocol == session.SUBNET_NODE
            else packet_protocol(hello, beside),
            settings=settings,
            now_s=now_s,
        )
        #: consumed(stream, count): `count` payload bytes of Data events are done with, the peer may send as many again.
        #: A window update goes out once half the window is consumed. May come late and in any portions; does nothing on
        #: a closed stream. LocalProtocolError: so much was never received.
        self.consumed = self._table.consumed
        #: whether next_timer_s() has anything to say
        self.timed = self._table.deadlines
        self._events = self._table.events
        self._streams = self._table.streams
        #: messages and frames next_event() may still take before it returns None with more to come; the caller's to set
        self.budget = sys.maxsize
        self._failure: Callable[[], RemoteProtocolError] | None = None
        # The opened plaintext, and how much of it is used.
        self._plain = self._opener.plain
        self._plain[: len(leftover)] = leftover
        self._position = 0
        self._limit = len(leftover)
        # The frame under way: a header cut by the end of a message, or whose payload is still to come.
        self._header = bytearray()
        self._payload_left = 0
        self._payload_stream: Stream | None = None
        self._payload_fin = False

    def rest(self) -> None:
        """Called now and then: without the memory of buffers that are empty and hardly used."""
        self._sealer.rest()
        self._opener.rest()

    # --- bytes in

    def receive_buffer(self) -> memoryview:
        """Room for recv_into(). borrowed: until received().

        Never empty after next_event() has returned None.
        """
        return self._opener.receive_buffer()

    def received(self, count: int) -> None:
        """The first `count` bytes of receive_buffer() are filled. Views of Data events are dead now."""
        self._opener.received(count)

    def next_event(self, now_s: float) -> Event | None:
        """The next event; None when more bytes are needed, or `budget` is used up. Call until None, or a Data that is
        `last`, after every received(), and do not receive more before that with some of the budget left.

        Ends the life of the last Data event's view, and of data_to_send()'s: answers may be sealed.
        Raises RemoteProtocolError: the session is dead.
        """
        self._table.now_s = now_s
        if self._failure is not None:
            raise self._failure()
        try:
            return self._parse_untrusted()
        except RemoteProtocolError as error:
            self._fail(error)
            raise

    def _parse_untrusted(self) -> Event | None:
        while True:
            if self._events:
                return self._events.popleft()
            if self._payload_fin and not self._payload_left:
                self._end_payload()
            elif self._position == self._limit:
                if self.budget <= 0:
                    return None
                limit = self._opener.open_untrusted()
                if limit < 0:
                    return None
                self.budget -= 1
                # Fast path: one plain data frame of a ready stream and nothing else: what our sealer makes.
                if limit >= _LEAST_PACKET_BYTES and not self._payload_left and not self._header:
                    word, stream_id, length = _words(self._plain)
                    if word == _PLAIN_DATA and length == limit - _HEADER_BYTES:
                        stream = self._streams.get(stream_id)
                        if stream is not None and stream.state is _READY and length <= stream.receive_window:
                            stream.receive_window -= length
                            self._position = self._limit = limit
                            return Data(stream, self._plain[_HEADER_BYTES:limit], not self._opener.more)
                elif self._limit == spec.MAX_PLAINTEXT_BYTES:
                    self._table.credit += 1  # it may be the end of a span that filled the message before
                self._position = 0
                self._limit = limit
            elif self._payload_left:
                event = self._take_payload_untrusted()
                if event is not None:
                    return event
            elif self.budget <= 0:
                return None
            else:
                self.budget -= 1
                self._take_header_untrusted()

    def _take_header_untrusted(self) -> None:
        position = self._position
        if self._header or self._limit - position < spec.HEADER_BYTES:
            # A header in pieces: at most eleven bytes are kept from one message to the next.
            end = min(position + spec.HEADER_BYTES - len(self._header), self._limit)
            self._header += self._plain[position:end]
            self._position = end
            if len(self._header) < spec.HEADER_BYTES:
                return
            fields = _fields(self._header)
            self._header.clear()
        else:
            fields = _fields(self._plain, position)
            self._position = position + spec.HEADER_BYTES
        _, kind, flags, _, length = fields
        stream = self._table.take_header_untrusted(*fields)
        if kind == spec.TYPE_DATA and length:
            self._payload_left = length
            self._payload_stream = stream
            self._payload_fin = stream is not None and bool(flags & spec.FLAG_FIN)

    def _take_payload_untrusted(self) -> Data | None:
        position = self._position
        end = min(position + self._payload_left, self._limit)
        stream = self._payload_stream
        if stream is not None and stream.state is _NEGOTIATING:
            end = position + self._table.negotiate_untrusted(stream, self._plain[position:end])
            data = None
        elif stream is not None and stream.state is not _CLOSED:
            data = Data(stream, self._plain[position:end])
        else:
            # Refused, or closed while its payload was on the way: skipped.
            data = None
        self._position = end
        self._payload_left -= end - position
        return data

    def _end_payload(self) -> None:
        self._payload_fin = False
        if self._payload_stream is not None:
            self._table.remote_fin(self._payload_stream)

    def _fail(self, error: RemoteProtocolError) -> None:
        # Not the error itself: its traceback leads here, and the buffers, a megabyte, would wait for the collector.
        self._failure = functools.partial(type(error), *error.args)
        self._table.die()

    # --- packets out

    def open_stream(self, now_s: float, beside: Beside | None = None) -> Stream:
        """Start a stream; StreamReady or StreamClosed follows. `beside`: told to the peer from now on.

        LocalProtocolError: the session is dead or the peer going away, or max_streams of ours are open.
        """
        if beside is not None:
            self._table.protocol = packet_protocol(self._hello, beside)
        return self._table.open(now_s)

    @property
    def most_bytes(self) -> int:
        """Of payload that send() takes while nothing else waits to be sent, if the peer's window has room."""
        return self._sealer.most_bytes

    def send(self, stream: Stream, ring: memoryview, start: int, ends: Sequence[int]) -> bool:
        """Seal ring[start:ends[-1]] as payload, in messages that end at `ends` (see `survey`), none with more than
        MAX_FRAME_PAYLOAD_BYTES. False, and nothing done, when the stream is not ready or the peer's window or the send
        buffer has no room for all of it.

        `ring` is a writable view of bytes; `start` is 12 or more. The twelve bytes before each message are overwritten:
        all of the span is free for the caller when this returns True, and no longer what it was.
        """
        size = ends[-1] - start
        if stream.state is not _READY or size > stream.send_window:
            return False
        try:
            if not self._sealer.seal_data(stream.id, ring, start, ends):
                return False
        except RemoteProtocolError as error:
            self._fail(error)
            raise
        stream.send_window -= size
        self._table.bytes_sent += size
        return True

    def ping(self, now_s: float) -> int:
        """Ask for a Pong, which will have the value returned here.

        It says that the peer has taken everything that was sealed before: frames are answered in order.
        """
        return self._table.ping(now_s)

    def close_stream(self, stream: Stream) -> None:
        """No more payload from us; what was sent still arrives. Theirs comes until they close or are late.

        A stream that is not ready yet is reset. StreamClosed follows; closing twice does nothing.
        """
        self._table.close(stream)

    def reset_stream(self, stream: Stream) -> None:
        """End a stream at once, both ways. StreamClosed follows."""
        self._table.reset(stream)

    def go_away(self, code: int = spec.GO_AWAY_NORMAL) -> None:
        """Tell the peer to open no more streams, and refuse those it opens nevertheless. Open ones go on."""
        self._table.go_away(code)

    # --- bytes out

    def data_to_send(self) -> memoryview:
        """Sealed bytes, all of them. borrowed: until data_sent() or any call that may seal.

        Those are next_event(), handle_timer() and everything under "packets out".
        """
        return self._sealer.data_to_send()

    def data_sent(self, count: int) -> memoryview | None:
        """The first `count` bytes of data_to_send() are out, and send() may have room again: what data_to_send() gives
        now, None for nothing.

        LocalProtocolError: there were not so many.
        """
        left, table = self._sealer.data_sent(count), self._table
        if table.postponed or table.owing:
            table.room_made()
            left = self._sealer.data_to_send()
        return left

    # --- time

    def next_timer_s(self) -> float | None:
        """When handle_timer() is to be called; None: not until something else has happened."""
        return self._table.next_timer_s()

    def handle_timer(self, now_s: float) -> None:
        """Reset streams late to open or to close; next_event() then has their StreamClosed."""
        self._table.expire(now_s)
