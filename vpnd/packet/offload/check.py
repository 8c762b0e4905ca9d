"""The check of a record from a peer before the TUN may have it.

A virtio_net_hdr tells the kernel where in a packet to write a checksum and into what sizes to cut it. From a
peer it is a stranger's word, so only what Linux itself produces is let through: a checksum exactly where TCP
or UDP has it, superpackets whose kind, sizes and headers agree, nothing in fields without a meaning. This is
stricter than Linux (virtio_net_hdr_to_skb), so what passes here is never refused there.

Of packets within packets (VXLAN, Geneve, GRE, IP in IP) Linux leaves the innermost checksum to fill in, having cut up
superpackets and finished the outer checksums before.

Plain packets, those with just a checksum to fill in, and TCP's superpackets are nearly all there are: they leave early.
"""

from __future__ import annotations

import struct

from vpnd.errors import BadPacket
from vpnd.packet.offload.headers import (
    FRAGMENT,
    GRE,
    GRE_BYTES,
    IPIP,
    IPV4_BYTES,
    IPV4_FRAGMENT_MASK,
    IPV6_BYTES,
    IPV6_IN_IP,
    TCP,
    TCP_BYTES,
    TCP_CHECKSUM,
    TCP_DATA_OFFSET,
    TCP_MIN_GSO_SIZE,
    UDP,
    UDP_BYTES,
    UDP_CHECKSUM,
    UDP_MAX_SEGMENTS,
    transport,
)
from vpnd.packet.record import (
    FLAG_DATA_VALID,
    FLAG_NEEDS_CSUM,
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    VNET,
    VNET_BYTES,
)

# virtio_net_hdr without its csum_offset, and csum_offset (both only compared with constants, hence in network
# order like the rest); IPv4: version and IHL, total length, flags and fragment offset, protocol, addresses.
_IPV4 = struct.Struct(">QHBxH2xHxB2xII")
# The same, and IPv6: version …, payload length, both addresses in two halves.
_IPV6 = struct.Struct(">QHB3xH2xQQQQ")
_WORD = struct.Struct(">H")

_IPV4_LEAST = VNET_BYTES + IPV4_BYTES
_IPV6_LEAST = VNET_BYTES + IPV6_BYTES
_UDP4_LEAST = VNET_BYTES + IPV4_BYTES + UDP_BYTES
_TCP4_LEAST = VNET_BYTES + IPV4_BYTES + TCP_BYTES
# What _IPV4 gives for "checksum to fill in, header at 20" and for the two places it may be at.
_CSUM_AT_20, _ = struct.unpack(">QH", VNET.pack(FLAG_NEEDS_CSUM, 0, 0, 0, IPV4_BYTES, 0))
_, _OFFSET_UDP = struct.unpack(">QH", VNET.pack(0, 0, 0, 0, 0, UDP_CHECKSUM))
_, _OFFSET_TCP = struct.unpack(">QH", VNET.pack(0, 0, 0, 0, 0, TCP_CHECKSUM))
# What it gives for TCP's superpackets there, less their sizes.
_TCP4_SUPER, _ = struct.unpack(">QH", VNET.pack(FLAG_NEEDS_CSUM, GSO_TCPV4, 0, 0, IPV4_BYTES, 0))
_BUT_SIZES, _ = struct.unpack(">QH", VNET.pack(0xFF, 0xFF, 0, 0, 0xFFFF, 0))
_TCP_LENGTH_AT = VNET_BYTES + IPV4_BYTES + TCP_DATA_OFFSET


#: By protocol of the outer packet: bytes between its IP header and the inner one, at least.
_AROUND = {UDP: UDP_BYTES, GRE: GRE_BYTES, IPIP: 0, IPV6_IN_IP: 0}
#: By the place of a checksum in its header: the protocol, and that header's length.
_INNER = {TCP_CHECKSUM: (TCP, TCP_BYTES), UDP_CHECKSUM: (UDP, UDP_BYTES)}


def inspect_untrusted(buffer: memoryview, offset: int, length: int) -> tuple[int, int, int, int]:
    """Check a record from a peer; return its (IP version, source address, destination address), as numbers, and how
    many packets it is on a link: each segment of a superpacket is one.

    buffer[offset : offset + length] is virtio_net_hdr and IP packet, a record without its length field; it
    must lie within `buffer`. Raises BadPacket, "malformed_remote" when IP version, header or length are
    wrong, "bad_offload_header" when the virtio_net_hdr does not fit the packet; nothing else. Per record.
    """
    if length < _IPV4_LEAST:
        raise BadPacket("malformed_remote")
    head, tail, first, total, fragment, protocol, source, destination = _IPV4.unpack_from(buffer, offset)
    if first == 0x45:
        if total != length - VNET_BYTES:
            raise BadPacket("malformed_remote")
        if head == 0 and tail == 0:
            return 4, source, destination, 1
        if head == _CSUM_AT_20 and not fragment & IPV4_FRAGMENT_MASK:
            if tail == _OFFSET_UDP and protocol == UDP and length >= _UDP4_LEAST:
                return 4, source, destination, 1
            if tail == _OFFSET_TCP and protocol == TCP and length >= _TCP4_LEAST:
                return 4, source, destination, 1
        if head & _BUT_SIZES == _TCP4_SUPER and tail == _OFFSET_TCP and length >= _TCP4_LEAST:
            header = (buffer[offset + _TCP_LENGTH_AT] >> 4) * 4
            payload = total - IPV4_BYTES - header
            # Little-endian within a number that is not.
            header_bytes = head >> 40 & 0xFF | head >> 24 & 0xFF00
            gso_size = head >> 24 & 0xFF | head >> 8 & 0xFF00
            whole = protocol == TCP and not fragment & IPV4_FRAGMENT_MASK
            sizes_fit = header_bytes <= total and TCP_MIN_GSO_SIZE <= gso_size <= total
            if whole and sizes_fit and header >= TCP_BYTES and payload > 0:
                return 4, source, destination, -(-payload // gso_size)
        return 4, source, destination, _check_offload(buffer, offset, length - VNET_BYTES)
    if first >> 4 == 4:
        if total != length - VNET_BYTES or not IPV4_BYTES <= (first & 0x0F) * 4 <= total:
            raise BadPacket("malformed_remote")
        segments = _check_offload(buffer, offset, total) if head or tail else 1
        return 4, source, destination, segments
    if first >> 4 != 6 or length < _IPV6_LEAST:
        raise BadPacket("malformed_remote")
    head, tail, _, payload, *halves = _IPV6.unpack_from(buffer, offset)
    if payload + IPV6_BYTES != length - VNET_BYTES:
        raise BadPacket("malformed_remote")
    segments = _check_offload(buffer, offset, length - VNET_BYTES) if head or tail else 1
    return 6, halves[0] << 64 | halves[1], halves[2] << 64 | halves[3], segments


def _check_offload(buffer: memoryview, offset: int, size: int) -> int:
    """The virtio_net_hdr at `offset` against the packet behind it: `size` bytes, sound as far as IP goes. How many
    segments it is."""
    flags, gso_type, header_bytes, gso_size, csum_start, csum_offset = VNET.unpack_from(buffer, offset)
    if flags == FLAG_DATA_VALID:
        # "I have verified it": of a packet that is complete as it is, even a fragment. Nothing may come with
        # it.
        if gso_type or header_bytes or gso_size or csum_start or csum_offset:
            raise BadPacket("bad_offload_header")
        return 1
    # Linux fills in the checksums of what it cuts from the one that is left to fill in, so a superpacket
    # needs it.
    if flags != FLAG_NEEDS_CSUM or header_bytes > size:
        raise BadPacket("bad_offload_header")
    packet = offset + VNET_BYTES
    start, protocol = transport(buffer, packet, size)
    if csum_start != start and protocol in _AROUND and not (gso_type or header_bytes or gso_size):
        _check_inner(buffer, packet, size, start + _AROUND[protocol], csum_start, csum_offset)
        return 1
    if protocol == FRAGMENT or csum_start != start:
        raise BadPacket("bad_offload_header")
    if protocol == TCP:
        if csum_offset != TCP_CHECKSUM or start + TCP_BYTES > size:
            raise BadPacket("bad_offload_header")
    elif protocol != UDP or csum_offset != UDP_CHECKSUM or start + UDP_BYTES > size:
        raise BadPacket("bad_offload_header")
    if gso_type == GSO_NONE:
        if header_bytes or gso_size:
            raise BadPacket("bad_offload_header")
        return 1
    if gso_size > size:
        raise BadPacket("bad_offload_header")
    if gso_type == GSO_UDP_L4:
        payload = size - start - UDP_BYTES
        (stated,) = _WORD.unpack_from(buffer, packet + start + 4)
        good = (
            protocol == UDP and stated == payload + UDP_BYTES and 0 < payload <= gso_size * UDP_MAX_SEGMENTS
        )
    elif gso_type & ~GSO_ECN == (GSO_TCPV4 if buffer[packet] >> 4 == 4 else GSO_TCPV6):
        header = (buffer[packet + start + TCP_DATA_OFFSET] >> 4) * 4 if protocol == TCP else 0
        payload = size - start - header
        good = header >= TCP_BYTES and payload > 0 and gso_size >= TCP_MIN_GSO_SIZE
    else:
        good = False
    if not good:
        raise BadPacket("bad_offload_header")
    return -(-payload // gso_size)


def _check_inner(
    buffer: memoryview, packet: int, size: int, begin: int, csum_start: int, csum_offset: int
) -> None:
    """The checksum to fill in is that of a TCP or UDP header, right behind an IP header that is not before `begin`."""
    protocol, least = _INNER.get(csum_offset, (FRAGMENT, 0))
    if protocol == FRAGMENT or csum_start + least > size:
        raise BadPacket("bad_offload_header")
    place, room = packet + csum_start, csum_start - begin
    ipv6 = place - IPV6_BYTES
    if room >= IPV6_BYTES and buffer[ipv6] >> 4 == 6 and buffer[ipv6 + 6] == protocol:
        return
    for words in range(IPV4_BYTES // 4, min(15, room // 4) + 1):
        ipv4 = place - 4 * words
        if buffer[ipv4] == 0x40 | words and buffer[ipv4 + 9] == protocol:
            return
    raise BadPacket("bad_offload_header")
