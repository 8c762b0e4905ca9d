"""Flow keys against a plain parser, and the promise of rendezvous hashing."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.packet import flow


def ipv4(destination="10.86.0.2", protocol=6, port=80, options=b"", fragment=0, payload=b"\x12\x34") -> bytes:
    body = payload + struct.pack(">H", port) + bytes(20)
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x45 + len(options) // 4, 0, 20 + len(options) + len(body), 7, fragment, 64, protocol, 0,
        ipaddress.ip_address("10.86.0.1").packed, ipaddress.ip_address(destination).packed,
    )  # fmt: skip
    return header + options + body


def ipv6(destination="fd00::2", protocol=17, port=53) -> bytes:
    body = struct.pack(">HH", 999, port) + bytes(8)
    header = struct.pack(
        ">IHBB16s16s", 6 << 28, len(body), protocol, 64,
        ipaddress.ip_address("fd00::1").packed, ipaddress.ip_address(destination).packed,
    )  # fmt: skip
    return header + body


def key(packet: bytes, length: int | None = None) -> int:
    buffer = memoryview(b"\xaa" * 14 + packet + bytes(64))
    return flow.key_of(buffer, 14, len(packet) if length is None else length)


SAME = [
    ("the source port does not matter", ipv4(payload=b"\x00\x01"), ipv4(payload=b"\x00\x02"), True),
    ("another port is another flow", ipv4(port=80), ipv4(port=81), False),
    ("another protocol is another flow", ipv4(protocol=6), ipv4(protocol=17), False),
    ("another destination is another flow", ipv4(), ipv4(destination="10.86.0.3"), False),
    ("ICMP has no ports", ipv4(protocol=1, port=1), ipv4(protocol=1, port=2), True),
    ("options do not hide the port", ipv4(options=bytes(8)), ipv4(), True),
    ("all fragments go one way, the first too", ipv4(fragment=0x2000), ipv4(fragment=0x00B9, port=9), True),
    (
        "fragments of any protocol go by the address",
        ipv4(fragment=1, protocol=17),
        ipv4(fragment=1, protocol=1),
        True,
    ),
    ("don't-fragment is not a fragment", ipv4(fragment=0x4000), ipv4(), True),
    ("IPv6 ports", ipv6(port=53), ipv6(port=54), False),
    ("IPv6 extension headers go by the address", ipv6(protocol=44, port=1), ipv6(protocol=44, port=2), True),
]


@pytest.mark.parametrize("sentence,one,other,same", SAME, ids=[row[0] for row in SAME])
def test_what_makes_a_flow(sentence, one, other, same):
    assert (key(one) == key(other)) is same
    assert key(one) >= 0


BAD = [
    ("empty", b""), ("IPv4 cut", ipv4()[:19]), ("IPv6 cut", ipv6()[:39]), ("version 5", b"\x55" + ipv4()[1:]),
    ("IHL below 5", b"\x44" + ipv4()[1:]), ("IHL beyond the packet", b"\x4f" + ipv4()[1:24]),
]  # fmt: skip


@pytest.mark.parametrize("sentence,packet", BAD, ids=[row[0] for row in BAD])
def test_what_is_no_packet_has_no_key(sentence, packet):
    assert key(packet) == -1


@given(st.binary(min_size=0, max_size=80))
def test_any_bytes_have_a_key_or_none_and_never_an_error(data):
    assert key(data) >= -1


UNICAST = [
    ("10.86.0.2", True), ("224.0.0.251", False), ("255.255.255.255", False), ("0.0.0.0", False),
    ("fd00::2", True), ("ff02::2", False), ("::", False), ("223.255.255.255", True),
]  # fmt: skip


@pytest.mark.parametrize("address,expected", UNICAST)
def test_unicast(address, expected):
    packet = ipv4(destination=address) if "." in address else ipv6(destination=address)
    assert flow.is_unicast(key(packet)) is expected
    assert flow.destination_of(key(packet)) == (
        ipaddress.ip_address(address).version,
        int(ipaddress.ip_address(address)),
    )


def test_the_flow_of_pings_is_known_without_a_packet():
    for packet, destination in (
        (ipv4(protocol=1), "10.86.0.2"),
        (ipv4(protocol=1, options=bytes(4)), "10.86.0.2"),
        (ipv6(protocol=58), "fd00::2"),
    ):
        assert flow.echo_key(ipaddress.ip_address(destination)) == key(packet)


@given(st.integers(0, (1 << 56) - 1), st.integers(2, 8))
def test_losing_a_shard_moves_its_flows_only(some_key, count):
    shards = list(range(count))
    home = flow.shard_of(some_key, shards)
    for lost in shards:
        left = [shard for shard in shards if shard != lost]
        if lost != home:
            assert flow.shard_of(some_key, left) == home
    assert flow.shard_of(some_key, [*shards, count]) in (home, count)


def test_flows_are_spread_evenly():
    counts = [0] * 4
    for port in range(4000):
        counts[flow.shard_of(int(ipaddress.ip_address("10.86.0.2")) << 24 | 6 << 16 | port, range(4))] += 1
    assert min(counts) > 850
