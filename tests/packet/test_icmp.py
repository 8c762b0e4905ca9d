"""ICMP echo: requests as RFC 792 and RFC 4443 have them, and nothing but a whole reply taken for one."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packet.builder import V4, V6, ip, slow_sum, tcp, udp
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


def fragment6(offset: int, following: int = 17) -> bytes:
    """A fragment of IPv6: a header of eight bytes that packet.builder does not know."""
    packet = ip(V6, 44, struct.pack(">BBHI", following, 0, offset << 3, 7) + bytes(40))
    return packet


ANSWERED = [
    ("UDP", udp(V4, b"x")),
    ("a TCP superpacket", tcp(V4, bytes(40_000))),
    ("one with options", udp(V4, b"x", options=bytes(8))),
    ("an echo request", ip(V4, 1, message(8))),
    ("a first fragment", udp(V4, bytes(600), fragment=0x2000)),
    ("UDP over IPv6", udp(V6, bytes(1300))),
    ("TCP over IPv6", tcp(V6, b"")),
    ("an echo request of IPv6", ip(V6, 58, message(128))),
    ("a first fragment of IPv6", fragment6(0)),
]


@pytest.mark.parametrize(("sentence", "packet"), ANSWERED, ids=[row[0] for row in ANSWERED])
def test_the_sender_of_what_has_no_way_is_told_by_its_own_packet(sentence, packet):
    answer = icmp.unreachable(memoryview(packet))
    assert answer is not None
    if packet[0] >> 4 == 4:
        assert answer[12:20] == packet[16:20] + packet[12:16] and answer[20:22] == b"\x03\x01"
        assert slow_sum(answer[:20]) == slow_sum(answer[20:]) == 0xFFFF
        assert len(answer) == struct.unpack_from(">H", answer, 2)[0] <= 576
        quoted = answer[28:]
    else:
        assert answer[8:40] == packet[24:40] + packet[8:24] and answer[40:42] == b"\x01\x03"
        pseudo = answer[8:40] + struct.pack(">II", len(answer) - 40, 58)
        assert slow_sum(pseudo + answer[40:]) == 0xFFFF
        assert len(answer) == 40 + struct.unpack_from(">H", answer, 4)[0] <= 1280
        quoted = answer[48:]
    assert packet.startswith(quoted) and len(quoted) >= min(len(packet), 28)
    assert icmp.unreachable(memoryview(answer)) is None, "no error about an error"


UNANSWERED = [
    ("nothing", b""),
    ("a header cut short", udp(V4, b"x")[:19]),
    ("an IHL beyond the packet", b"\x4f" + udp(V4, b"x")[1:30]),
    ("another version", b"\x50" + bytes(60)),
    ("a later fragment", udp(V4, b"x", fragment=0x2001)),
    ("an error of ICMP", ip(V4, 1, message(11))),
    ("a redirect", ip(V4, 1, message(5))),
    ("ICMP without a type", ip(V4, 1, b"")),
    ("multicast", udp(("10.86.0.1", "224.0.0.251"), b"x")),
    ("broadcast", udp(("10.86.0.1", "255.255.255.255"), b"x")),
    ("from nobody", udp(("0.0.0.0", "10.86.0.2"), b"x")),
    ("from this very machine", udp(("127.0.0.1", "10.86.0.2"), b"x")),
    ("an IPv6 header cut short", udp(V6, b"x")[:39]),
    ("a later fragment of IPv6", fragment6(1)),
    ("a fragment of an error of ICMPv6", fragment6(0, 58)),
    ("an error of ICMPv6", ip(V6, 58, message(2))),
    ("a redirect of IPv6", ip(V6, 58, message(137))),
    ("ICMPv6 without a type", ip(V6, 58, b"")),
    ("multicast of IPv6", udp((V6[0], "ff02::1"), b"x")),
    ("from nobody, IPv6", udp(("::", V6[1]), b"x")),
]


@pytest.mark.parametrize(("sentence", "packet"), UNANSWERED, ids=[row[0] for row in UNANSWERED])
def test_what_must_not_be_answered_is_not(sentence, packet):
    assert icmp.unreachable(memoryview(packet)) is None


@given(st.binary(max_size=80), st.sampled_from([b"\x45", b"\x60", b""]))
def test_no_packet_however_broken_is_more_than_unanswered(data, first):
    answer = icmp.unreachable(memoryview(first + data))
    assert answer is None or icmp.unreachable(memoryview(answer)) is None
