"""Cutting a superpacket in software, for a peer whose TUN cannot take it.

The pieces are those the sending kernel would have made without offloads (Linux tcp_gso_segment,
__udp_gso_segment, inet_gso_segment): every header repeated, IPv4 identification counted up, sequence numbers
moved on, FIN and PSH on the last piece only, CWR on the first only, and all checksums made anew.
"""

from __future__ import annotations

import struct

from vpnd.errors import BadPacket
from vpnd.packet import checksum
from vpnd.packet.offload.headers import (
    IPV4_BYTES,
    IPV6_BYTES,
    NEEDED,
    TCP,
    TCP_BYTES,
    TCP_CHECKSUM,
    TCP_DATA_OFFSET,
    TCP_FLAGS,
    UDP,
    UDP_BYTES,
    UDP_CHECKSUM,
    UDP_MAX_SEGMENTS,
    transport,
)
from vpnd.packet.record import (
    FLAG_NEEDS_CSUM,
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    LENGTH,
    LENGTH_BYTES,
    PACKET_OFFSET,
    VNET,
    VNET_BYTES,
    Capabilities,
    Offload,
)
from vpnd.packet.ring import SCRATCH

_WORD = struct.Struct(">H")
_DOUBLE_WORD = struct.Struct(">I")

_FIN_PSH = 0x09
_CWR = 0x80


def must_cut(buffer: memoryview, offset: int, length: int, capabilities: Capabilities) -> bool:
    """True when a peer cannot take this record as it is: `segment` then says what it can take, or too_big.

    buffer[offset : offset + length] is virtio_net_hdr and packet. Per record.
    """
    if length + LENGTH_BYTES > capabilities.max_record:
        return True
    if not buffer[offset]:
        return False
    flags, gso_type, _, gso_size, _, _ = VNET.unpack_from(buffer, offset)
    if gso_type == GSO_NONE:
        return bool(flags & FLAG_NEEDS_CSUM and not capabilities.offloads & Offload.CSUM)
    needed = NEEDED.get((buffer[offset + VNET_BYTES] >> 4, gso_type), ~0) | Offload.CSUM
    if not flags & FLAG_NEEDS_CSUM or needed & ~capabilities.offloads:
        return True
    # Counted with the smallest headers, so one segment early at worst.
    return bool(gso_type == GSO_UDP_L4 and length > gso_size * UDP_MAX_SEGMENTS)


def segment(record: memoryview, capabilities: Capabilities) -> list[bytes]:
    """Records a peer of these capabilities takes, in place of one it does not (see `must_cut`).

    `record` is whole, length field included, from our own kernel; it is only read. A superpacket comes back
    as its segments, any other packet as one record; with finished checksums when the peer does not take CSUM.
    Raises BadPacket: "too_big" when a piece is beyond max_record, "malformed_local" when the record makes no
    sense.
    """
    packet = record[PACKET_OFFSET:]
    size = len(packet)
    version = packet[0] >> 4 if size >= IPV4_BYTES else 0
    if version not in (4, 6) or version == 6 and size < IPV6_BYTES:
        raise BadPacket("malformed_local")
    flags, gso_type, _, gso_size, _, _ = VNET.unpack_from(record, LENGTH_BYTES)
    finish = not capabilities.offloads & Offload.CSUM
    if gso_type == GSO_NONE:
        pieces = [_finished(record) if finish and flags & FLAG_NEEDS_CSUM else bytes(record)]
    else:
        start, protocol = transport(packet, 0, size)
        kind = gso_type & ~GSO_ECN
        if kind in (GSO_TCPV4, GSO_TCPV6) and protocol == TCP and start + TCP_BYTES <= size:
            header = start + (packet[start + TCP_DATA_OFFSET] >> 4) * 4
        elif kind == GSO_UDP_L4 and protocol == UDP:
            header = start + UDP_BYTES
        else:
            raise BadPacket("malformed_local")
        if not start + UDP_BYTES <= header < size or not gso_size:
            raise BadPacket("malformed_local")
        pieces = _cut(packet, start, header, gso_size, protocol, finish)
    if any(len(piece) > capabilities.max_record for piece in pieces):
        raise BadPacket("too_big")
    return pieces


def fit_span(
    buffer: memoryview, start: int, end: int, capabilities: Capabilities
) -> tuple[memoryview, int, int, int]:
    """The records of buffer[start:end] as a peer takes them: (buffer, start, end, records left out).

    Without anything to cut this is the same span; else a new buffer with ring.SCRATCH bytes in front of `start`.
    Left out is what cannot be made to fit. Such peers are rare (another kernel, offloads switched off), so
    this may copy.
    """
    fit = bytearray(SCRATCH)
    unfit = 0
    changed = False
    position = start
    while position < end:
        (count,) = LENGTH.unpack_from(buffer, position)
        following = position + LENGTH_BYTES + count
        record = buffer[position:following]
        if must_cut(buffer, position + LENGTH_BYTES, count, capabilities):
            changed = True
            try:
                for piece in segment(record, capabilities):
                    fit += piece
            except BadPacket:
                unfit += 1
        else:
            fit += record
        position = following
    if not changed:
        return buffer, start, end, 0
    return memoryview(fit), SCRATCH, len(fit), unfit


def finish_checksum(buffer: memoryview, offset: int, length: int) -> None:
    """Fill in, in place, the checksum that a packet's virtio_net_hdr leaves to do, and clear that header.

    buffer[offset : offset + length] is virtio_net_hdr and packet, no superpacket, and writable. Nothing
    happens when no checksum is wanted. Raises BadPacket("malformed_local") when its place is outside the
    packet.
    """
    flags, _, _, _, start, place = VNET.unpack_from(buffer, offset)
    if not flags & FLAG_NEEDS_CSUM:
        return
    end = offset + length
    start += offset + VNET_BYTES
    if start + place + 2 > end:
        raise BadPacket("malformed_local")
    # The field holds the sum of the pseudo header, so it takes part. 0 means "none" in UDP; Linux writes
    # 0xFFFF, its equal, for all protocols.
    value = checksum.complement(checksum.total(buffer[start:end])) or 0xFFFF
    _WORD.pack_into(buffer, start + place, value)
    VNET.pack_into(buffer, offset, 0, 0, 0, 0, 0, 0)


def _finished(record: memoryview) -> bytes:
    copy = bytearray(record)
    finish_checksum(memoryview(copy), LENGTH_BYTES, len(copy) - LENGTH_BYTES)
    return bytes(copy)


def _cut(
    packet: memoryview, start: int, header: int, gso_size: int, protocol: int, finish: bool
) -> list[bytes]:
    """The segments of a superpacket whose transport header is at `start` and whose payload is at `header`."""
    is_ipv4 = packet[0] >> 4 == 4
    heads = bytearray(packet[:header])
    addresses = packet[12:20] if is_ipv4 else packet[8:40]
    # Of the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) only the length differs between
    # segments.
    pseudo = checksum.total(addresses) + protocol
    place = start + (TCP_CHECKSUM if protocol == TCP else UDP_CHECKSUM)
    (identification,) = _WORD.unpack_from(packet, 4)
    sequence = flags = 0
    if protocol == TCP:
        (sequence,) = _DOUBLE_WORD.unpack_from(packet, start + 4)
        flags = packet[start + TCP_FLAGS]
    unfinished = VNET.pack(FLAG_NEEDS_CSUM, GSO_NONE, 0, 0, start, place - start)
    vnet = bytes(VNET_BYTES) if finish else unfinished

    pieces = []
    end = len(packet)
    for count, begin in enumerate(range(header, end, gso_size)):
        payload = packet[begin : begin + gso_size]
        size = header + len(payload)
        if is_ipv4:
            _WORD.pack_into(heads, 2, size)
            _WORD.pack_into(heads, 4, identification + count & 0xFFFF)
            _WORD.pack_into(heads, 10, 0)
            _WORD.pack_into(heads, 10, checksum.complement(checksum.total(heads[:start])))
        else:
            _WORD.pack_into(heads, 4, size - IPV6_BYTES)
        if protocol == TCP:
            _DOUBLE_WORD.pack_into(heads, start + 4, sequence + begin - header & 0xFFFFFFFF)
            kept = flags if count == 0 else flags & ~_CWR
            heads[start + TCP_FLAGS] = kept if begin + gso_size >= end else kept & ~_FIN_PSH
        else:
            _WORD.pack_into(heads, start + 4, size - start)
        value = pseudo + size - start
        if finish:
            _WORD.pack_into(heads, place, 0)
            value = checksum.complement(value + checksum.total(heads[start:]) + checksum.total(payload))
            if protocol == UDP:
                value = value or 0xFFFF  # 0 would say that there is no checksum
        else:
            value = checksum.fold(value)
        _WORD.pack_into(heads, place, value)
        pieces.append(b"".join((LENGTH.pack(VNET_BYTES + size), vnet, heads, payload)))
    return pieces
