"""The record: one IP packet, or one superpacket, as it lies in a ring and on the wire.

    offset  bytes  field
    0       4      length   unsigned, big-endian: bytes that follow (virtio_net_hdr and packet)
    4       10     virtio_net_hdr, little-endian (the TUN device is switched to it by TUNSETVNETLE)
    14      n      the IP packet, IPv4 or IPv6, up to MAX_PACKET_BYTES

No padding: the next record follows at once, so a run of records for one peer is one contiguous span that is
sealed and sent without being touched. What lies behind `length` is exactly what read(2) on the TUN gave and
what write(2) on a TUN takes.

virtio_net_hdr (Linux include/uapi/linux/virtio_net.h, legacy layout without num_buffers):

    flags u8 | gso_type u8 | hdr_len u16 | gso_size u16 | csum_start u16 | csum_offset u16

Which superpackets a node's TUN takes it announces when a stream opens (`Capabilities`).
"""

from __future__ import annotations

import enum
import struct

import msgspec

LENGTH = struct.Struct(">I")
LENGTH_BYTES = 4
VNET_BYTES = 10
#: From the start of a record to its IP packet.
PACKET_OFFSET = LENGTH_BYTES + VNET_BYTES
#: The largest IP packet there is: a superpacket of IPv6 may have 40 bytes of header beside 65,535 of payload.
MAX_PACKET_BYTES = 65_575
MAX_RECORD_BYTES = PACKET_OFFSET + MAX_PACKET_BYTES
#: The smallest: an IPv4 header alone.
MIN_PACKET_BYTES = 20
MIN_RECORD_BYTES = PACKET_OFFSET + MIN_PACKET_BYTES

VNET = struct.Struct("<BBHHHH")

FLAG_NEEDS_CSUM = 1
FLAG_DATA_VALID = 2
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80  # a bit beside GSO_TCPV4 and GSO_TCPV6
_UDP_BYTES = 8
_length_from = LENGTH.unpack_from
#: Of a record's virtio_net_hdr what says how it is to be cut: gso_type, gso_size and csum_start.
_cut_from = struct.Struct("<5xB2xHH").unpack_from
#: In a TCP header, the byte whose upper half is its length in units of four bytes.
_TCP_LENGTH_AT = 12


class Offload(enum.IntFlag):
    """Bits of a TUN's offloads; also Linux' TUN_F_* of TUNSETOFFLOAD (include/uapi/linux/if_tun.h)."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    USO4 = 0x20
    USO6 = 0x40


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """`offloads`: the superpackets the node's TUN takes; without CSUM it takes finished checksums only.
    `max_record`: largest record in bytes, its length field included. `mtu`: of the node's TUN."""

    offloads: int
    max_record: int
    mtu: int


def segments(buffer: memoryview, start: int, end: int, records: int) -> int:
    """How many packets the `records` whole records in buffer[start:end] are on a link: each segment of a superpacket is
    one.

    Superpackets are as the kernel makes them, or checked (vpnd.packet.offload).
    """
    return survey(buffer, start, end, records, end - start)[0]


def survey(buffer: memoryview, start: int, end: int, records: int, most: int) -> tuple[int, list[int]]:
    """What `segments` gives, and how to cut buffer[start:end] into pieces of at most `most` bytes: where each ends.
    Pieces are of whole records, as many as fit; only a record larger than that is cut."""
    count, ends = records, []
    following = begun = start
    while following < end:
        start = following
        # Nearly always there is one.
        following = end if records == 1 else start + LENGTH_BYTES + _length_from(buffer, start)[0]
        kind, size, csum_start = _cut_from(buffer, start)
        if kind:  # GSO_NONE is 0
            header = start + PACKET_OFFSET + csum_start
            header += _UDP_BYTES if kind == GSO_UDP_L4 else (buffer[header + _TCP_LENGTH_AT] >> 4) * 4
            count -= (header - following) // (size or 1) + 1
        if following - begun > most:
            if start > begun:
                ends.append(start)
                begun = start
            while following - begun > most:
                begun += most
                ends.append(begun)
    ends.append(end)
    return count, ends
