"""Datagrams merged into a superpacket: which are, and that cutting it gives the very same ones again."""

from __future__ import annotations

import os
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packet.builder import V4, V6, packet_of, record, tcp, udp, vnet
from vpnd.packet.offload import UdpCoalescer, finish_checksum, inspect_untrusted, segment
from vpnd.packet.record import LENGTH, MAX_RECORD_BYTES, Capabilities

NOTHING = Capabilities(offloads=0, max_record=MAX_RECORD_BYTES, mtu=1400)
BODY = os.urandom(1200)


def pump(packets: list[bytes], begin: int = 16, finish_after: int = 0) -> list[bytes]:
    """Packets (behind their virtio_net_hdr) read one by one into a ring; the records that came of it."""
    buffer = memoryview(bytearray(begin + sum(map(len, packets)) + MAX_RECORD_BYTES))
    coalescer = UdpCoalescer()
    records: list[int] = []
    end = begin
    for number, data in enumerate(packets):
        if number == finish_after:
            coalescer.finish()
        buffer[end + 4 : end + 4 + len(data)] = data
        grown = coalescer.merge(buffer, records[-1], end, len(data)) if records else 0
        if grown:
            end += grown
        else:
            LENGTH.pack_into(buffer, end, len(data))
            records.append(end)
            end += 4 + len(data)
    coalescer.finish()
    cut = [bytes(buffer[a:b]) for a, b in pairwise([*records, end])]
    assert all(LENGTH.unpack_from(one)[0] == len(one) - 4 for one in cut)
    return cut


def finished(data: bytes) -> bytes:
    """The packet as it is once somebody filled in its checksum."""
    copy = bytearray(data)
    finish_checksum(memoryview(copy), 0, len(copy))
    return bytes(copy[10:])


def flow(count: int, size: int = 1000, addresses: tuple[str, str] = V4, **more) -> list[bytes]:
    return [vnet(udp(addresses, BODY[i : i + size], identity=i, **more)) for i in range(count)]


@pytest.mark.parametrize("addresses", [V4, V6])
@pytest.mark.parametrize(
    ("count", "size", "records"), [(2, 1000, 1), (64, 100, 1), (65, 100, 2), (60, 1100, 2), (130, 1, 3)]
)
def test_a_flow_of_equal_datagrams(addresses: tuple[str, str], count: int, size: int, records: int) -> None:
    packets = flow(count, size, addresses)
    merged = pump(packets)
    assert len(merged) == records
    pieces = []
    for one in merged:
        inspect_untrusted(memoryview(one), 4, len(one) - 4)
        pieces += segment(memoryview(one), NOTHING)
    assert [packet_of(piece) for piece in pieces] == [finished(data) for data in packets]


def plain(**more) -> bytes:
    return vnet(udp(V4, BODY[:100], **more))


NOT_MERGED = [
    ("another source port", plain(), plain(ports=(5001, 6000))),
    ("another destination port", plain(), plain(ports=(5000, 6001))),
    ("another destination", plain(), vnet(udp(("10.86.0.1", "10.86.0.3"), BODY[:100]))),
    ("another source", plain(), vnet(udp(("10.86.0.9", "10.86.0.2"), BODY[:100]))),
    ("another TTL", plain(), plain(ttl=63)),
    ("congestion was experienced", plain(tos=2), plain(tos=3)),
    ("one with DF, one without", plain(), plain(fragment=0)),
    (
        "no DF and an identification that does not follow",
        plain(fragment=0, identity=5),
        plain(fragment=0, identity=7),
    ),
    ("no DF and the same identification", plain(fragment=0, identity=5), plain(fragment=0, identity=5)),
    ("a larger one", plain(), vnet(udp(V4, BODY[:101]))),
    ("an empty one", plain(), vnet(udp(V4, b""))),
    ("after an empty one", vnet(udp(V4, b"")), plain()),
    ("after one with bytes behind it", plain() + b"behind", plain()),
    (
        "after one of IPv6 with bytes behind it",
        vnet(udp(V6, BODY[:100])) + b"behind",
        vnet(udp(V6, BODY[:100])),
    ),
    ("fragments", plain(fragment=0x2000), plain(fragment=0x2000)),
    ("IPv4 options", plain(options=bytes(4)), plain(options=bytes(4))),
    ("a finished checksum", plain(), bytes(10) + plain()[10:]),
    ("after a finished checksum", bytes(10) + plain()[10:], plain()),
    ("a verified checksum", plain(), vnet(udp(V4, BODY[:100]), flags=2, csum_start=0, csum_offset=0)),
    ("TCP", vnet(tcp(V4, BODY[:100])), vnet(tcp(V4, BODY[:100]))),
    ("a superpacket behind one", plain(), vnet(udp(V4, BODY[:100]), gso_size=50)),
    ("IPv6 behind IPv4", plain(), vnet(udp(V6, BODY[:100]))),
    ("IPv4 behind IPv6", vnet(udp(V6, BODY[:100])), plain()),
    ("another flow label", vnet(udp(V6, BODY[:100])), vnet(udp(V6, BODY[:100], tos=1))),
    ("extension headers", *[vnet(udp(V6, BODY[:100], options=b"\x11\0" + bytes(6)))] * 2),
    ("a UDP length that is not the packet's", *[plain()[:34] + struct.pack(">H", 99) + plain()[36:]] * 2),
    (
        "behind a superpacket that ends short",
        vnet(udp(V4, BODY[:100]), gso_size=60),
        vnet(udp(V4, BODY[:60])),
    ),
]


@pytest.mark.parametrize(
    ("first", "second"), [row[1:] for row in NOT_MERGED], ids=[row[0] for row in NOT_MERGED]
)
def test_not_merged_and_untouched(first: bytes, second: bytes) -> None:
    assert pump([first, second]) == [record(first), record(second)]


MERGED = [
    ("DF and any identification", [plain(identity=9), plain(identity=3)], 100),
    (
        "no DF and consecutive identifications",
        [plain(fragment=0, identity=65535), plain(fragment=0, identity=0)],
        100,
    ),
    ("a short one ends it", [plain(), vnet(udp(V4, BODY[:7]))], 100),
    (
        "a superpacket of the kernel goes on",
        [vnet(udp(V4, BODY[:100]), gso_size=50), vnet(udp(V4, BODY[:50]))],
        50,
    ),
    ("with the same ECN bits", [plain(tos=3), plain(tos=3)], 100),
]


@pytest.mark.parametrize(("packets", "gso_size"), [row[1:] for row in MERGED], ids=[row[0] for row in MERGED])
def test_merged(packets: list[bytes], gso_size: int) -> None:
    (one,) = pump(packets)
    assert one[4:6] == b"\1\5"
    assert struct.unpack_from("<H", one, 8)[0] == gso_size
    assert one.endswith(packets[0][38:] + packets[1][38:])


@pytest.mark.parametrize("addresses", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_datagram_that_differs_anywhere_in_its_headers_ends_a_run(addresses: tuple[str, str]) -> None:
    """But for IPv4's identification, which has no meaning here, checksums, which are made anew, and what has no meaning
    in the virtio_net_hdr of a plain datagram."""
    run = flow(4, 100, addresses)
    headers = len(run[0]) - 100
    free = {2, 3, 4, 5, headers - 2, headers - 1}
    if addresses is V4:
        free |= {10 + 4, 10 + 5, 10 + 10, 10 + 11}
    for at in range(headers):
        other = bytearray(run[3])
        other[at] ^= 0x11
        merged = pump([*run[:3], bytes(other)])
        (whole,) = pump(run[:3])
        if at in free:
            assert len(merged) == 1
        else:
            assert merged == [whole, record(bytes(other))], f"byte {at}"


@pytest.mark.parametrize("addresses", [V4, V6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_run_that_is_finished_early_goes_on(addresses: tuple[str, str], count: int) -> None:
    packets = flow(9, 100, addresses)
    (whole,) = pump(packets)
    assert whole == pump(packets, finish_after=count)[0]


def test_nothing_follows_a_short_one() -> None:
    assert len(pump([plain(), vnet(udp(V4, BODY[:7])), vnet(udp(V4, BODY[:7]))])) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from([V4, V6]), st.sampled_from([1, 2, 3]), st.integers(0, 3), st.booleans()),
        max_size=40,
    )
)
def test_whatever_comes_is_all_there_afterwards(script: list[tuple[tuple[str, str], int, int, bool]]) -> None:
    """Few flows and sizes, so that merging starts and stops everywhere; the pieces are the packets."""
    packets = [
        vnet(udp(addresses, bytes([count] * size * 9), ports=(1, port), identity=count, fragment=0x4000 * df))
        for count, (addresses, port, size, df) in enumerate(script)
    ]
    pieces = [piece for one in pump(packets) for piece in segment(memoryview(one), NOTHING)]
    rebuilt = [packet_of(piece) for piece in pieces]
    assert rebuilt_without_identity(rebuilt) == rebuilt_without_identity([finished(data) for data in packets])


def rebuilt_without_identity(packets: list[bytes]) -> list[bytes]:
    """IPv4 packets with DF may change their identification, and with it their header checksum."""
    return [
        packet[:4] + packet[6:10] + packet[12:] if packet[0] == 0x45 and packet[6] & 0x40 else packet
        for packet in packets
    ]
