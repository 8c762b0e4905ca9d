"""Superpackets cut in software: what comes out is whole, checksummed, and all there was."""

from __future__ import annotations

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packet.builder import V4, V6, ip, packet_of, record, slow_sum, tcp, udp, verify, vnet
from vpnd.errors import BadPacket
from vpnd.packet import checksum
from vpnd.packet.offload import finish_checksum, inspect_untrusted, must_cut, segment
from vpnd.packet.record import MAX_RECORD_BYTES, VNET, Capabilities, Offload, segments

EVERYTHING = Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.USO4 | Offload.USO6


def takes(offloads: int, max_record: int = MAX_RECORD_BYTES) -> Capabilities:
    return Capabilities(offloads=int(offloads), max_record=max_record, mtu=1400)


NOTHING = takes(0)
BODY = os.urandom(3000)

MUST_CUT = [
    # (sentence, virtio_net_hdr and packet, offloads of the peer, its max_record, expected)
    ("a plain packet suits everybody", bytes(10) + ip(V4, 1, b"x"), 0, 2000, False),
    ("a checksum to do needs CSUM", vnet(udp(V4, b"x")), 0, 2000, True),
    ("and CSUM is enough", vnet(udp(V4, b"x")), Offload.CSUM, 2000, False),
    ("TCP4 needs TSO4", vnet(tcp(V4, BODY), gso_size=1000), EVERYTHING & ~Offload.TSO4, 4000, True),
    ("TCP4 needs no TSO6", vnet(tcp(V4, BODY), gso_size=1000), Offload.CSUM | Offload.TSO4, 4000, False),
    ("TCP6 needs TSO6", vnet(tcp(V6, BODY), gso_size=1000), EVERYTHING & ~Offload.TSO6, 4000, True),
    ("ECN needs TSO_ECN", vnet(tcp(V4, BODY), gso_size=1000, gso_type=0x81), EVERYTHING, 4000, True),
    ("UDP4 needs USO4", vnet(udp(V4, BODY), gso_size=1000), EVERYTHING & ~Offload.USO4, 4000, True),
    ("UDP6 needs USO6", vnet(udp(V6, BODY), gso_size=1000), EVERYTHING & ~Offload.USO6, 4000, True),
    ("UDP6 with it", vnet(udp(V6, BODY), gso_size=1000), EVERYTHING, 4000, False),
    ("no offload without CSUM", vnet(udp(V4, BODY), gso_size=1000), Offload.USO4, 4000, True),
    ("larger than a record may be", vnet(tcp(V4, BODY), gso_size=1000), EVERYTHING, 3000, True),
    ("superpackets that were verified", vnet(tcp(V4, BODY), gso_size=1000, flags=2), EVERYTHING, 4000, True),
    ("an unknown type", vnet(tcp(V4, BODY), gso_size=1000, gso_type=0x21), EVERYTHING, 4000, True),
    (
        "more UDP segments than an older kernel takes",
        vnet(udp(V4, bytes(1000)), gso_size=10),
        EVERYTHING,
        4000,
        True,
    ),
]


@pytest.mark.parametrize(
    ("data", "offloads", "max_record", "expected"),
    [row[1:] for row in MUST_CUT],
    ids=[row[0] for row in MUST_CUT],
)
def test_must_cut(data: bytes, offloads: int, max_record: int, expected: bool) -> None:
    assert must_cut(memoryview(data), 0, len(data), takes(offloads, max_record)) is expected


superpackets = st.builds(
    lambda make, addresses, size, gso, seed, more: (
        make(addresses, (seed * (size // len(seed) + 1))[:size], **more),
        gso,
    ),
    st.sampled_from([udp, tcp]),
    st.sampled_from([V4, V6]),
    st.integers(1, 6000),
    st.integers(8, 2000),
    st.binary(min_size=1, max_size=300),
    st.fixed_dictionaries({"identity": st.integers(0, 65535), "tos": st.integers(0, 255)}),
)


@given(superpackets, st.booleans())
def test_pieces_are_whole_and_together_the_payload(made: tuple[bytes, int], finish: bool) -> None:
    packet, gso_size = made
    start = 20 if packet[0] >> 4 == 4 else 40
    header = start + (32 if packet[9 if start == 20 else 6] == 6 else 8)
    peer = NOTHING if finish else takes(Offload.CSUM)
    whole = record(vnet(packet, gso_size=gso_size))
    pieces = segment(memoryview(whole), peer)
    assert (
        len(pieces) == -(-(len(packet) - header) // gso_size) == segments(memoryview(whole), 0, len(whole), 1)
    )
    together = memoryview(b"".join([*pieces, whole]))
    assert segments(together, 0, len(together), len(pieces) + 1) == 2 * len(pieces), (
        "a span of several records"
    )
    payload = b""
    for count, piece in enumerate(pieces):
        inspect_untrusted(memoryview(piece), 4, len(piece) - 4)
        assert not must_cut(memoryview(piece), 4, len(piece) - 4, peer)
        if not finish:
            copy = bytearray(piece)
            finish_checksum(memoryview(copy), 4, len(copy) - 4)
            piece = bytes(copy)
        cut = packet_of(piece)
        verify(cut)
        if start == 20:
            assert (
                struct.unpack_from(">H", cut, 4)[0]
                == (struct.unpack_from(">H", packet, 4)[0] + count) & 0xFFFF
            )
        if header - start == 32:
            sequence = struct.unpack_from(">I", packet, start + 4)[0] + len(payload)
            assert struct.unpack_from(">I", cut, start + 4)[0] == sequence & 0xFFFFFFFF
        payload += cut[header:]
    assert payload == packet[header:]


def test_flags_go_where_they_belong() -> None:
    """CWR on the first, PSH and FIN on the last, the others on all."""
    data = record(vnet(tcp(V4, bytes(30), flags=0x80 | 0x40 | 0x10 | 0x08 | 0x01), gso_size=10))
    assert [packet_of(piece)[33] for piece in segment(memoryview(data), NOTHING)] == [0xD0, 0x50, 0x59]


@pytest.mark.parametrize("addresses", [V4, V6])
@pytest.mark.parametrize("make", [udp, tcp])
@pytest.mark.parametrize("size", [0, 1, 2, 1399])
def test_finish_checksum(addresses: tuple[str, str], make, size: int) -> None:
    data = bytearray(vnet(make(addresses, BODY[:size])))
    finish_checksum(memoryview(data), 0, len(data))
    assert data[:10] == bytes(10)
    verify(bytes(data[10:]))


def test_udp_checksum_is_never_zero() -> None:
    """A payload made to bring the sum to 0xFFFF: the checksum 0 is written as 0xFFFF, whole or cut."""
    wanted = 0xFFFF - slow_sum(udp(V4, b"\0\0")[20:28] + struct.pack(">I", 0))
    # The UDP header holds the pseudo header's sum already, so this is all that enters the checksum.
    data = bytearray(vnet(udp(V4, struct.pack(">H", wanted))))
    finish_checksum(memoryview(data), 0, len(data))
    assert data[36:38] == b"\xff\xff"
    (piece,) = segment(memoryview(record(vnet(udp(V4, struct.pack(">H", wanted)), gso_size=2))), NOTHING)
    assert packet_of(piece)[26:28] == b"\xff\xff"


def test_a_plain_packet_stays_as_it_is() -> None:
    data = record(bytes(10) + ip(V4, 1, b"ping"))
    assert segment(memoryview(data), NOTHING) == [data]


REFUSED = [
    ("a plain packet beyond max_record", bytes(10) + ip(V4, 1, bytes(2000)), 1500, "too_big"),
    ("a segment beyond max_record", vnet(tcp(V4, BODY), gso_size=1490), 1500, "too_big"),
    ("no packet", bytes(10), 1500, "malformed_local"),
    ("IPv6 cut in its header", bytes(10) + ip(V6, 59, b"")[:30], 1500, "malformed_local"),
    ("TCP's type over ICMP", vnet(ip(V4, 1, BODY), gso_size=1000), 1500, "malformed_local"),
    (
        "a fragment as a superpacket",
        vnet(udp(V4, BODY, fragment=0x2000), gso_size=1000),
        1500,
        "malformed_local",
    ),
    (
        "a superpacket of size 0",
        vnet(tcp(V4, BODY), gso_size=1)[:4] + b"\0\0" + vnet(tcp(V4, BODY))[6:],
        1500,
        "malformed_local",
    ),
    ("a checksum behind the packet", vnet(udp(V4, b""), csum_start=28), 1500, "malformed_local"),
]


@pytest.mark.parametrize(
    ("data", "max_record", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_refused(data: bytes, max_record: int, reason: str) -> None:
    with pytest.raises(BadPacket) as caught:
        segment(memoryview(record(data)), takes(0, max_record))
    assert caught.value.reason == reason


@given(st.binary(min_size=1, max_size=99).filter(any))
def test_checksum_against_the_slow_way(data: bytes) -> None:
    assert checksum.fold(checksum.total(data)) == slow_sum(data)
    assert checksum.complement(checksum.total(data)) == 0xFFFF - slow_sum(data)


def test_vnet_is_that_of_linux() -> None:
    assert VNET.size == 10
