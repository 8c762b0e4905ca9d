"""The streams of one session: what frame headers mean, and every frame that is not a packet's.

The session feeds headers and the payload of negotiations in; events gather in `events`, control frames go to
the sealer. Who made us send a frame decides what happens when even the reserve of the send buffer is full:
an answer to the peer is then the peer's fault (it asks and does not read) and the session dies; a window
update waits with its stream; anything else the caller asked for waits in line until data_sent().

A peer pays for its control frames, and for data frames too short for a packet, out of a credit (session.control_rate):
they cost more than they carry.

Three rules are narrower than Yamux leaves them. Only a ping that was sent is answered, once. Ids of new streams rise,
where the streams' protocol says so; then "was it ever open" needs one number and not a set. Frames of a stream that was
are dropped in silence, for they may have crossed our FIN or RST. And no frame may be longer than a whole window.
"""

from __future__ import annotations

from collections import deque

from shards.stream import spec, yamux
from shards.stream.events import CloseReason, Event, GoneAway, Pong, StreamClosed, StreamReady, WindowOpened
from shards.stream.negotiate import Negotiation, Outcome, StreamProtocol
from shards.stream.noise import Sealer
from shards.stream.yamux import Stream, StreamEvent, StreamState
from vpnd.config.schema import Session as Settings
from vpnd.errors import FloodError, LocalProtocolError, RemoteProtocolError
from vpnd.packet.record import MIN_RECORD_BYTES


class StreamTable:
    """Stream table of one session. Owner: the session; not thread-safe."""

    def __init__(
        self, *, initiator: bool, sealer: Sealer, protocol: StreamProtocol, settings: Settings, now_s: float
    ) -> None:
        self.events: deque[Event] = deque()
        self.streams: dict[int, Stream] = {}
        self.now_s = now_s
        self._sealer = sealer
        self.protocol = protocol
        self._settings = settings
        self._window = settings.window_bytes
        self._raise_by = settings.window_bytes - spec.INITIAL_WINDOW_BYTES
        self._give_back_at = (settings.window_bytes + 1) // 2
        self._next_id = spec.FIRST_ID_INITIATOR if initiator else spec.FIRST_ID_ACCEPTOR
        #: Highest id the peer has opened; the start has its parity, too.
        self._highest_theirs = (
            spec.FIRST_ID_ACCEPTOR if initiator else spec.FIRST_ID_INITIATOR
        ) - spec.ID_STEP
        #: Lower ids it may still open; at most max_streams of them.
        self._skipped: set[int] = set()
        self._count_ours = 0
        self._count_theirs = 0
        self.deadlines: dict[Stream, tuple[float, CloseReason]] = {}
        self.postponed: deque[bytes] = deque()
        self.owing: dict[Stream, None] = {}
        self._ping_value = 0
        #: Unanswered pings of ours, oldest first: value → when it was asked for.
        self._pings: dict[int, float] = {}
        self._leaving = False
        self._peer_leaving = False
        self._dead = False
        #: payload sent, which the peer answers with window updates
        self.bytes_sent = 0
        #: control frames the peer may send until it is looked at what it has earned meanwhile
        self.credit = settings.control_burst
        self._renewed_s, self._renewed_bytes = now_s, 0

    # --- asked for by the caller

    def open(self, now_s: float) -> Stream:
        """Start a stream: SYN, larger window and the whole opening of the negotiation in one message."""
        if self._dead or self._peer_leaving:
            raise LocalProtocolError("the session takes no new streams")
        if self._count_ours >= self._settings.max_streams:
            raise LocalProtocolError("max_streams are open already")
        stream_id = self._next_id
        if stream_id > spec.MAX_ID:
            raise LocalProtocolError("the session's stream ids are used up")
        self._next_id = stream_id + spec.ID_STEP
        stream, negotiation = self._add(stream_id, ours=True, now_s=now_s)
        opening = negotiation.opening()
        stream.send_window -= len(opening)
        self._ask(
            yamux.window_update(stream_id, self._raise_by, spec.FLAG_SYN)
            + yamux.data_frame(stream_id, opening)
        )
        return stream

    def close(self, stream: Stream) -> None:
        """FIN behind what was sent; the peer's payload still comes until its FIN. RST if it is not ready."""
        if stream.state is StreamState.NEGOTIATING:
            self.reset(stream)
        elif stream.state is StreamState.READY:
            stream.move(StreamEvent.LOCAL_FIN)
            self.deadlines[stream] = (self.now_s + self._settings.close_timeout, CloseReason.CLOSE_TIMEOUT)
            self._ask(yamux.window_update(stream.id, 0, spec.FLAG_FIN))

    def reset(self, stream: Stream, reason: CloseReason = CloseReason.RESET) -> None:
        """RST, at once."""
        if stream.state is not StreamState.CLOSED:
            self._ask(yamux.window_update(stream.id, 0, spec.FLAG_RST))
            self._finish(stream, StreamEvent.RESET, reason)

    def ping(self, now_s: float) -> int:
        """Several may be under way; the caller does not ask without end for what is not answered."""
        self._ping_value = (self._ping_value + 1) & spec.MAX_PING_VALUE
        if not self._dead:
            self._pings[self._ping_value] = now_s
            self._ask(yamux.ping(self._ping_value, spec.FLAG_SYN))
        return self._ping_value

    def go_away(self, code: int) -> None:
        """Refuse new streams of the peer from now on, and tell it."""
        if not self._dead:
            self._leaving = True
            self._ask(yamux.go_away(code))

    def consumed(self, stream: Stream, count: int) -> None:
        """Give window back once half of it is owed. LocalProtocolError if so much was never received."""
        if stream.state is StreamState.CLOSED:
            return
        owed = stream.owed + count
        if count < 0 or owed > self._window - stream.receive_window:
            raise LocalProtocolError("more was consumed than was received")
        stream.owed = owed
        if owed >= self._give_back_at:
            self._give_back(stream)

    def room_made(self) -> None:
        """The send buffer has room again: send what waited for it."""
        while self.postponed and self._sealer.seal_control(self.postponed[0]):
            self.postponed.popleft()
        if self.owing:
            owing, self.owing = self.owing, {}
            for stream in owing:
                if stream.state is not StreamState.CLOSED:
                    self._give_back(stream)

    # --- time

    def next_timer_s(self) -> float | None:
        """When the first stream is late; None if none is under way."""
        if not self.deadlines:
            return None
        return min(deadline for deadline, _ in self.deadlines.values())

    def expire(self, now_s: float) -> None:
        """Reset the streams that are late."""
        self.now_s = now_s
        for stream, (deadline, reason) in list(self.deadlines.items()):
            if deadline <= now_s:
                self.reset(stream, reason)

    # --- from the peer

    def take_header_untrusted(
        self, version: int, kind: int, flags: int, stream_id: int, length: int
    ) -> Stream | None:
        """Act on a header. Of a data frame: whose payload follows, None if nobody's (it is to be skipped).

        A FIN on a frame with payload is left to the caller, to remote_fin() once the payload is taken.
        Raises RemoteProtocolError only.
        """
        if version != spec.VERSION:
            raise RemoteProtocolError(f"Yamux version {version}")
        if kind != spec.TYPE_DATA or length < MIN_RECORD_BYTES:
            self.credit -= 1
            if self.credit < 0:
                self._renew_credit_untrusted()
        if kind == spec.TYPE_DATA or kind == spec.TYPE_WINDOW_UPDATE:
            return self._take_stream_frame_untrusted(kind, flags, stream_id, length)
        if stream_id != spec.SESSION_ID:
            raise RemoteProtocolError("a ping or go-away names a stream")
        if kind == spec.TYPE_PING:
            if flags & spec.FLAG_SYN:
                self._answer(yamux.ping(length, spec.FLAG_ACK))
            elif flags & spec.FLAG_ACK:
                if (sent_s := self._pings.pop(length, None)) is None:
                    raise RemoteProtocolError("an answer to a ping that was not sent")
                self.credit += 1  # we asked for it
                self.events.append(Pong(length, max(self.now_s - sent_s, 0.0)))
        elif kind == spec.TYPE_GO_AWAY:
            self._peer_leaving = True
            self.events.append(GoneAway(length))
        else:
            raise RemoteProtocolError(f"Yamux frame of type {kind}")
        return None

    def _renew_credit_untrusted(self) -> None:
        """The peer has sent all the control frames it may: what has it earned meanwhile? Raises FloodError."""
        settings = self._settings
        earned = (self.now_s - self._renewed_s) * settings.control_rate
        earned += (self.bytes_sent - self._renewed_bytes) * 2 / spec.INITIAL_WINDOW_BYTES
        self._renewed_s, self._renewed_bytes = self.now_s, self.bytes_sent
        self.credit += min(settings.control_burst, int(earned))
        if self.credit < 0:
            raise FloodError(f"more than {settings.control_burst} control frames at once")

    def _take_stream_frame_untrusted(
        self, kind: int, flags: int, stream_id: int, length: int
    ) -> Stream | None:
        if stream_id == spec.SESSION_ID:
            raise RemoteProtocolError("a frame of no stream")
        if kind == spec.TYPE_DATA and length > self._window:
            raise RemoteProtocolError("a frame is longer than any window")
        if flags & spec.FLAG_SYN:
            stream = self._take_syn_untrusted(stream_id, flags)
        else:
            stream = self.streams.get(stream_id)
            if stream is None and not self._was_open(stream_id):
                raise RemoteProtocolError(f"a frame of stream {stream_id}, which was never opened")
        if stream is None:
            return None
        if flags & spec.FLAG_RST:
            self._finish(stream, StreamEvent.RESET, CloseReason.RESET_BY_PEER)
            return None
        if kind == spec.TYPE_DATA:
            if length > stream.receive_window:
                raise RemoteProtocolError(f"stream {stream_id}: more than its window")
            stream.receive_window -= length
            if length:
                return stream
        elif length:
            window = stream.send_window + length
            if window > spec.MAX_WINDOW_BYTES:
                raise RemoteProtocolError(f"stream {stream_id}: its window overflows")
            stream.send_window = window
            if stream.state is StreamState.READY:
                self.events.append(WindowOpened(stream))
        if flags & spec.FLAG_FIN:
            self.remote_fin(stream)
        return None

    def _was_open(self, stream_id: int) -> bool:
        if stream_id % spec.ID_STEP == self._next_id % spec.ID_STEP:
            return stream_id < self._next_id
        return stream_id <= self._highest_theirs and stream_id not in self._skipped

    def _take_syn_untrusted(self, stream_id: int, flags: int) -> Stream | None:
        if stream_id % spec.ID_STEP == self._next_id % spec.ID_STEP:
            raise RemoteProtocolError(f"the peer opens stream {stream_id}, which is not of its parity")
        if stream_id <= self._highest_theirs:
            if stream_id not in self._skipped:
                raise RemoteProtocolError(f"the peer opens stream {stream_id} again, or out of order")
            self._skipped.discard(stream_id)
        else:
            self._skip(stream_id)
            self._highest_theirs = stream_id
        if flags & spec.FLAG_RST:
            return None
        if self._leaving or self._count_theirs >= self._settings.max_streams:
            self._answer(yamux.window_update(stream_id, 0, spec.FLAG_RST))
            return None
        stream, _ = self._add(stream_id, ours=False, now_s=self.now_s)
        self._answer(yamux.window_update(stream_id, self._raise_by, spec.FLAG_ACK))
        return stream

    def _skip(self, stream_id: int) -> None:
        left_out = range(self._highest_theirs + spec.ID_STEP, stream_id, spec.ID_STEP)
        if not self.protocol.ordered and len(left_out) + len(self._skipped) <= self._settings.max_streams:
            self._skipped.update(left_out)

    def negotiate_untrusted(self, stream: Stream, payload: memoryview) -> int:
        """Feed payload to a stream's negotiation; return how much it took.

        What is left is data if the stream is ready now. Raises RemoteProtocolError only.
        """
        negotiation = stream.negotiation
        assert negotiation is not None  # the stream is NEGOTIATING
        used, answer = negotiation.feed_untrusted(payload)
        self.consumed(stream, used)
        if answer:
            if len(answer) > stream.send_window:
                raise RemoteProtocolError("no window for a negotiation")
            stream.send_window -= len(answer)
            self._answer(yamux.data_frame(stream.id, answer))
        outcome = negotiation.outcome
        if outcome is Outcome.AGREED:
            assert negotiation.hello is not None
            stream.move(StreamEvent.AGREED)
            stream.negotiation = None
            del self.deadlines[stream]
            self.events.append(StreamReady(stream, negotiation.hello, negotiation.beside))
        elif outcome is not Outcome.UNDER_WAY:
            self._answer(yamux.window_update(stream.id, 0, spec.FLAG_FIN))
            refused = outcome is Outcome.REFUSED
            self._finish(
                stream, StreamEvent.RESET, CloseReason.REFUSED if refused else CloseReason.UNKNOWN_PROTOCOL
            )
        return used

    def remote_fin(self, stream: Stream) -> None:
        """The peer has sent its last byte on this stream."""
        if stream.state is StreamState.NEGOTIATING:
            self._answer(yamux.window_update(stream.id, 0, spec.FLAG_RST))
            self._finish(stream, StreamEvent.REMOTE_FIN, CloseReason.CLOSED_EARLY)
        elif stream.state is not StreamState.CLOSED:
            if stream.state is StreamState.READY:
                self._answer(yamux.window_update(stream.id, 0, spec.FLAG_FIN))
            self._finish(stream, StreamEvent.REMOTE_FIN, CloseReason.CLOSED)

    def die(self) -> None:
        """The session is dead: no stream takes anything any more; a go-away is tried."""
        self._dead = True
        for stream in self.streams.values():
            stream.move(StreamEvent.RESET)
            stream.negotiation = None
        self.streams.clear()
        self.events.clear()
        self.deadlines.clear()
        self.postponed.clear()
        self.owing.clear()
        if self._sealer.nonce < spec.NONCE_LIMIT:
            self._sealer.seal_control(yamux.go_away(spec.GO_AWAY_PROTOCOL_ERROR))

    # --- within

    def _add(self, stream_id: int, *, ours: bool, now_s: float) -> tuple[Stream, Negotiation]:
        negotiation = Negotiation(opener=ours, protocol=self.protocol)
        stream = Stream(stream_id, ours=ours, receive_window=self._window, negotiation=negotiation)
        self.streams[stream_id] = stream
        self.deadlines[stream] = (now_s + self._settings.negotiate_timeout, CloseReason.NEGOTIATE_TIMEOUT)
        if ours:
            self._count_ours += 1
        else:
            self._count_theirs += 1
        return stream, negotiation

    def _finish(self, stream: Stream, event: StreamEvent, reason: CloseReason) -> None:
        stream.move(event)
        stream.negotiation = None
        del self.streams[stream.id]
        self.deadlines.pop(stream, None)
        self.owing.pop(stream, None)
        if stream.ours:
            self._count_ours -= 1
        else:
            self._count_theirs -= 1
        self.events.append(StreamClosed(stream, reason))

    def _give_back(self, stream: Stream) -> None:
        if not self._sealer.seal_control(yamux.window_update(stream.id, stream.owed)):
            self.owing[stream] = None
            return
        stream.receive_window += stream.owed
        stream.owed = 0

    def _ask(self, frames: bytes) -> None:
        # In order, even where a small one would find room: a RST must not overtake its SYN.
        if self.postponed or not self._sealer.seal_control(frames):
            self.postponed.append(frames)

    def _answer(self, frame: bytes) -> None:
        # May overtake what is postponed: no answer is about a stream that waits there for its SYN.
        if not self._sealer.seal_control(frame):
            raise FloodError("the peer asks for more answers than it reads")
