"""What a record from a peer may look like: a table, and a fuzzer that only knows the contract."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from packet.builder import V4, V6, ip, tcp, udp, vnet
from vpnd.errors import BadPacket
from vpnd.packet.offload import inspect_untrusted
from vpnd.packet.offload.check import _check_offload
from vpnd.packet.record import GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, LENGTH, VNET, VNET_BYTES, segments

#: Fragmentation offload of UDP, deprecated in Linux.
DEPRECATED_GSO_UDP = 3


PLAIN = bytes(VNET_BYTES)
OPTIONS = bytes(4)  # IPv4: four times "end of options"
EXTENSION4 = b"\x11\0" + bytes(6)  # IPv6: destination options, then UDP
EXTENSION_TCP = b"\x06\0" + bytes(6)
BODY = bytes(range(256)) * 12


def within(outer: bytes, inner: bytes) -> bytes:
    """A packet in a packet, as Linux' tunnels leave it to a device: the inner checksum is still to be filled in."""
    header = vnet(inner)[:VNET_BYTES]
    flags, kind, length, size, start, place = VNET.unpack(header)
    return VNET.pack(flags, kind, length, size, len(outer) - len(inner) + start, place) + outer


ETHERNET = bytes(12) + b"\x08\0"
#: What stands between an outer and an inner IP header, and the outer protocol.
ENCAPSULATIONS = [
    ("VXLAN", 17, bytes([0x12, 0xB5, 0x12, 0xB5, 0, 0, 0, 0]) + bytes(8) + ETHERNET),
    ("Geneve with options", 17, bytes([0x17, 0xC1, 0x17, 0xC1, 0, 0, 0, 0]) + bytes(16) + ETHERNET),
    ("GRE", 47, b"\0\0\x08\0"),
    ("GRE with a key", 47, b"\x20\0\x08\0" + bytes(4)),
    ("GRE with Ethernet", 47, b"\0\0\x65\x58" + ETHERNET),
    ("IPIP", 4, b""),
]
ENCAPSULATED = [
    (
        f"{name}: {kind.__name__} over IPv{6 if inner is V6 else 4} in IPv{6 if outer is V6 else 4}",
        within(ip(outer, 41 if protocol == 4 and inner is V6 else protocol, between + kind(inner, b"x" * 40)),
               kind(inner, b"x" * 40)),
    )
    for name, protocol, between in ENCAPSULATIONS
    for outer in (V4, V6)
    for inner in (V4, V6)
    for kind in (tcp, udp)
]  # fmt: skip

GOOD = [
    ("a bare IPv4 header", PLAIN + ip(V4, 1, b"")),
    ("a bare IPv6 header", PLAIN + ip(V6, 59, b"")),
    ("IPv4 with options", PLAIN + ip(V4, 1, b"abc", options=OPTIONS)),
    ("a fragment", PLAIN + ip(V4, 17, b"abc", fragment=0x2001)),
    (
        "a fragment whose datagram was verified",
        vnet(ip(V4, 17, b"abc", fragment=1), flags=2, csum_start=0, csum_offset=0),
    ),
    ("UDP with its checksum to do", vnet(udp(V4, b"x"))),
    ("TCP with its checksum to do", vnet(tcp(V4, b"x"))),
    ("UDP over IPv6", vnet(udp(V6, b"x"))),
    ("TCP over IPv6", vnet(tcp(V6, b""))),
    ("UDP behind IPv4 options", vnet(udp(V4, b"x", options=OPTIONS))),
    ("UDP behind an extension header", vnet(udp(V6, b"x", options=EXTENSION4))),
    ("a TCP superpacket", vnet(tcp(V4, BODY), gso_size=1000)),
    ("one with the ECN bit", vnet(tcp(V4, BODY), gso_size=1000, gso_type=GSO_TCPV4 | GSO_ECN)),
    ("a TCP superpacket over IPv6", vnet(tcp(V6, BODY), gso_size=1000)),
    ("hdr_len of a packet that was all linear", vnet(tcp(V4, BODY), gso_size=1000, hdr_len=52 + len(BODY))),
    ("hdr_len left out", vnet(tcp(V4, BODY), gso_size=1000, hdr_len=0)),
    ("a UDP superpacket", vnet(udp(V4, BODY), gso_size=1000)),
    ("a UDP superpacket over IPv6", vnet(udp(V6, BODY), gso_size=1000)),
    ("64 segments", vnet(udp(V4, bytes(640)), gso_size=10)),
    ("the largest IPv4 packet", PLAIN + ip(V4, 1, bytes(65515))),
    ("the largest IPv6 superpacket", vnet(udp(V6, bytes(65527)), gso_size=1300)),
    *ENCAPSULATED,
]

INNER = udp(V4, b"x" * 40)
IN_GRE = within(ip(V4, 47, b"\0\0\x08\0" + INNER), INNER)


def with_header(data: bytes, **fields: int) -> bytes:
    """Other values in the virtio_net_hdr."""
    names = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
    return (
        VNET.pack(*(dict(zip(names, VNET.unpack(data[:VNET_BYTES]), strict=True)) | fields).values())
        + data[VNET_BYTES:]
    )


MALFORMED = [
    ("nothing", b""),
    ("no packet", PLAIN),
    ("IPv4 cut in its header", PLAIN + ip(V4, 1, b"")[:19]),
    ("IPv6 cut in its header", PLAIN + ip(V6, 59, b"")[:39]),
    ("IP version 5", PLAIN + b"\x55" + ip(V4, 1, b"")[1:]),
    ("IP version 0", PLAIN + bytes(40)),
    ("IPv4 shorter than it says", PLAIN + ip(V4, 1, b"abcd")[:-1]),
    ("IPv4 longer than it says", PLAIN + ip(V4, 1, b"abcd") + b"x"),
    ("IPv6 shorter than it says", PLAIN + ip(V6, 59, b"abcd")[:-1]),
    ("IPv6 longer than it says", PLAIN + ip(V6, 59, b"abcd") + b"x"),
    ("IPv4 header of 16 bytes", PLAIN + b"\x44" + ip(V4, 1, b"abcd")[1:]),
    ("IPv4 header beyond the packet", PLAIN + b"\x4f" + ip(V4, 1, b"abcd")[1:]),
    ("IPv4 of length 0, as BIG TCP has it", PLAIN + ip(V4, 6, b"abcd").replace(b"\0\x18", b"\0\0", 1)),
]

BAD_OFFLOAD = [
    ("an unknown flag", vnet(udp(V4, b"x"), flags=5)),
    ("both flags", vnet(udp(V4, b"x"), flags=3)),
    ("a verified superpacket", vnet(tcp(V4, BODY), gso_size=1000, flags=2)),
    ("a superpacket without a checksum to do", vnet(tcp(V4, BODY), gso_size=1000, flags=0)),
    ("fields without the flag that gives them sense", vnet(udp(V4, b"x"), flags=0)),
    ("a gso_size without a gso_type", vnet(udp(V4, b"x"), gso_type=0, gso_size=9)),
    ("an hdr_len without a gso_type", vnet(udp(V4, b"x"), hdr_len=28)),
    ("csum_start one too far", vnet(udp(V4, b"x"), csum_start=21)),
    ("csum_start in the IP header", vnet(udp(V4, b"x"), csum_start=10)),
    ("csum_start behind the packet", vnet(udp(V4, b"x"), csum_start=60000)),
    ("the TCP offset in UDP", vnet(udp(V4, BODY), csum_offset=16)),
    ("the UDP offset in TCP", vnet(tcp(V4, BODY), csum_offset=6)),
    ("a csum_offset into the data", vnet(udp(V4, BODY), csum_offset=300)),
    ("within a packet: one too far", with_header(IN_GRE, csum_start=45)),
    ("within a packet: behind its end", with_header(IN_GRE, csum_start=60000)),
    ("within a packet: in the outer header", with_header(IN_GRE, csum_start=16)),
    ("within a packet: the TCP offset in UDP", with_header(IN_GRE, csum_offset=16)),
    ("within a packet: another offset", with_header(IN_GRE, csum_offset=2)),
    ("within a packet: a superpacket", with_header(IN_GRE, gso_type=GSO_UDP_L4, gso_size=8)),
    ("within a packet: cut in its header", within(ip(V4, 47, b"\0\0\x08\0" + INNER[:27]), INNER[:27])),
    ("within a packet: TCP cut in its header", within(ip(V4, 4, tcp(V4, b"")[:39]), tcp(V4, b"")[:39])),
    ("within a packet: behind what is no IP header", within(ip(V4, 47, bytes(24) + INNER[20:]), INNER)),
    ("within a packet that has none: SCTP", within(ip(V4, 132, INNER), INNER)),
    ("ICMP has no such checksum", vnet(ip(V4, 1, BODY), csum_offset=2)),
    ("a fragment has no header to fill in", vnet(udp(V4, BODY, fragment=0x2000))),
    ("nor has a later fragment", vnet(udp(V4, BODY, fragment=0x0001))),
    ("UDP cut in its header", vnet(ip(V4, 17, bytes(7)))),
    ("TCP cut in its header", vnet(ip(V4, 6, bytes(19)))),
    ("an IPv6 fragment", vnet(ip(V6, 17, BODY, options=b"\x2c\0" + bytes(6) + b"\x11\0" + bytes(6)))),
    (
        "an extension header beyond the packet",
        vnet(ip(V6, 17, b"", options=b"\x11\xff" + bytes(6)), csum_start=2088),
    ),
    ("the type of IPv6 over IPv4", vnet(tcp(V4, BODY), gso_size=1000, gso_type=GSO_TCPV6)),
    ("the type of IPv4 over IPv6", vnet(tcp(V6, BODY), gso_size=1000, gso_type=GSO_TCPV4)),
    ("the type of TCP over UDP", vnet(udp(V4, BODY), gso_size=1000, gso_type=GSO_TCPV4)),
    ("the type of UDP over TCP", vnet(tcp(V4, BODY), gso_size=1000, gso_type=GSO_UDP_L4)),
    ("fragmentation offload", vnet(udp(V4, BODY), gso_size=1000, gso_type=DEPRECATED_GSO_UDP)),
    ("an unknown type", vnet(udp(V4, BODY), gso_size=1000, gso_type=2)),
    ("ECN without TCP", vnet(udp(V4, BODY), gso_size=1000, gso_type=GSO_UDP_L4 | GSO_ECN)),
    ("ECN alone", vnet(tcp(V4, BODY), gso_type=GSO_ECN)),
    (
        "a gso_size of 0",
        vnet(tcp(V4, BODY), gso_size=1000)[:4] + b"\0\0" + vnet(tcp(V4, BODY), gso_size=1000)[6:],
    ),
    ("a tiny gso_size", vnet(tcp(V4, BODY), gso_size=7)),
    ("a gso_size beyond the packet", vnet(tcp(V4, b"x" * 100), gso_size=1000)),
    ("GSO_BY_FRAGS", vnet(tcp(V4, BODY), gso_size=65535)),
    ("an hdr_len beyond the packet", vnet(tcp(V4, BODY), gso_size=1000, hdr_len=5000)),
    ("65 segments", vnet(udp(V4, bytes(641)), gso_size=10)),
    ("a UDP length that is not the packet's", vnet(ip(V4, 17, udp(V4, BODY)[20:-1]), gso_size=1000)),
    ("a superpacket without data", vnet(tcp(V4, b""), gso_size=40)),
    (
        "a TCP header of 16 bytes",
        vnet(tcp(V4, BODY, options=b"")[:32] + b"\x40" + tcp(V4, BODY, options=b"")[33:], gso_size=1000),
    ),
    (
        "TCP options beyond the packet",
        vnet(tcp(V4, b"", options=b"")[:32] + b"\xf0" + tcp(V4, b"", options=b"")[33:], gso_size=30),
    ),
]


def cases(*tables):
    rows = [(data, reason) for reason, table in tables for _, data in table]
    return pytest.mark.parametrize(
        ("data", "reason"), rows, ids=[sentence for _, table in tables for sentence, _ in table]
    )


def on_a_link(data: bytes) -> int:
    """How many packets a record is there, by the count that is made of what is sent."""
    record = LENGTH.pack(len(data)) + data
    return segments(memoryview(record), 0, len(record), 1)


@pytest.mark.parametrize("data", [data for _, data in GOOD], ids=[sentence for sentence, _ in GOOD])
@pytest.mark.parametrize("offset", [0, 5])
def test_accepted(data: bytes, offset: int) -> None:
    buffer = memoryview(b"\xee" * offset + data + b"\xee" * 3)
    version, source, destination, whole = inspect_untrusted(buffer, offset, len(data))
    assert whole == on_a_link(data)
    assert version == data[VNET_BYTES] >> 4
    packet = data[VNET_BYTES:]
    addresses = packet[12:20] if version == 4 else packet[8:40]
    half = len(addresses) // 2
    assert (source, destination) == (int.from_bytes(addresses[:half]), int.from_bytes(addresses[half:]))


@cases(("malformed_remote", MALFORMED), ("bad_offload_header", BAD_OFFLOAD))
def test_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadPacket) as caught:
        inspect_untrusted(memoryview(data), 0, len(data))
    assert caught.value.reason == reason


@given(
    base=st.sampled_from([data for _, data in GOOD if len(data) < 4000]),
    changes=st.lists(st.tuples(st.integers(0, 110), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 80),
)
@example(base=dict(GOOD)["64 segments"][:300], changes=[], cut=0)
def test_anything_else_is_a_bad_packet(base: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    """Whatever the bytes, with nothing behind them: an answer, or BadPacket with one of two reasons."""
    data = bytearray(base[: len(base) - cut])
    for place, value in changes:
        if place < len(data):
            data[place] = value
    try:
        version, source, destination, whole = inspect_untrusted(memoryview(data), 0, len(data))
    except BadPacket as error:
        assert error.reason in ("malformed_remote", "bad_offload_header")
    else:
        bits = 32 if version == 4 else 128
        assert 0 <= source < 1 << bits
        assert 0 <= destination < 1 << bits
        assert whole == on_a_link(data)
        if any(data[:VNET_BYTES]):
            assert _check_offload(memoryview(data), 0, len(data) - VNET_BYTES) == whole, (
                "no short cut says else"
            )
        flags, gso_type, header, _, start, place = VNET.unpack_from(data)
        assert header <= len(data) - VNET_BYTES
        assert not gso_type or flags == 1
        assert flags != 1 or start + place + 2 <= len(data) - VNET_BYTES


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    with suppress(BadPacket):
        inspect_untrusted(memoryview(data), 0, len(data))
