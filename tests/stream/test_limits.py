"""What a session does when its send buffer is full, and which peers it does not put up with."""

from __future__ import annotations

import msgspec
import pytest

from shards.stream import spec, yamux
from shards.stream.events import Pong, StreamClosed, StreamReady
from shards.stream.session import Session
from shards.stream.yamux import Stream, StreamState
from stream.pair import FLOODS, OPENING, SMALL, Pair, Peer, drain, feed, reset, send, sendable, streams, take
from vpnd.config.schema import Session as Settings
from vpnd.errors import FloodError, LocalProtocolError, RemoteProtocolError

# --- a full send buffer


def fill(session: Session, stream: Stream) -> None:
    while room := sendable(session, stream):
        send(session, stream, bytes(room))


@pytest.mark.setting("session.receive_buffer_bytes")
@pytest.mark.parametrize("size", [1 << 17, 1 << 20])
def test_one_read_may_be_as_large_as_the_receive_buffer(size: int) -> None:
    assert len(Pair(Settings(receive_buffer_bytes=size)).a.receive_buffer()) == size


@pytest.mark.setting("session.control_reserve_bytes")
@pytest.mark.parametrize("reserve", [1 << 12, 1 << 15])
def test_data_leaves_the_reserve_to_answers(reserve: int) -> None:
    pair = Pair(Settings(send_buffer_bytes=1 << 17, control_reserve_bytes=reserve))
    stream, _ = pair.open()
    fill(pair.a, stream)
    left = (1 << 17) - len(pair.a.data_to_send())
    assert reserve <= left < reserve + 64


def test_what_the_caller_asks_of_a_full_session_waits_in_order() -> None:
    pair = Pair(Settings(send_buffer_bytes=1 << 17, control_reserve_bytes=1 << 12, max_streams=300))
    at_a, at_b = pair.open()
    fill(pair.a, at_a)
    opened = [pair.a.open_stream(0.0) for _ in range(100)]
    for stream in opened[:50]:
        reset(pair.a, stream)
    pair.a.close_stream(at_a)
    assert len(pair.a.data_to_send()) <= 1 << 17
    _, events_b = pair.shuttle()
    ready = [event.stream.id for event in events_b if type(event) is StreamReady]
    assert ready == [stream.id for stream in opened]
    closed = [event.stream.id for event in events_b if type(event) is StreamClosed]
    assert closed == [*(stream.id for stream in opened[:50]), at_b.id]


def test_what_waits_keeps_its_order_even_where_a_small_frame_would_fit() -> None:
    pair = Pair(SMALL)
    at_a, _ = pair.open()
    fill(pair.a, at_a)
    while len(pair.a.data_to_send()) + 100 <= 1 << 17:
        assert pair.a._sealer.seal_control(b"")
    late = pair.a.open_stream(0.0)
    reset(pair.a, late)
    full = len(pair.a.data_to_send())
    assert full + 30 <= 1 << 17, "the RST alone would fit"
    # An answer to the peer may pass what waits.
    pair.b.ping(0.0)
    feed(pair.a, take(pair.b))
    assert len(pair.a.data_to_send()) == full + 30
    _, events_b = pair.shuttle()
    assert [type(event) for event in events_b if type(event) is not tuple][-3:] == [
        Pong,
        StreamReady,
        StreamClosed,
    ]


def test_a_window_update_waits_for_room() -> None:
    pair = Pair(SMALL)
    at_a, at_b = pair.open()
    fill(pair.b, at_b)
    # Only other sealed frames can take the reserve: pings of ours do.
    while len(pair.b.data_to_send()) + 30 <= 1 << 17:
        assert pair.b._sealer.seal_control(bytes(12))
    full = len(pair.b.data_to_send())
    sent = 0
    while sent < 1 << 17:
        size = min(sendable(pair.a, at_a), 60_000)
        send(pair.a, at_a, bytes(size))
        sent += size
        feed(pair.b, take(pair.a))
    assert len(pair.b.data_to_send()) == full and at_b.owed >= 1 << 17
    take(pair.b)
    assert at_b.owed == 0 and len(pair.b.data_to_send()) == 30


ANSWERED = ("pings", "streams over the limit", "streams opened and dropped")


@pytest.mark.parametrize("flood", ANSWERED)
def test_a_peer_that_asks_and_does_not_read_is_cut_off(flood: str) -> None:
    settings = msgspec.structs.replace(SMALL, control_burst=1 << 20)
    peer = Peer(settings)
    peer.open()
    with pytest.raises(RemoteProtocolError, match="answers"):
        for n in range(20_000):
            peer.say(FLOODS[flood](n))
            assert len(peer.session.data_to_send()) <= settings.send_buffer_bytes
            if n % 500 == 0:
                assert len(streams(peer.session)) <= settings.max_streams


@pytest.mark.setting("session.control_burst")
@pytest.mark.parametrize("burst", [256, 2048])
@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_control_frames_ends_the_session(flood: str, burst: int) -> None:
    peer = Peer(msgspec.structs.replace(SMALL, control_burst=burst))
    peer.open()
    said = 0
    with pytest.raises(FloodError):
        while said < 2 * burst:
            peer.say(FLOODS[flood](said))
            peer.hear()
            said += 1
    assert burst // 2 - 10 <= said <= burst


@pytest.mark.setting("session.control_rate")
@pytest.mark.parametrize(("rate", "survives"), [(100.0, True), (50.0, False)])
def test_control_frames_at_their_rate_may_go_on_for_ever(rate: float, survives: bool) -> None:
    peer = Peer(msgspec.structs.replace(SMALL, control_burst=256, control_rate=rate))
    try:
        for n in range(5000):
            peer.say(yamux.ping(n, spec.FLAG_SYN), now_s=n / 99)
            peer.hear()
    except FloodError:
        assert not survives
    else:
        assert survives


def test_window_updates_for_what_was_sent_are_no_flood() -> None:
    pair = Pair(msgspec.structs.replace(SMALL, control_burst=256, control_rate=1.0))
    at_a, _ = pair.open()
    for _ in range(800):  # half a window each: 800 window updates
        size = min(sendable(pair.a, at_a), 1 << 17)
        send(pair.a, at_a, bytes(size))
        pair.shuttle()
    assert at_a.state is StreamState.READY


def test_packets_whose_last_bytes_take_a_message_of_their_own_are_no_flood() -> None:
    pair = Pair(msgspec.structs.replace(SMALL, control_burst=256, control_rate=1))
    at_a, _ = pair.open()
    for _ in range(600):
        assert send(pair.a, at_a, bytes(spec.MAX_FRAME_PAYLOAD_BYTES + 5))
        pair.shuttle()
    assert at_a.state is StreamState.READY


@pytest.mark.parametrize("budget", [16, 5000])
def test_a_turn_ends_with_its_budget_and_the_next_one_goes_on(budget: int) -> None:
    peer = Peer(msgspec.structs.replace(SMALL, control_burst=1 << 20))
    stream = peer.open()
    peer.session.budget = 0
    record = bytes(34)
    assert peer.say(*[yamux.data_frame(1, record) * 100 for _ in range(20)]) == []
    got = turns = 0
    while True:
        peer.session.budget = budget
        now = drain(peer.session)
        assert len(now) <= budget
        got += sum(data == record and of is stream for of, data in now)
        turns += 1
        if peer.session.budget > 0:
            break
    assert got == 2000 and abs(turns - 2020 / budget) <= 1


def test_streams_over_the_limit_are_refused_and_their_frames_skipped() -> None:
    peer = Peer(Settings(max_streams=1))
    stream = peer.open(1)
    assert peer.say(yamux.data_frame(3, OPENING, spec.FLAG_SYN), yamux.data_frame(3, b"more")) == []
    assert peer.hear() == [(spec.TYPE_WINDOW_UPDATE, spec.FLAG_RST, 3, 0, b"")]
    assert peer.say(yamux.data_frame(1, b"fine")) == [(stream, b"fine")]


# --- faults

BIG = Settings().window_bytes
FAULTS: list[tuple[str, bytes]] = [
    ("another version", spec.HEADER.pack(1, 0, 0, 1, 0)),
    ("an unknown type", spec.HEADER.pack(0, 4, 0, 0, 0)),
    ("data of the session", yamux.data_frame(0, b"x")),
    ("a window update of the session", yamux.window_update(0, 1)),
    ("a ping of a stream", spec.HEADER.pack(0, spec.TYPE_PING, spec.FLAG_SYN, 1, 0)),
    ("a go-away of a stream", spec.HEADER.pack(0, spec.TYPE_GO_AWAY, 0, 1, 0)),
    ("data of a stream never opened", yamux.data_frame(3, b"x")),
    ("data of a stream of ours never opened", yamux.data_frame(2, b"x")),
    ("a reset of a stream never opened", yamux.window_update(3, 0, spec.FLAG_RST)),
    ("a stream of our parity", yamux.window_update(2, 0, spec.FLAG_SYN)),
    ("a stream opened twice", yamux.window_update(1, 0, spec.FLAG_SYN)),
    ("a frame longer than any window", spec.HEADER.pack(0, 0, 0, 1, BIG + 1)),
    ("more than the window", spec.HEADER.pack(0, 0, 0, 1, BIG)),
    ("a window over 32 bits", yamux.window_update(1, 2**32 - 1) + yamux.window_update(1, 2**32 - 1)),
    ("no multistream", yamux.data_frame(3, b"\x04GET \n", spec.FLAG_SYN)),
]


@pytest.mark.parametrize(("sentence", "frames"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_of_the_peer_ends_the_session(sentence: str, frames: bytes) -> None:
    peer = Peer()
    stream = peer.open(1)
    with pytest.raises(RemoteProtocolError):
        peer.say(frames)
    # The session is dead, says so again, and tells the peer.
    with pytest.raises(RemoteProtocolError):
        peer.session.next_event(0.0)
    assert sendable(peer.session, stream) == 0
    with pytest.raises(LocalProtocolError):
        peer.session.open_stream(0.0)
    peer.session.ping(0.0)
    peer.session.close_stream(stream)
    reset(peer.session, stream)
    peer.session.consumed(stream, 1)
    peer.session.handle_timer(1e9)
    assert peer.session.next_timer_s() is None
    assert peer.hear()[-1] == (spec.TYPE_GO_AWAY, 0, 0, spec.GO_AWAY_PROTOCOL_ERROR, b"")


def test_used_ids_stay_used_after_the_stream_has_ended() -> None:
    peer = Peer()
    peer.open(5)
    peer.say(yamux.window_update(5, 0, spec.FLAG_RST))
    assert peer.say(yamux.data_frame(5, b"late"), yamux.data_frame(3, b"skipped id")) == []
    with pytest.raises(RemoteProtocolError, match="longer"):
        peer.say(spec.HEADER.pack(0, 0, 0, 5, BIG + 1))
    for stream_id in (5, 3):
        again = Peer()
        again.open(5)
        with pytest.raises(RemoteProtocolError):
            again.say(yamux.window_update(stream_id, 0, spec.FLAG_SYN))


def test_a_stream_that_is_opened_and_reset_in_one_frame_never_was() -> None:
    peer = Peer()
    assert peer.say(yamux.window_update(1, 0, spec.FLAG_SYN | spec.FLAG_RST)) == []
    assert peer.hear() == []
