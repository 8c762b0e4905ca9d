"""Packets made by hand, with the virtio_net_hdr a kernel would give them, and a checksum the slow way."""

from __future__ import annotations

import ipaddress
import struct

from vpnd.packet.record import (
    FLAG_NEEDS_CSUM,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    LENGTH,
    VNET,
    VNET_BYTES,
)

V4 = ("10.86.0.1", "10.86.0.2")
V6 = ("fd00:86::1", "fd00:86::2")


def slow_sum(data: bytes) -> int:
    """RFC 1071 as it is written: words added one by one, carries added back."""
    result = 0
    for word in struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) & 1)):
        result += word
        result = (result & 0xFFFF) + (result >> 16)
    return result


def pseudo(addresses: tuple[str, str], protocol: int, length: int) -> bytes:
    """The pseudo header of the transport checksum."""
    return b"".join(ipaddress.ip_address(a).packed for a in addresses) + struct.pack(">II", length, protocol)


def ip(
    addresses: tuple[str, str],
    protocol: int,
    payload: bytes,
    *,
    identity: int = 7,
    fragment: int = 0x4000,
    ttl: int = 64,
    tos: int = 0,
    options: bytes = b"",
) -> bytes:
    """An IP packet; `options` are IPv4 options or IPv6 extension headers whose first is of type 60."""
    source, destination = (ipaddress.ip_address(a) for a in addresses)
    if source.version == 6:
        following = 60 if options else protocol
        head = struct.pack(">IHBB", 6 << 28 | tos << 20, len(options) + len(payload), following, ttl)
        return head + source.packed + destination.packed + options + payload
    size = 20 + len(options) + len(payload)
    first = 4 << 4 | (5 + len(options) // 4)
    head = struct.pack(">BBHHHBBH", first, tos, size, identity, fragment, ttl, protocol, 0)
    header = bytearray(head + source.packed + destination.packed + options)
    struct.pack_into(">H", header, 10, 0xFFFF - slow_sum(header))
    return bytes(header) + payload


def udp(
    addresses: tuple[str, str], payload: bytes, *, ports: tuple[int, int] = (5000, 6000), **more
) -> bytes:
    """A UDP packet whose checksum is still to be filled in: the field holds the sum of the pseudo header."""
    length = 8 + len(payload)
    check = slow_sum(pseudo(addresses, 17, length))
    return ip(addresses, 17, struct.pack(">HHHH", *ports, length, check) + payload, **more)


def tcp(
    addresses: tuple[str, str],
    payload: bytes,
    *,
    flags: int = 0x18,
    sequence: int = 0xFFFF_F000,
    options: bytes = b"\1\1\x08\x0a" + bytes(8),
    **more,
) -> bytes:
    """A TCP packet, likewise. `options` are TCP's."""
    length = 20 + len(options) + len(payload)
    check = slow_sum(pseudo(addresses, 6, length))
    offset = (5 + len(options) // 4) << 4
    header = struct.pack(">HHIIBBHHH", 5000, 6000, sequence, 99, offset, flags, 512, check, 0)
    return ip(addresses, 6, header + options + payload, **more)


def vnet(packet: bytes, *, gso_size: int = 0, **changed: int) -> bytes:
    """A packet behind its virtio_net_hdr; with `gso_size` a superpacket. `changed`: fields set wrong."""
    version = packet[0] >> 4
    start = (packet[0] & 15) * 4 if version == 4 else 40
    protocol = packet[9] if version == 4 else packet[6]
    if protocol == 60:
        protocol, start = packet[40], 40 + (packet[41] + 1) * 8
    fields = {
        "flags": FLAG_NEEDS_CSUM,
        "gso_type": 0,
        "hdr_len": 0,
        "gso_size": gso_size,
        "csum_start": start,
        "csum_offset": 16 if protocol == 6 else 6,
    }
    if gso_size:
        tcp_type = GSO_TCPV4 if version == 4 else GSO_TCPV6
        fields["gso_type"] = tcp_type if protocol == 6 else GSO_UDP_L4
        fields["hdr_len"] = start + ((packet[start + 12] >> 4) * 4 if protocol == 6 else 8)
    return VNET.pack(*(fields | changed).values()) + packet


def record(behind_length: bytes) -> bytes:
    """With its length field."""
    return LENGTH.pack(len(behind_length)) + behind_length


def verify(packet: bytes) -> None:
    """Assert that the checksums of a finished TCP or UDP packet without extension headers are right."""
    if packet[0] >> 4 == 4:
        start = (packet[0] & 15) * 4
        assert slow_sum(packet[:start]) == 0xFFFF
        addresses, protocol = packet[12:20], packet[9]
    else:
        start, addresses, protocol = 40, packet[8:40], packet[6]
    over = addresses + struct.pack(">II", len(packet) - start, protocol) + packet[start:]
    assert slow_sum(over) == 0xFFFF
    if protocol == 17:
        assert packet[start + 6 : start + 8] != b"\0\0"


def packet_of(piece: bytes) -> bytes:
    """The IP packet of a record."""
    return piece[4 + VNET_BYTES :]
