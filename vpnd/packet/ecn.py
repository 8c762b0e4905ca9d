"""Explicit congestion notification (RFC 3168): a packet says whether its sender heeds marks, and bears the mark.

What goes in datagrams has the inner packet's bits on the outer one, and the outer one's mark on the inner when it
arrives (RFC 6040, normal mode). Datagrams of the peer are only marked where all in them may be; a mark on a packet
whose sender heeds none was made by something that does not know what it does, and the packet stays as it is.

    IPv4   the lower two bits of the second byte; the header's checksum is at byte 10
    IPv6   bits 4 and 5 of the second byte
"""

from __future__ import annotations

import struct

from vpnd.packet.record import LENGTH, LENGTH_BYTES, MIN_RECORD_BYTES, PACKET_OFFSET

#: The sender heeds nothing; the mark.
NOT_CAPABLE, MARKED = 0, 3
#: Of a record: the byte that has the bits, and those of them that have them in IPv4 or IPv6. None set: not capable.
PLACE, EITHER = PACKET_OFFSET + 1, 0x33

_IPV4_CHECKSUM = struct.Struct(">H")
_IPV4_CHECKSUM_AT = 10


def bits_of(buffer: memoryview, packet: int) -> int:
    """Of the IP packet that begins at buffer[packet]."""
    return buffer[packet + 1] & 3 if buffer[packet] >> 4 == 4 else buffer[packet + 1] >> 4 & 3


def mark_untrusted(buffer: memoryview, packet: int) -> bool:
    """Tell who receives the packet at buffer[packet], of 20 bytes at least, that its way is congested. False: its
    sender does not heed that."""
    version, bits = buffer[packet] >> 4, bits_of(buffer, packet)
    if bits == NOT_CAPABLE or version not in (4, 6):
        return False
    if version == 6:
        buffer[packet + 1] |= MARKED << 4
        return True
    buffer[packet + 1] |= MARKED
    (checksum,) = _IPV4_CHECKSUM.unpack_from(buffer, packet + _IPV4_CHECKSUM_AT)
    checksum -= MARKED - bits
    _IPV4_CHECKSUM.pack_into(
        buffer, packet + _IPV4_CHECKSUM_AT, checksum if checksum >= 0 else checksum + 0xFFFF
    )
    return True


def mark_records_untrusted(buffer: memoryview) -> None:
    """Mark all records of a datagram, as far as they are records."""
    position = 0
    while position + MIN_RECORD_BYTES <= len(buffer):
        mark_untrusted(buffer, position + PACKET_OFFSET)
        position += LENGTH_BYTES + LENGTH.unpack_from(buffer, position)[0]
