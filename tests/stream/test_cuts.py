"""The same bytes, however TCP and Noise cut them, are the same events; other bytes are a fault or nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.stream import spec, yamux
from shards.stream.noise import Sealer
from shards.stream.session import Session
from stream.pair import KEY_A, OPENING, SMALL, Peer, drain, engine, feed, streams, take
from vpnd.errors import RemoteProtocolError

RNG = random.Random(77)
BULK = RNG.randbytes(70_000)

#: One conversation of a dialing peer, as Yamux sees it.
TALK = b"".join(
    [
        yamux.window_update(1, 1000, spec.FLAG_SYN),
        yamux.data_frame(1, OPENING),
        yamux.ping(1, spec.FLAG_SYN),
        yamux.data_frame(1, b"one"),
        yamux.data_frame(3, OPENING + b"payload right behind the HELLO", spec.FLAG_SYN),
        yamux.data_frame(1, BULK),
        yamux.window_update(3, 5000),
        yamux.data_frame(3, b"two"),
        yamux.data_frame(1, b""),
        yamux.window_update(5, 0, spec.FLAG_SYN | spec.FLAG_RST),
        yamux.data_frame(5, b"skipped"),
        yamux.data_frame(3, b"last", spec.FLAG_FIN),
        yamux.data_frame(3, b"skipped, too"),
        yamux.go_away(0),
        yamux.window_update(1, 0, spec.FLAG_RST),
    ]
)


def summary(events: list[Any]) -> list[Any]:
    """Events with streams as ids, and neighbouring data of one stream joined."""
    out: list[Any] = []
    for event in events:
        if type(event) is tuple:
            stream, data = event
            if out and out[-1][0] == "data" and out[-1][1] == stream.id:
                out[-1] = ("data", stream.id, out[-1][2] + data)
            else:
                out.append(("data", stream.id, data))
        else:
            out.append((type(event).__name__, getattr(getattr(event, "stream", None), "id", None)))
    return out


def sealed(plaintexts: list[bytes]) -> bytes:
    sealer = Sealer(KEY_A, 2, 1 << 23, 0)
    for plaintext in plaintexts:
        assert sealer.seal_control(plaintext)
    return bytes(sealer.data_to_send())


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def messages(places: list[int]) -> list[bytes]:
    """TALK in messages cut there, and nowhere longer than a message may be."""
    return [
        part[at : at + spec.MAX_PLAINTEXT_BYTES]
        for part in cut(TALK, places)
        for at in range(0, len(part), spec.MAX_PLAINTEXT_BYTES)
    ]


EXPECTED = [
    ("StreamReady", 1),
    ("data", 1, b"one"),
    ("StreamReady", 3),
    ("data", 3, b"payload right behind the HELLO"),
    ("data", 1, BULK),
    ("WindowOpened", 3),
    ("data", 3, b"twolast"),
    ("StreamClosed", 3),
    ("GoneAway", None),
    ("StreamClosed", 1),
]


def test_whole() -> None:
    session = engine(False, SMALL)
    assert summary(feed(session, sealed(messages([])))) == EXPECTED


def test_byte_by_byte_on_the_wire() -> None:
    session = engine(False, SMALL)
    wire = sealed(messages([]))
    events: list[Any] = []
    for n in range(len(wire)):
        events += feed(session, wire[n : n + 1])
    assert summary(events) == EXPECTED


def test_byte_by_byte_inside_noise_around_every_header() -> None:
    """Every byte a message of its own, but for the bulk; empty messages between them."""
    bulk = TALK.index(BULK)
    plaintexts = [TALK[n : n + 1] for n in range(bulk)]
    plaintexts += [BULK[:60_000], BULK[60_000:]]
    plaintexts += [TALK[n : n + 1] for n in range(bulk + len(BULK), len(TALK))]
    with_empties = [part for plaintext in plaintexts for part in (plaintext, b"")]
    assert summary(feed(engine(False, SMALL), sealed(with_empties))) == EXPECTED


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1 << 20), max_size=40), st.lists(st.integers(0, 1 << 20), max_size=20))
def test_random_cuts_of_both_layers(inner: list[int], outer: list[int]) -> None:
    wire = sealed(messages(inner))
    session = engine(False, SMALL)
    events: list[Any] = []
    for part in cut(wire, outer):
        events += feed(session, part)
    assert summary(events) == EXPECTED


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1 << 20), max_size=40), st.integers(0, 1 << 20))
def test_leftover_takes_any_part_of_it(inner: list[int], split: int) -> None:
    split %= len(TALK) + 1
    session = engine(False, SMALL, leftover=TALK[:split])
    events = drain(session)
    rest = [part for part in cut(TALK[split:], inner) if part]
    rest = [part[at : at + 65519] for part in rest for at in range(0, len(part), 65519)]
    assert summary(events + feed(session, sealed(rest))) == EXPECTED


# --- fuzz: RemoteProtocolError or nothing, and no growth


def hammer(session: Session, wire: bytes) -> None:
    """Feed as a link would, with a socket that takes everything."""
    try:
        while wire:
            feed(session, wire[:10_000])
            wire = wire[10_000:]
            take(session)
    except RemoteProtocolError:
        assert not streams(session)
        with pytest.raises(RemoteProtocolError):
            session.next_event(0.0)
    assert len(streams(session)) <= 2 * SMALL.max_streams
    assert len(session.data_to_send()) <= SMALL.send_buffer_bytes
    assert len(session._header) < spec.HEADER_BYTES
    assert len(session._events) == 0


@settings(deadline=None)
@given(st.binary(max_size=2000))
def test_any_wire_bytes(data: bytes) -> None:
    hammer(engine(False, SMALL), data)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_any_plaintext(plaintexts: list[bytes]) -> None:
    hammer(engine(False, SMALL), sealed(plaintexts))


@st.composite
def frame(draw: st.DrawFn) -> bytes:
    """A frame that is right more often than not, with whatever payload."""
    kind = draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4]))
    flags = draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8, 5, 9, 12, 15, 0xFFFF]))
    stream_id = draw(st.sampled_from([0, 1, 1, 1, 2, 3, 5, 7, 2**32 - 1]))
    payload = draw(st.one_of(st.just(OPENING), st.binary(max_size=60)))
    if kind != spec.TYPE_DATA:
        length, payload = draw(st.sampled_from([0, 0, 1, 1000, 2**32 - 1])), b""
    else:
        length = len(payload) + draw(st.sampled_from([0, 0, 0, 0, 1, 300_000]))
    version = draw(st.sampled_from([0] * 20 + [1]))
    return spec.HEADER.pack(version, kind, flags, stream_id, length) + payload


@settings(max_examples=300, deadline=None)
@given(st.lists(frame(), max_size=30), st.lists(st.integers(0, 1 << 20), max_size=10))
def test_any_frames_after_a_stream_is_ready(frames: list[bytes], places: list[int]) -> None:
    peer = Peer(SMALL)
    peer.open(1)
    peer.session.open_stream(0.0)
    try:
        for plaintext in cut(b"".join(frames), places):
            peer.say(plaintext)
            peer.hear()
    except RemoteProtocolError:
        assert not streams(peer.session)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(TALK) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_conversation_with_wrong_bytes(changes: list[tuple[int, int]]) -> None:
    talk = bytearray(TALK)
    for place, byte in changes:
        # Headers and negotiations are the interesting places; the bulk is one payload among many.
        place = place if not 400 < place < len(talk) - 300 else place % 400
        talk[place] = byte
    parts = [bytes(talk[at : at + 65519]) for at in range(0, len(talk), 65519)]
    hammer(engine(False, SMALL), sealed(parts))
