"""Small packets that say who sent them, in which flow and as the how manieth; and the ring they come in.

Those to ports from `ORDERED_FROM` on are of TCP, as far as anybody here looks, the others of UDP."""

from __future__ import annotations

import ipaddress
import struct

from vpnd.packet.flow import READ_AHEAD_BYTES
from vpnd.packet.record import LENGTH_BYTES, PACKET_OFFSET
from vpnd.packet.ring import SCRATCH

#: Record length, virtio_net_hdr, IPv4, UDP; then the sequence number.
_RECORD = struct.Struct(">I10xBxHHHBBHIIHHHHI")
#: Where the source address, the destination port and the sequence number are behind the record's length.
_SEEN = struct.Struct(">22xI4x2xH4xI")
LEAST_BYTES = _RECORD.size - PACKET_OFFSET


ICMP, TCP, UDP = 1, 6, 17
#: Ports of flows that must keep their order, also where datagrams go beside sessions.
ORDERED_FROM = 1000


def record(source: int, destination: int, port: int, number: int, size: int) -> bytes:
    """A record with a packet of `size` bytes, at least LEAST_BYTES."""
    head = _RECORD.pack(
        PACKET_OFFSET - LENGTH_BYTES + size, 0x45, size, 0, 0x4000, 64, UDP if port < ORDERED_FROM else TCP, 0,
        source, destination, 4000, port, size - 20, 0, number,
    )  # fmt: skip
    return head + bytes(size - LEAST_BYTES)


def seen(view: memoryview) -> tuple[int, int, int]:
    """(source address, port, number) of a record without its length, as a TUN is given it."""
    source, port, number = _SEEN.unpack_from(view)
    return source, port, number


def protocol(view: memoryview) -> int:
    """Of a record without its length."""
    return view[PACKET_OFFSET - LENGTH_BYTES + 9]


def number_of(address: str) -> int:
    return int(ipaddress.ip_address(address))


class Batch:
    """Records as they lie in a ring: a Consumer that is read once."""

    def __init__(self, records: list[bytes]) -> None:
        data = b"".join(records)
        self.buffer = memoryview(bytearray(SCRATCH) + data + bytes(READ_AHEAD_BYTES))
        self._start, self._end = SCRATCH, SCRATCH + len(data)

    def readable(self) -> tuple[int, int]:
        return self._start, self._end

    def release(self, count: int) -> None:
        self._start += count
