"""What a session does, and what it does not put up with; two engines, or one engine and hand-made frames."""

from __future__ import annotations

import gc
import random
import weakref

import pytest

from shards.stream import spec, yamux
from shards.stream.events import (
    CloseReason,
    Data,
    GoneAway,
    Pong,
    StreamClosed,
    StreamReady,
    WindowOpened,
)
from shards.stream.negotiate import MULTISTREAM_ITEM, NOT_AVAILABLE_ITEM, encode_hello, item
from shards.stream.noise import Sealer
from shards.stream.yamux import StreamEvent, StreamState
from stream.pair import (
    HELLO_A,
    HELLO_B,
    KEY_A,
    OPENING,
    PROTOCOL_ITEM,
    SMALL,
    Pair,
    Peer,
    cuts,
    drain,
    engine,
    feed,
    reset,
    send,
    sendable,
    streams,
    take,
)
from vpnd.config.schema import Session as Settings
from vpnd.errors import LocalProtocolError, RemoteProtocolError

# --- streams


@pytest.mark.parametrize("by_a", [True, False])
def test_a_stream_opens_in_one_round_trip_and_carries_both_ways(by_a: bool) -> None:
    pair = Pair()
    (pair.a if by_a else pair.b).open_stream(0.0)
    events_a, events_b = pair.shuttle()
    assert [event.hello for event in events_a if type(event) is StreamReady] == [HELLO_B]
    assert [event.hello for event in events_b if type(event) is StreamReady] == [HELLO_A]
    at_a, at_b = events_a[0].stream, events_b[0].stream
    assert at_a.id == at_b.id == (1 if by_a else 2)
    assert at_a.ours is by_a and at_b.ours is not by_a
    send(pair.a, at_a, b"from a")
    send(pair.b, at_b, b"from b")
    assert pair.shuttle() == ([(at_a, b"from b")], [(at_b, b"from a")])


def test_nothing_may_be_sent_before_the_hellos_are_exchanged() -> None:
    pair = Pair()
    stream = pair.a.open_stream(0.0)
    assert sendable(pair.a, stream) == 0
    assert not send(pair.a, stream, b"early")
    pair.shuttle()
    assert sendable(pair.a, stream) > 0


def test_both_windows_are_raised_when_a_stream_opens() -> None:
    pair = Pair(Settings(window_bytes=1 << 20, send_buffer_bytes=1 << 22))
    at_a, at_b = pair.open()
    # The negotiation's own bytes count, as all payload does.
    assert at_a.send_window == (1 << 20) - len(OPENING)
    assert at_b.send_window == (1 << 20) - len(MULTISTREAM_ITEM + PROTOCOL_ITEM + encode_hello(HELLO_B))
    assert at_a.receive_window + at_a.owed == 1 << 20


@pytest.mark.setting("session.window_bytes", "session.send_buffer_bytes")
def test_room_is_the_smaller_of_window_and_buffer() -> None:
    small_buffer = Pair(Settings(send_buffer_bytes=1 << 17))
    stream, _ = small_buffer.open()
    assert sendable(small_buffer.a, stream) < 1 << 17 < stream.send_window
    small_window = Pair(Settings(window_bytes=1 << 18, send_buffer_bytes=1 << 20))
    stream, _ = small_window.open()
    assert sendable(small_window.a, stream) == stream.send_window


def test_five_megabytes_each_way_through_the_smallest_buffers() -> None:
    pair = Pair(SMALL)
    at_a, at_b = pair.open()
    rng = random.Random(5)
    data = {"a": rng.randbytes(5_000_000), "b": rng.randbytes(5_000_000)}
    position = {"a": 0, "b": 0}
    got = {"a": bytearray(), "b": bytearray()}
    for _ in range(2000):
        for name, session, stream in (("a", pair.a, at_a), ("b", pair.b, at_b)):
            start = position[name]
            size = min(sendable(session, stream), len(data[name]) - start, rng.randrange(1, 200_000))
            if size:
                send(session, stream, data[name][start : start + size])
                position[name] += size
        # A socket that takes what it likes.
        to_b, to_a = take(pair.a, rng.randrange(200_000)), take(pair.b, rng.randrange(200_000))
        for name, session, wire in (("a", pair.b, to_b), ("b", pair.a, to_a)):
            for event in feed(session, wire):
                if type(event) is tuple:
                    got[name] += event[1]
        if len(got["a"]) == len(got["b"]) == 5_000_000:
            break
    assert got["a"] == data["a"] and got["b"] == data["b"]
    assert pair.a._sealer.nonce == pair.b._opener.nonce
    assert streams(pair.a) == [at_a] and at_a.state is StreamState.READY


def test_a_window_that_is_never_consumed_stops_the_sender() -> None:
    pair = Pair(Settings(window_bytes=1 << 18, send_buffer_bytes=1 << 20))
    at_a, at_b = pair.open()
    room = sendable(pair.a, at_a)
    send(pair.a, at_a, bytes(room))
    wire = take(pair.a)
    received = 0
    while wire:
        buffer = pair.b.receive_buffer()
        part, wire = wire[: len(buffer)], wire[len(buffer) :]
        buffer[: len(part)] = part
        pair.b.received(len(part))
        while (event := pair.b.next_event(0.0)) is not None:
            received += len(event.view) if type(event) is Data else 0
    assert received == room and sendable(pair.a, at_a) == 0
    assert not len(pair.b.data_to_send())
    pair.b.consumed(at_b, (1 << 17) - len(OPENING) - 1)
    assert not len(pair.b.data_to_send()), "less than half the window is not worth an update"
    pair.b.consumed(at_b, 1)
    events_a, _ = pair.shuttle()
    assert events_a == [WindowOpened(at_a)]
    assert sendable(pair.a, at_a) == 1 << 17


def test_more_consumed_than_received_is_the_callers_bug() -> None:
    pair = Pair()
    at_a, at_b = pair.open()
    send(pair.a, at_a, bytes(100))
    feed_only = take(pair.a)
    pair.b.receive_buffer()[: len(feed_only)] = feed_only
    pair.b.received(len(feed_only))
    pair.b.next_event(0.0)
    pair.b.consumed(at_b, 100)
    for count in (1, -1):
        with pytest.raises(LocalProtocolError):
            pair.b.consumed(at_b, count)
    send(pair.b, at_b, b"lives")
    assert pair.shuttle()[0] == [(at_a, b"lives")]


def test_whole_messages_are_held_to_the_window_too() -> None:
    """The fast path: every message is one frame."""
    peer = Peer(SMALL)
    stream = peer.open()
    left = stream.receive_window
    peer.session.consumed = lambda *_: None  # type: ignore[method-assign]
    while left:
        size = min(left, 60_000)
        peer.say(yamux.data_frame(1, bytes(size)))
        left -= size
    with pytest.raises(RemoteProtocolError, match="window"):
        peer.say(yamux.data_frame(1, b"x"))


@pytest.mark.parametrize("split", range(1, 13))
def test_payload_that_looks_like_a_frame_is_payload(split: int) -> None:
    """A tunnel in the tunnel: a message that would pass as a frame continues one that is under way."""
    peer = Peer()
    stream = peer.open()
    inner = yamux.data_frame(1, b"not ours to parse")
    outer = yamux.data_frame(1, inner)
    assert b"".join(data for _, data in peer.say(outer[:split], outer[split:])) == inner
    assert peer.say(outer) == [(stream, inner)]


def test_a_header_in_pieces_whose_rest_looks_like_a_frame() -> None:
    """Eleven bytes of a header end one message; the next, from the last byte on, is a whole frame, too."""
    peer = Peer()
    stream = peer.open()
    header = spec.HEADER.pack(0, 0, 0, 1, 256)  # its last byte is 0, as the first of a frame is
    looks = spec.HEADER.pack(0, 0, 0, 1, 257 - 12) + bytes(257 - 12)
    events = peer.say(header[:11], looks)
    assert b"".join(data for _, data in events) == looks[1:]
    assert all(got is stream for got, _ in events)


def test_send_takes_nothing_of_what_there_is_no_room_for() -> None:
    pair = Pair()
    stream, _ = pair.open()
    ring = memoryview(bytearray(1 << 20))
    assert not pair.a.send(stream, ring, 12, cuts(12, 13 + sendable(pair.a, stream)))
    assert not len(pair.a.data_to_send())


@pytest.mark.setting("session.max_streams")
def test_max_streams_of_ours_is_kept_and_closed_ones_do_not_count() -> None:
    pair = Pair(Settings(max_streams=2))
    first, _ = pair.open()
    pair.open()
    with pytest.raises(LocalProtocolError):
        pair.a.open_stream(0.0)
    pair.a.close_stream(first)
    pair.shuttle()
    pair.open()


# --- ends


@pytest.mark.parametrize("by_a", [True, False])
def test_close_delivers_what_was_sent_before_it_and_ends_both_sides(by_a: bool) -> None:
    pair = Pair()
    at_a, at_b = pair.open()
    closer, stream, other, far = (pair.a, at_a, pair.b, at_b) if by_a else (pair.b, at_b, pair.a, at_a)
    send(closer, stream, b"last")
    send(other, far, b"crossing")
    closer.close_stream(stream)
    closer.close_stream(stream)
    assert sendable(closer, stream) == 0
    events_a, events_b = pair.shuttle()
    near_events, far_events = (events_a, events_b) if by_a else (events_b, events_a)
    assert near_events == [(stream, b"crossing"), StreamClosed(stream, CloseReason.CLOSED)]
    assert far_events == [(far, b"last"), StreamClosed(far, CloseReason.CLOSED)]
    assert streams(pair.a) == streams(pair.b) == []


def test_both_sides_close_at_once() -> None:
    pair = Pair()
    at_a, at_b = pair.open()
    pair.a.close_stream(at_a)
    pair.b.close_stream(at_b)
    assert pair.shuttle() == (
        [StreamClosed(at_a, CloseReason.CLOSED)],
        [StreamClosed(at_b, CloseReason.CLOSED)],
    )


def test_reset_ends_both_sides_and_data_on_its_way_is_dropped() -> None:
    pair = Pair()
    at_a, at_b = pair.open()
    send(pair.b, at_b, bytes(100_000))
    reset(pair.a, at_a)
    reset(pair.a, at_a)
    assert pair.shuttle() == (
        [StreamClosed(at_a, CloseReason.RESET)],
        [StreamClosed(at_b, CloseReason.RESET_BY_PEER)],
    )
    pair.a.consumed(at_a, 10)  # of a closed stream: nothing happens
    pair.open()


def test_a_stream_closed_before_it_is_ready_is_reset() -> None:
    pair = Pair()
    stream = pair.a.open_stream(0.0)
    pair.a.close_stream(stream)
    events_a, events_b = pair.shuttle()
    assert events_a == [StreamClosed(stream, CloseReason.RESET)]
    assert [type(event) for event in events_b] == [StreamReady, StreamClosed]


def test_a_fin_behind_payload_comes_after_it() -> None:
    peer = Peer()
    stream = peer.open()
    events = peer.say(yamux.data_frame(1, b"last", spec.FLAG_FIN))
    assert events == [(stream, b"last"), StreamClosed(stream, CloseReason.CLOSED)]
    assert peer.hear() == [(spec.TYPE_WINDOW_UPDATE, spec.FLAG_FIN, 1, 0, b"")]


def test_a_fin_before_the_stream_is_ready() -> None:
    peer = Peer()
    (event,) = peer.say(yamux.data_frame(1, b"", spec.FLAG_SYN | spec.FLAG_FIN))
    assert event.reason is CloseReason.CLOSED_EARLY


@pytest.mark.setting("session.negotiate_timeout", "session.close_timeout")
def test_late_to_open_and_late_to_close() -> None:
    settings = Settings(negotiate_timeout=3.0, close_timeout=5.0)
    session = engine(True, settings)
    assert session.next_timer_s() is None
    stream = session.open_stream(10.0)
    assert session.next_timer_s() == 13.0
    session.handle_timer(12.9)
    assert drain(session, 12.9) == []
    session.handle_timer(13.0)
    assert drain(session, 13.0) == [StreamClosed(stream, CloseReason.NEGOTIATE_TIMEOUT)]
    assert session.next_timer_s() is None

    peer = Peer(settings)
    accepted = peer.open()
    assert peer.session.next_timer_s() is None
    drain(peer.session, 20.0)
    peer.session.close_stream(accepted)
    assert peer.session.next_timer_s() == 25.0
    peer.session.handle_timer(25.0)
    assert drain(peer.session) == [StreamClosed(accepted, CloseReason.CLOSE_TIMEOUT)]
    assert [frame[1] for frame in peer.hear()] == [spec.FLAG_FIN, spec.FLAG_RST]


def test_a_stream_the_peer_opens_is_timed_too() -> None:
    peer = Peer(Settings(negotiate_timeout=3.0))
    peer.say(yamux.window_update(1, 0, spec.FLAG_SYN), now_s=50.0)
    assert peer.session.next_timer_s() == 53.0
    peer.session.handle_timer(53.0)
    (event,) = drain(peer.session)
    assert event.reason is CloseReason.NEGOTIATE_TIMEOUT


def test_an_unknown_protocol_is_answered_na_and_closed() -> None:
    peer = Peer()
    other = MULTISTREAM_ITEM + item(b"/other/1.0.0\n") + b"whatever it says"
    (event,) = peer.say(yamux.data_frame(1, other, spec.FLAG_SYN))
    assert event.reason is CloseReason.UNKNOWN_PROTOCOL
    frames = peer.hear()
    assert frames[1][4] == MULTISTREAM_ITEM + NOT_AVAILABLE_ITEM
    assert frames[2][:3] == (spec.TYPE_WINDOW_UPDATE, spec.FLAG_FIN, 1)
    assert peer.say(yamux.data_frame(1, b"more of it"), yamux.window_update(1, 0, spec.FLAG_FIN)) == []


def test_a_no_to_ours() -> None:
    peer = Peer()
    stream = peer.session.open_stream(0.0)
    assert peer.hear()[1][4] == MULTISTREAM_ITEM + PROTOCOL_ITEM + encode_hello(HELLO_B)
    events = peer.say(yamux.data_frame(2, MULTISTREAM_ITEM + NOT_AVAILABLE_ITEM, spec.FLAG_ACK))
    assert events == [StreamClosed(stream, CloseReason.REFUSED)]


# --- the session's own frames


def test_each_ping_measures_its_round_trip() -> None:
    pair = Pair()
    first = pair.a.ping(1.0)
    second = pair.a.ping(1.125)
    events_a, _ = pair.shuttle(1.25)
    assert events_a == [Pong(first, 0.25), Pong(second, 0.125)]
    third = pair.a.ping(2.0)
    assert len({first, second, third}) == 3
    assert pair.shuttle(2.5)[0] == [Pong(third, 0.5)]


def test_a_ping_is_answered_with_its_value_and_no_honest_peer_answers_what_was_not_asked() -> None:
    peer = Peer()
    assert peer.say(yamux.ping(0xDEADBEEF, spec.FLAG_SYN)) == []
    assert peer.hear() == [(spec.TYPE_PING, spec.FLAG_ACK, 0, 0xDEADBEEF, b"")]
    peer.session.ping(1.0)
    ((_, _, _, value, _),) = peer.hear()
    assert peer.say(yamux.ping(value, spec.FLAG_ACK), now_s=3.0) == [Pong(value, 2.0)]
    with pytest.raises(RemoteProtocolError, match="a ping that was not sent"):
        peer.say(yamux.ping(value, spec.FLAG_ACK), now_s=4.0)


def test_go_away_refuses_new_streams_and_keeps_the_old() -> None:
    pair = Pair()
    at_a, at_b = pair.open()
    pair.b.open_stream(0.0)
    pair.a.go_away()
    events_a, events_b = pair.shuttle()
    assert GoneAway(spec.GO_AWAY_NORMAL) in events_b
    assert [event.reason for event in events_b if type(event) is StreamClosed] == [CloseReason.RESET_BY_PEER]
    assert events_a == []
    with pytest.raises(LocalProtocolError):
        pair.b.open_stream(0.0)
    send(pair.b, at_b, b"still")
    assert pair.shuttle()[0] == [(at_a, b"still")]


def test_leftover_plaintext_comes_first() -> None:
    first = (
        yamux.window_update(1, 0, spec.FLAG_SYN)
        + yamux.data_frame(1, OPENING)
        + yamux.data_frame(1, b"early")[:9]
    )
    session = engine(False, leftover=first)
    (event,) = drain(session)
    assert type(event) is StreamReady
    rest = Sealer(KEY_A, 2, 1 << 16, 0)
    rest.seal_control(yamux.data_frame(1, b"early")[9:])
    assert feed(session, bytes(rest.data_to_send())) == [(event.stream, b"early")]


def test_the_state_table_is_complete_and_closed_is_final() -> None:
    assert {state for state, _ in yamux.TRANSITIONS} == set(StreamState) - {StreamState.CLOSED}
    assert {happening for _, happening in yamux.TRANSITIONS} == set(StreamEvent)
    pair = Pair()
    stream, _ = pair.open()
    with pytest.raises(LocalProtocolError):
        stream.move(StreamEvent.AGREED)
    assert stream.state is StreamState.READY


def test_a_session_that_failed_is_gone_with_its_last_reference() -> None:
    """Its buffers are megabytes, and the garbage collector does not know how large they are."""
    session = engine(False)
    reference = weakref.ref(session)
    gc.disable()
    try:
        for _ in range(2):
            with pytest.raises(RemoteProtocolError):
                feed(session, b"\0\x20" + bytes(0x20))
        del session
        assert reference() is None
    finally:
        gc.enable()
