"""ICMP echo: requests as RFC 792 and RFC 4443 have them, and nothing but a whole reply taken for one."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.errors import BadPacket
from vpnd.packet import icmp


def plain_checksum(data: bytes) -> int:
    """RFC 1071, word by word."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) & ~1]))
    total += data[-1] << 8 if len(data) & 1 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def message(
    kind: int = 0, code: int = 0, payload: bytes = b"nonce", identifier: int = 7, sequence: int = 9
) -> bytes:
    body = struct.pack(">BBHHH", kind, code, 0, identifier, sequence) + payload
    return body[:2] + plain_checksum(body).to_bytes(2, "big") + body[4:]


def ipv4(payload: bytes, protocol: int = 1, options: bytes = b"") -> bytes:
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x45 + len(options) // 4, 0, 20 + len(options) + len(payload), 0, 0, 64, protocol, 0,
        bytes([10, 86, 0, 2]), bytes([10, 86, 0, 1]),
    )  # fmt: skip
    return header + options + payload


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=64))
def test_a_request_is_what_the_rfcs_say(identifier, sequence, payload):
    four = icmp.request(4, identifier, sequence, payload)
    assert four == message(8, 0, payload, identifier, sequence)
    six = icmp.request(6, identifier, sequence, payload)
    assert six == b"\x80\x00\x00\x00" + four[4:], "the kernel puts the checksum in"


REPLIES = [
    ("of IPv4", 4, ipv4(message()), b"nonce"),
    ("of IPv4 with options", 4, ipv4(message(), options=bytes(8)), b"nonce"),
    ("without a payload", 4, ipv4(message(payload=b"")), b""),
    ("of an odd length", 4, ipv4(message(payload=b"odd")), b"odd"),
    ("of IPv6", 6, message(129), b"nonce"),
]


@pytest.mark.parametrize(
    ("sentence", "version", "packet", "payload"), REPLIES, ids=[row[0] for row in REPLIES]
)
def test_a_reply_has_what_the_request_had(sentence, version, packet, payload):
    assert icmp.reply_untrusted(version, packet) == (7, 9, payload)


NONE = [
    ("nothing", 4, b""),
    ("an IPv4 header alone", 4, ipv4(b"")),
    ("a header cut short", 4, ipv4(message())[:19]),
    ("an ICMP header cut short", 4, ipv4(message(payload=b""))[:-1]),
    ("an IHL beyond the packet", 4, b"\x4f" + ipv4(message(payload=b""))[1:]),
    ("an IHL below 5", 4, b"\x44" + ipv4(message())[1:]),
    ("IPv6 where IPv4 was asked for", 4, b"\x65" + ipv4(message())[1:]),
    ("UDP", 4, ipv4(message(), protocol=17)),
    ("a request", 4, ipv4(message(8))),
    ("another code", 4, ipv4(message(0, 1))),
    ("a wrong checksum", 4, ipv4(message()[:-1] + b"E")),
    ("nothing of IPv6", 6, b""),
    ("a request of IPv6", 6, message(128)),
    ("a reply of IPv4 as one of IPv6", 6, message(0)),
    ("a header of ICMPv6 cut short", 6, message(129, payload=b"")[:-1]),
]


@pytest.mark.parametrize(("sentence", "version", "packet"), NONE, ids=[row[0] for row in NONE])
def test_what_is_no_reply_is_refused(sentence, version, packet):
    with pytest.raises(BadPacket):
        icmp.reply_untrusted(version, packet)


@given(
    st.sampled_from([4, 6]), st.binary(max_size=80) | st.binary(max_size=40).map(lambda end: b"\x45" + end)
)
def test_any_bytes_are_a_reply_or_a_bad_packet(version, packet):
    try:
        reply = icmp.reply_untrusted(version, packet)
    except BadPacket:
        return
    assert packet.endswith(reply.payload)


@given(st.integers(0, len(ipv4(message())) - 1), st.integers(1, 255))
def test_a_damaged_reply_is_refused_or_damaged_where_only_ip_looks(place, flip):
    whole = ipv4(message())
    damaged = whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :]
    try:
        reply = icmp.reply_untrusted(4, damaged)
    except BadPacket:
        return
    assert reply == (7, 9, b"nonce") and place < 20
