"""Opening a stream: both roles, any cuts, any bytes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shards.stream import spec
from shards.stream.negotiate import (
    MULTISTREAM_ITEM,
    NOT_AVAILABLE_ITEM,
    Beside,
    Negotiation,
    Outcome,
    decode_hello_untrusted,
    encode_hello,
    item,
    packet_protocol,
)
from stream.pair import HELLO_A, HELLO_B
from vpnd.errors import LocalProtocolError, RemoteProtocolError
from vpnd.packet.record import Capabilities

PROTOCOL = packet_protocol(HELLO_A)
PROTOCOL_ITEM = PROTOCOL.item
OURS = PROTOCOL.hello_item
THEIRS = encode_hello(HELLO_B)
ACCEPTED = MULTISTREAM_ITEM + PROTOCOL_ITEM + THEIRS


def side(opener: bool) -> Negotiation:
    return Negotiation(opener=opener, protocol=PROTOCOL)


def run(negotiation: Negotiation, parts: list[bytes]) -> tuple[bytes, bytes]:
    """Answers, and the bytes that were not taken."""
    answers = left = b""
    for part in parts:
        used, answer = negotiation.feed_untrusted(memoryview(part))
        answers += answer
        left += part[used:]
    return answers, left


def body(**fields: object) -> bytes:
    values: dict[str, object] = {"version": 1, "offloads": 7, "max_record": 65589, "mtu": 1400}
    return msgspec.msgpack.encode({k: v for k, v in (values | fields).items() if v is not None})


def test_items_are_those_of_the_specification() -> None:
    assert MULTISTREAM_ITEM == b"\x13/multistream/1.0.0\n"
    assert PROTOCOL_ITEM == b"\x13/vpnd/packet/1.0.0\n"
    assert NOT_AVAILABLE_ITEM == b"\x03na\n"
    assert item(bytes(300))[:2] == b"\xac\x02"  # 300 as in the varint specification
    assert side(opener=True).opening() == MULTISTREAM_ITEM + PROTOCOL_ITEM + OURS


@given(st.lists(st.integers(0, len(ACCEPTED)), max_size=8), st.binary(max_size=40), st.booleans())
def test_any_cuts_agree_and_leave_the_payload(cuts: list[int], payload: bytes, opener: bool) -> None:
    data = ACCEPTED + payload
    places = sorted({0, *cuts, len(data)})
    negotiation = side(opener)
    answers, left = run(negotiation, [data[a:b] for a, b in zip(places, places[1:], strict=False)])
    assert negotiation.outcome is Outcome.AGREED
    assert negotiation.hello == HELLO_B
    assert left == payload
    assert answers == (b"" if opener else MULTISTREAM_ITEM + PROTOCOL_ITEM + OURS)


def test_byte_by_byte() -> None:
    for opener in (True, False):
        negotiation = side(opener)
        run(negotiation, [ACCEPTED[n : n + 1] for n in range(len(ACCEPTED))])
        assert negotiation.outcome is Outcome.AGREED


def test_an_answerer_answers_item_by_item() -> None:
    negotiation = side(opener=False)
    assert negotiation.feed_untrusted(memoryview(MULTISTREAM_ITEM))[1] == MULTISTREAM_ITEM
    assert negotiation.feed_untrusted(memoryview(PROTOCOL_ITEM))[1] == PROTOCOL_ITEM + OURS
    assert negotiation.feed_untrusted(memoryview(THEIRS))[1] == b""
    assert negotiation.outcome is Outcome.AGREED


OUTCOMES = [
    # (sentence, opener, bytes, outcome, answer)
    ("na is a no", True, MULTISTREAM_ITEM + NOT_AVAILABLE_ITEM, Outcome.REFUSED, b""),
    (
        "another protocol is answered na, its HELLO is not looked at",
        False,
        MULTISTREAM_ITEM + item(b"/vpnd/packet/9.0.0\n") + b"\xff\xff\xff",
        Outcome.UNKNOWN_PROTOCOL,
        MULTISTREAM_ITEM + NOT_AVAILABLE_ITEM,
    ),
    (
        "ls is another protocol",
        False,
        MULTISTREAM_ITEM + item(b"ls\n"),
        Outcome.UNKNOWN_PROTOCOL,
        MULTISTREAM_ITEM + NOT_AVAILABLE_ITEM,
    ),
    (
        "half an item is no outcome",
        False,
        MULTISTREAM_ITEM + PROTOCOL_ITEM[:9],
        Outcome.UNDER_WAY,
        MULTISTREAM_ITEM,
    ),
]


@pytest.mark.parametrize(
    ("sentence", "opener", "data", "outcome", "answer"), OUTCOMES, ids=[o[0] for o in OUTCOMES]
)
def test_outcomes(sentence: str, opener: bool, data: bytes, outcome: Outcome, answer: bytes) -> None:
    negotiation = side(opener)
    assert run(negotiation, [data])[0] == answer
    assert negotiation.outcome is outcome


FAULTS = [
    ("an empty item", b"\x00"),
    ("a length over the limit", b"\x81\x08"),
    ("a length of three bytes", b"\x81\x81\x01"),
    ("a length with a useless byte", b"\x85\x00"),
    ("a line without end", item(b"/multistream/1.0.0")),
    ("another multistream", item(b"/multistream/2.0.0\n")),
    ("an answer that was not asked for", MULTISTREAM_ITEM + item(b"/other/1.0.0\n")),
    ("a HELLO over the limit", MULTISTREAM_ITEM + PROTOCOL_ITEM + item(bytes(257))),
    ("a HELLO that is no msgpack", MULTISTREAM_ITEM + PROTOCOL_ITEM + item(b"\xc1")),
]


@pytest.mark.parametrize(("sentence", "data"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_faults(sentence: str, data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        run(side(opener=True), [data])
    with pytest.raises(RemoteProtocolError):
        run(side(opener=True), [data[n : n + 1] for n in range(len(data))])


HELLOS = [
    # (sentence, body, good)
    ("as we send it", OURS[1:], True),
    ("a later version with more keys", body(version=2, colour="green", more=[1, {"a": None}]), True),
    ("version 0", body(version=0), False),
    ("no version", body(version=None), False),
    ("no mtu", body(mtu=None), False),
    ("an mtu no IPv4 network has", body(mtu=67), False),
    ("an mtu over an IP packet", body(mtu=65_536), False),
    ("a record that holds no packet", body(max_record=33), False),
    ("the smallest record", body(max_record=34), True),
    ("negative offloads", body(offloads=-1), False),
    ("offloads of more than 32 bits", body(offloads=1 << 32), False),
    ("text for a number", body(mtu="1400"), False),
    ("a fraction for a number", body(mtu=1400.5), False),
    ("a list", msgspec.msgpack.encode([1, 7, 65589, 1400]), False),
    ("bytes behind it", body() + b"\x00", False),
    ("cut", body()[:-1], False),
    (
        "a text that is not UTF-8 in a key to be ignored",
        body()[:0] + b"\x85" + body()[1:] + b"\xa1\xff\xa1\xff",
        True,
    ),
    ("deep nesting", b"\x91" * 255 + b"\xc0", False),
]


@pytest.mark.parametrize(("sentence", "data", "good"), HELLOS, ids=[hello[0] for hello in HELLOS])
def test_hellos(sentence: str, data: bytes, good: bool) -> None:
    if good:
        assert isinstance(decode_hello_untrusted(data)[0], Capabilities)
    else:
        with pytest.raises(RemoteProtocolError):
            decode_hello_untrusted(data)


@given(
    st.builds(
        Capabilities,
        offloads=st.integers(0, 2**32 - 1),
        max_record=st.integers(34, 2**32 - 1),
        mtu=st.integers(spec.MIN_MTU, spec.MAX_MTU),
    ),
    st.builds(Beside, st.integers(0, 2**32 - 1), *[st.integers(0, spec.MAX_PORT)] * 2),
)
def test_a_hello_comes_back(hello: Capabilities, beside: Beside) -> None:
    encoded = encode_hello(hello, beside)
    assert encoded[0] == len(encoded) - 1
    assert decode_hello_untrusted(encoded[1:]) == (hello, beside)


def test_who_takes_no_datagrams_says_what_was_always_said() -> None:
    assert encode_hello(HELLO_A, Beside()) == encode_hello(HELLO_A)
    assert msgspec.msgpack.decode(encode_hello(HELLO_A)[1:]).keys() == {
        "version",
        "offloads",
        "max_record",
        "mtu",
    }


def test_a_hello_of_ours_out_of_range_is_a_bug() -> None:
    with pytest.raises(LocalProtocolError):
        encode_hello(Capabilities(offloads=0, max_record=1 << 64, mtu=1400))


@given(st.binary(max_size=300), st.booleans())
@example(MULTISTREAM_ITEM + PROTOCOL_ITEM + item(b"\x91" * 255 + b"\xc0"), True)
@example(MULTISTREAM_ITEM + PROTOCOL_ITEM + item(b"\xa5\xff\xff\xff\xff\xff"), False)
def test_any_bytes_are_an_outcome_or_a_fault(data: bytes, opener: bool) -> None:
    """Entry of the fuzzer: RemoteProtocolError or nothing, and no more than one item held."""
    for start in (b"", MULTISTREAM_ITEM, MULTISTREAM_ITEM + PROTOCOL_ITEM):
        negotiation = side(opener)
        try:
            run(negotiation, [start, data])
        except RemoteProtocolError:
            continue
