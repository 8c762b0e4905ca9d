"""Slices of a superpacket: parts that travel in a datagram each, so that a lost one costs its part and not all of it.

    record   length u32        | virtio_net_hdr | headers | data
    slice    SLICE | offset    | virtio_net_hdr | headers | its part of the data

A slice has the headers of the whole superpacket, unchanged; `offset` is where its data begin in those of the whole. TCP
may be cut anywhere, UDP where one of its datagrams ends. What arrives in a row is joined again: all of it is the
superpacket as it was; a part is a smaller one, whose headers are made to fit.
"""

from __future__ import annotations

import struct

from vpnd.errors import BadPacket
from vpnd.packet import checksum
from vpnd.packet.offload.headers import (
    IPV4_BYTES,
    IPV6_BYTES,
    TCP_BYTES,
    TCP_DATA_OFFSET,
    TCP_FLAGS,
    UDP_BYTES,
)
from vpnd.packet.record import (
    GSO_ECN,
    GSO_NONE,
    GSO_UDP_L4,
    LENGTH,
    LENGTH_BYTES,
    MAX_RECORD_BYTES,
    PACKET_OFFSET,
    VNET,
)
from vpnd.packet.ring import lazy_buffer

#: Bits of a slice's first word: its upper byte, which no record's length has; the rest is the offset.
SLICE = 1 << 24
OFFSET_MASK = SLICE - 1

_WORD = struct.Struct(">H")
_DOUBLE_WORD = struct.Struct(">I")
_FIN_PSH = 0x09
_CWR = 0x80


def shape(buffer: memoryview, start: int, room: int) -> tuple[int, int]:
    """How to slice the record at `start`, which is our kernel's or was checked: (bytes in front of each slice's data,
    data bytes of each but the last), for slices of at most `room` bytes. (0, 0): it cannot be sliced so small."""
    _, kind, _, gso_size, csum_start, _ = VNET.unpack_from(buffer, start + LENGTH_BYTES)
    if kind == GSO_NONE:
        return 0, 0
    front = PACKET_OFFSET + csum_start
    if kind == GSO_UDP_L4:
        front += UDP_BYTES
        most = (room - front) // gso_size * gso_size
    else:
        front += (buffer[start + front + TCP_DATA_OFFSET] >> 4) * 4
        most = room - front
    return (front, most) if most > 0 else (0, 0)


class Joiner:
    """Joins slices that continue each other. Owner: who opens the datagrams of a shard.

    `begin_untrusted` takes the first, `append_untrusted` those for which `continues` says so, `finish` gives what has
    come of them. `active`: there is something to finish.
    """

    __slots__ = ("_buffer", "_counter", "_end", "_front", "_next", "_offset", "_total", "active")

    def __init__(self) -> None:
        self._buffer = lazy_buffer(MAX_RECORD_BYTES)
        self.active = False
        self._front = self._offset = self._total = self._end = 0
        self._counter = self._next = -1  # of the datagram and the data to come

    def continues(self, counter: int, offset: int) -> bool:
        """Whether the slice in datagram `counter` goes on where the one before it ended."""
        return self.active and counter == self._counter and offset == self._next

    def begin_untrusted(self, counter: int, offset: int, body: memoryview) -> None:
        """The first slice of a row. Raises BadPacket, bad_offload_header: then there is nothing to finish."""
        buffer = self._buffer
        size = len(body)
        if size < PACKET_OFFSET + IPV4_BYTES + UDP_BYTES or size > MAX_RECORD_BYTES:
            raise BadPacket("bad_offload_header")
        _, kind, _, gso_size, csum_start, csum_offset = VNET.unpack_from(body, LENGTH_BYTES)
        transport = PACKET_OFFSET + csum_start
        version = body[PACKET_OFFSET] >> 4
        if kind == GSO_UDP_L4:
            front = transport + UDP_BYTES
        elif kind != GSO_NONE and transport + TCP_BYTES <= size:
            front = transport + (body[transport + TCP_DATA_OFFSET] >> 4) * 4
        else:
            raise BadPacket("bad_offload_header")
        if version == 4:
            ip_bytes = (body[PACKET_OFFSET] & 0x0F) * 4
            total = _WORD.unpack_from(body, PACKET_OFFSET + 2)[0]
        elif version == 6 and size >= PACKET_OFFSET + IPV6_BYTES:
            ip_bytes = IPV6_BYTES
            total = IPV6_BYTES + _WORD.unpack_from(body, PACKET_OFFSET + 4)[0]
        else:
            raise BadPacket("bad_offload_header")
        if not (
            gso_size
            and IPV4_BYTES <= ip_bytes <= csum_start
            and transport + csum_offset + 2 <= front < size
            and (kind != GSO_UDP_L4 or offset % gso_size == 0)
            and offset + size - PACKET_OFFSET <= total
        ):
            raise BadPacket("bad_offload_header")
        buffer[:size] = body
        self._front, self._offset, self._total, self._end = front, offset, total, size
        self._counter, self._next = counter + 1, offset + size - front
        self.active = True

    def append_untrusted(self, body: memoryview) -> None:
        """The next slice. Raises BadPacket, bad_offload_header: it is left out, what came before can be finished."""
        size = len(body) - self._front
        if size <= 0 or self._next + size + self._front - PACKET_OFFSET > self._total:
            raise BadPacket("bad_offload_header")
        end = self._end + size
        self._buffer[self._end : end] = body[self._front :]
        self._end = end
        self._counter += 1
        self._next += size

    def finish(self) -> memoryview:
        """What was joined, as a record that is still to be checked; empty if there is nothing. borrowed: until the next
        `begin_untrusted`."""
        if not self.active:
            return self._buffer[:0]
        self.active = False
        if self._end - PACKET_OFFSET != self._total:
            self._fit_headers()
        LENGTH.pack_into(self._buffer, 0, self._end - LENGTH_BYTES)
        return self._buffer[: self._end]

    def _fit_headers(self) -> None:
        """Make the headers of the whole those of a part: as the kernel would have cut it there."""
        buffer, offset, size = self._buffer, self._offset, self._end - self._front
        flags, kind, header_bytes, gso_size, csum_start, csum_offset = VNET.unpack_from(buffer, LENGTH_BYTES)
        length = self._end - PACKET_OFFSET
        transport = PACKET_OFFSET + csum_start
        if buffer[PACKET_OFFSET] >> 4 == 4:
            (identity,) = _WORD.unpack_from(buffer, PACKET_OFFSET + 4)
            _WORD.pack_into(buffer, PACKET_OFFSET + 2, length)
            _WORD.pack_into(buffer, PACKET_OFFSET + 4, identity + offset // gso_size & 0xFFFF)
            _WORD.pack_into(buffer, PACKET_OFFSET + 10, 0)
            header = buffer[PACKET_OFFSET : PACKET_OFFSET + (buffer[PACKET_OFFSET] & 0x0F) * 4]
            _WORD.pack_into(buffer, PACKET_OFFSET + 10, checksum.complement(checksum.total(header)))
        else:
            _WORD.pack_into(buffer, PACKET_OFFSET + 4, length - IPV6_BYTES)
        # The field holds the sum of the pseudo header, of which only the length changes.
        (pseudo,) = _WORD.unpack_from(buffer, transport + csum_offset)
        changed = checksum.fold(pseudo + length + 0xFFFF - self._total % 0xFFFF)
        _WORD.pack_into(buffer, transport + csum_offset, changed)
        if kind == GSO_UDP_L4:
            _WORD.pack_into(buffer, transport + 4, length - csum_start)
        else:
            (sequence,) = _DOUBLE_WORD.unpack_from(buffer, transport + 4)
            _DOUBLE_WORD.pack_into(buffer, transport + 4, sequence + offset & 0xFFFFFFFF)
            if offset:
                buffer[transport + TCP_FLAGS] &= ~_CWR & 0xFF
                kind &= ~GSO_ECN
            if length + offset < self._total:
                buffer[transport + TCP_FLAGS] &= ~_FIN_PSH & 0xFF
        if size <= gso_size:
            kind = header_bytes = gso_size = 0
        VNET.pack_into(buffer, LENGTH_BYTES, flags, kind, header_bytes, gso_size, csum_start, csum_offset)
