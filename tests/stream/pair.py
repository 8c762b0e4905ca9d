"""Two engines wired back to back, one engine with a peer made by hand, and what the tests here share."""

from __future__ import annotations

from typing import Any

from shards.stream import spec, yamux
from shards.stream.events import Data, StreamReady
from shards.stream.negotiate import MULTISTREAM_ITEM, encode_hello, packet_protocol
from shards.stream.noise import Opener, Sealer
from shards.stream.session import Session
from shards.stream.yamux import Stream, StreamState
from vpnd.config.schema import Session as Settings
from vpnd.packet.record import Capabilities
from vpnd.session import CHACHAPOLY, Established

KEY_A = bytes(range(32))
KEY_B = bytes(range(32, 64))
HELLO_A = Capabilities(offloads=0x07, max_record=65_589, mtu=1400)
HELLO_B = Capabilities(offloads=0x01, max_record=1_600, mtu=1280)
#: What the dialing side sends first on a stream.
PROTOCOL_ITEM = packet_protocol(HELLO_A).item
OPENING = MULTISTREAM_ITEM + PROTOCOL_ITEM + encode_hello(HELLO_A)
SMALL = Settings(window_bytes=1 << 18, send_buffer_bytes=1 << 17, receive_buffer_bytes=1 << 17)

#: A record of 50,000 bytes.
_SLOW_PACKET = (50_000).to_bytes(4, "big") + bytes(50_000)
#: Frames that cost more than they carry, on streams from 3 on; stream 1 is ready.
FLOODS = {
    "pings": lambda n: yamux.ping(n, spec.FLAG_SYN),
    "streams over the limit": lambda n: yamux.window_update(2 * n + 3, 0, spec.FLAG_SYN),
    "streams opened and dropped": lambda n: (
        yamux.window_update(2 * n + 3, 0, spec.FLAG_SYN) + yamux.window_update(2 * n + 3, 0, spec.FLAG_RST)
    ),
    "go-aways": lambda n: yamux.go_away(spec.GO_AWAY_NORMAL),
    "window updates": lambda n: yamux.window_update(1, 1),
    "window updates of nothing": lambda n: yamux.window_update(1, 0),
    "acknowledgments": lambda n: yamux.window_update(1, 0, spec.FLAG_ACK),
    "data without data": lambda n: yamux.data_frame(1, b""),
    "a packet byte by byte": lambda n: yamux.data_frame(1, _SLOW_PACKET[n : n + 1]),
    "ends of streams that were": lambda n: yamux.window_update(1, 0, spec.FLAG_RST),
}


def engine(initiator: bool, settings: Settings | None = None, **changes: Any) -> Session:
    """One side; the other is engine(not initiator). Nonces start at different values on purpose."""
    values: dict[str, Any] = {
        "peer_id": "other",
        "cipher": CHACHAPOLY,
        "initiator": initiator,
        "send_key": KEY_A if initiator else KEY_B,
        "send_nonce": 2 if initiator else 7,
        "receive_key": KEY_B if initiator else KEY_A,
        "receive_nonce": 7 if initiator else 2,
        "leftover": b"",
    }
    hello = HELLO_A if initiator else HELLO_B
    return Session(Established(**(values | changes)), hello, settings or Settings(), 0.0)


def drain(session: Session, now_s: float = 0.0) -> list[Any]:
    """All events until more bytes are needed; Data becomes (stream, bytes), and is consumed."""
    events: list[Any] = []
    while (event := session.next_event(now_s)) is not None:
        if type(event) is Data:
            events.append((event.stream, bytes(event.view)))
            session.consumed(event.stream, len(event.view))
        else:
            events.append(event)
    return events


def feed(session: Session, data: bytes, now_s: float = 0.0) -> list[Any]:
    """Give bytes of the wire as the receive buffer takes them; return all events."""
    events: list[Any] = []
    while data:
        room = session.receive_buffer()
        assert room, "the receive buffer is full although all events were taken"
        taken = min(len(room), len(data))
        room[:taken] = data[:taken]
        session.received(taken)
        data = data[taken:]
        events += drain(session, now_s)
    return events


def take(session: Session, most: int | None = None) -> bytes:
    """What the session wants sent, at most so much of it."""
    data = bytes(session.data_to_send()[:most])
    session.data_sent(len(data))
    return data


def send(session: Session, stream: Stream, payload: bytes) -> bool:
    """send() from a ring of its own."""
    ring = bytearray(12) + payload
    return session.send(stream, memoryview(ring), 12, cuts(12, len(ring)))


def cuts(start: int, end: int) -> list[int]:
    """Where the messages of a span end that is cut without looking at its records."""
    return [*range(start + spec.MAX_FRAME_PAYLOAD_BYTES, end, spec.MAX_FRAME_PAYLOAD_BYTES), end]


def seal(sealer: Sealer, ring: memoryview, start: int, end: int, stream_id: int = 1) -> bool:
    """seal_data() of a span cut so; True when there is nothing to seal."""
    return start == end or sealer.seal_data(stream_id, ring, start, cuts(start, end))


def room(sealer: Sealer) -> int:
    """Payload bytes seal_data() has room for now, the overhead of every message taken off."""
    messages, rest = divmod(max(0, sealer._limit - sealer._tail), spec.MAX_WIRE_BYTES)
    return messages * spec.MAX_FRAME_PAYLOAD_BYTES + max(0, rest - spec.DATA_OVERHEAD_BYTES)


def sendable(session: Session, stream: Stream) -> int:
    """Payload bytes send() takes now."""
    return min(room(session._sealer), stream.send_window) if stream.state is StreamState.READY else 0


def reset(session: Session, stream: Stream) -> None:
    """End a stream both ways at once, as the engine does with one that is late."""
    session._table.reset(stream)


def streams(session: Session) -> list[Stream]:
    """Those that are not closed."""
    return list(session._streams.values())


class Pair:
    """`a` dialed `b`. `shuttle` carries bytes both ways until both are silent."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.a = engine(True, settings)
        self.b = engine(False, settings)

    def shuttle(self, now_s: float = 0.0) -> tuple[list[Any], list[Any]]:
        events_a: list[Any] = drain(self.a, now_s)
        events_b: list[Any] = drain(self.b, now_s)
        while True:
            to_b, to_a = take(self.a), take(self.b)
            if not to_a and not to_b:
                return events_a, events_b
            events_b += feed(self.b, to_b, now_s)
            events_a += feed(self.a, to_a, now_s)

    def open(self, by_a: bool = True) -> tuple[Stream, Stream]:
        """A ready stream, as a and as b see it."""
        (self.a if by_a else self.b).open_stream(0.0)
        events_a, events_b = self.shuttle()
        (at_a,) = [event.stream for event in events_a if type(event) is StreamReady]
        (at_b,) = [event.stream for event in events_b if type(event) is StreamReady]
        return at_a, at_b


class Peer:
    """The dialing side, by hand: seals any plaintext for a session and reads its frames."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.session = engine(False, settings)
        self._sealer = Sealer(KEY_A, 2, 1 << 22, 0)
        self._opener = Opener(KEY_B, 7, 1 << 20, 0)
        self._plain = b""

    def say(self, *messages: bytes, now_s: float = 0.0) -> list[Any]:
        """One Noise message each, all in one read; the session's events."""
        for message in messages:
            assert self._sealer.seal_control(message)
        wire = bytes(self._sealer.data_to_send())
        self._sealer.data_sent(len(wire))
        return feed(self.session, wire, now_s)

    def hear(self) -> list[tuple[int, int, int, int, bytes]]:
        """(type, flags, stream id, length, payload) of every whole frame the session has sent."""
        wire = take(self.session)
        while wire:
            room = self._opener.receive_buffer()
            part, wire = wire[: len(room)], wire[len(room) :]
            room[: len(part)] = part
            self._opener.received(len(part))
            while (size := self._opener.open_untrusted()) >= 0:
                self._plain += bytes(self._opener.plain[:size])
        frames = []
        while self._plain:
            _, kind, flags, stream_id, length = spec.HEADER.unpack_from(self._plain)
            end = 12 + (length if kind == spec.TYPE_DATA else 0)
            frames.append((kind, flags, stream_id, length, self._plain[12:end]))
            self._plain = self._plain[end:]
        return frames

    def open(self, stream_id: int = 1) -> Stream:
        """Open a stream the way an engine does; it is ready."""
        events = self.say(
            yamux.window_update(stream_id, 0, spec.FLAG_SYN) + yamux.data_frame(stream_id, OPENING)
        )
        assert [type(event) for event in events] == [StreamReady]
        self.hear()
        stream: Stream = events[0].stream
        return stream
