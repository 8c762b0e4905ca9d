"""Merging datagrams of one UDP flow, as they come from the TUN, into one superpacket.

A program that sends many datagrams of equal size, one call each, costs a system call, a record and a trip
through the receiver's kernel for each. Merged, the last two are paid once for up to 64. The receiving kernel
cuts the superpacket (GSO_UDP_L4) into the very datagrams again before any socket sees them.

Merged is only what cannot be told from the original afterwards:

- same addresses, ports, TOS with its ECN bits, TTL and DF bit (IPv6: flow label, hop limit); no options, no
  extension headers, no fragments; checksum still to be filled in (a wrong one must stay wrong, and none
  none);
- all of one size, of which a smaller one may be the last;
- IPv4 identification: whoever cuts counts it up by one from the first. With DF set it has no meaning (RFC
  6864 section 4.1), so any will do; without DF the datagram may be fragmented on its way, so it must already
  be so.

Nothing waits: only what was read anyway in one batch is merged.

Most of it are runs: datagrams of which each is like the one before. The second of them is looked at closely, the others
need only have the very same headers, and the superpacket's headers are written when the run is over.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from vpnd.packet.offload.headers import (
    IPV4_BYTES,
    IPV6_BYTES,
    UDP,
    UDP_BYTES,
    UDP_CHECKSUM,
    UDP_MAX_SEGMENTS,
)
from vpnd.packet.record import (
    FLAG_NEEDS_CSUM,
    GSO_NONE,
    GSO_UDP_L4,
    LENGTH_BYTES,
    MAX_RECORD_BYTES,
    PACKET_OFFSET,
    VNET,
    VNET_BYTES,
)

# Big-endian throughout, because nearly all of it is only compared. A fresh record, behind its length:
# flags and gso_type, csum_start and csum_offset; IPv4: version, IHL and TOS, total length, identification,
# flags to protocol; both addresses and both ports; UDP length.
_FRESH4 = struct.Struct(">H4xIHHHI2x12sH2x")
# The whole record, to be read and written: length, flags and gso_type, hdr_len, gso_size (really
# little-endian), csum fields; IPv4 with its checksum; addresses and ports; UDP length and checksum.
_RECORD4 = struct.Struct(">IHHHIHHHIH12sHH")
# The same for IPv6: version to flow label, payload length, next header and hop limit, addresses and ports.
_FRESH6 = struct.Struct(">10xIHH36sH2x")
_RECORD6 = struct.Struct(">IHHHIIHH36sHH")

# What all datagrams of a run have in common, behind a fresh record's length: their headers; of IPv4's all but the
# identification, which means nothing with DF set, and the checksum.
_same4 = struct.Struct(">14s2x4s2x16s").unpack_from
_same6 = struct.Struct(">58s").unpack_from

_UDP4_HEADERS = IPV4_BYTES + UDP_BYTES
_UDP6_HEADERS = IPV6_BYTES + UDP_BYTES
#: Place of csum_offset in a record, its low byte: one look there tells UDP from all the rest.
_KIND_AT = LENGTH_BYTES + 8
_LARGEST = 0xFFFF
_VERSION_4 = 0x45
_VERSION_6 = 6
# Of IPv4's flags, fragment offset, TTL and protocol in one number: DF, and all but DF and TTL, which must be
# those of a whole UDP datagram.
_DONT_FRAGMENT = 0x4000_0000
_SHAPE_MASK = 0xBFFF_00FF


def _seen(start: int) -> tuple[int, int, int]:
    """How the Structs show flags and gso_type, plain and merged, and the csum fields for a header there."""
    plain, csum = struct.unpack(">H4xI", VNET.pack(FLAG_NEEDS_CSUM, GSO_NONE, 0, 0, start, UDP_CHECKSUM))
    merged, _ = struct.unpack(">H4xI", VNET.pack(FLAG_NEEDS_CSUM, GSO_UDP_L4, 0, 0, 0, 0))
    return plain, merged, csum


_PLAIN, _MERGED, _CSUM4 = _seen(IPV4_BYTES)
_, _, _CSUM6 = _seen(IPV6_BYTES)
# hdr_len of a superpacket: its headers; how the Structs show it.
_HEADER4, _HEADER6 = struct.unpack(">HH", struct.pack("<HH", _UDP4_HEADERS, _UDP6_HEADERS))


class UdpCoalescer:
    """Merges one datagram at a time. Between two calls it knows only of the run under way, which `finish` ends.

    Owner: the reader of the TUN.
    """

    __slots__ = (
        "_buffer", "_count", "_end", "_headers", "_left", "_payload", "_previous", "_version", "_written",
    )  # fmt: skip

    def __init__(self) -> None:
        self._previous = -1  # where the record of the run begins; -1: there is no run
        self._end = self._written = self._count = self._payload = self._left = 0
        self._buffer = memoryview(b"")
        self._headers: tuple[Any, ...] = ()
        self._version = _V4

    def merge(self, buffer: memoryview, previous: int, fresh: int, count: int) -> int:
        """Append the datagram just read to the record before it, if it continues that one.

        `previous`: where a record begins that nobody else has seen yet; `fresh`: where `count` bytes (virtio_net_hdr
        and packet) were read behind room for a length field, at or behind that record's end.
        `buffer`: writable, and readable for 62 bytes from both places whatever `count` is; borrowed until `finish`,
        which comes before a record in another buffer. Returns by how many bytes the previous record grew, always fewer
        than were read: its headers may say so late, by `finish`. Or 0: it is whole, and may be published.
        """
        if self._previous >= 0:
            end = self._end
            if (
                previous == self._previous
                and count == self._count
                and end <= fresh
                and self._left
                and self._version.same(buffer, fresh + LENGTH_BYTES) == self._headers
            ):
                begin, payload = fresh + self._version.front, self._payload
                self._end = following = end + payload
                self._left -= 1
                buffer[end:following] = buffer[begin : begin + payload]
                return payload
            self.finish()
        if buffer[fresh + _KIND_AT] != UDP_CHECKSUM:
            return 0
        kind, csum, tos, size, identity, shape, flow, length = _FRESH4.unpack_from(
            buffer, fresh + LENGTH_BYTES
        )
        if kind != _PLAIN:
            return 0
        if csum != _CSUM4:
            return self._merge_ipv6(buffer, previous, fresh, count) if csum == _CSUM6 else 0
        record, kind, _, gso, csum, old_tos, old_size, old_identity, old_shape, _, old_flow, old_length, _ = (
            _RECORD4.unpack_from(buffer, previous)
        )
        if flow != old_flow or shape != old_shape or tos != old_tos or csum != _CSUM4:
            return 0
        plain = kind == _PLAIN and shape & _SHAPE_MASK == UDP and tos >> 8 == _VERSION_4
        payload, old_payload = length - UDP_BYTES, old_length - UDP_BYTES
        segment = _segment(kind, gso, old_payload, plain)
        if not 0 < payload <= segment or old_size + payload > _LARGEST:
            return 0
        if size != payload + _UDP4_HEADERS or size != count - VNET_BYTES:
            return 0
        if not shape & _DONT_FRAGMENT and identity != old_identity + old_payload // segment & 0xFFFF:
            return 0
        end = previous + PACKET_OFFSET + old_size
        if end > fresh or old_size != old_length + IPV4_BYTES or record != old_size + VNET_BYTES:
            return 0
        if payload == segment and shape & _DONT_FRAGMENT:
            self._begin(_V4, buffer, previous, fresh, end, payload, old_payload)
        return _append(_V4, buffer, previous, fresh, end, payload)

    def read_on(self, readinto: Callable[[memoryview], int | None], most: int) -> tuple[int, int | None]:
        """After a merge: go on reading, at most so many times, as long as each datagram continues the run, right behind
        it, where there is room for MAX_RECORD_BYTES behind the largest record there is. How many datagrams it took, and
        how many bytes `readinto` gave last, if they are none of the run: then they are behind it and behind room for a
        length field. -1: nothing but the run was read.
        """
        buffer, headers, count, payload, end = (
            self._buffer,
            self._headers,
            self._count,
            self._payload,
            self._end,
        )
        same, front = self._version.same, self._version.front
        left = min(most, self._left) if self._previous >= 0 else 0
        for taken in range(left):
            read = readinto(buffer[end + LENGTH_BYTES : end + MAX_RECORD_BYTES])
            if read != count or same(buffer, end + LENGTH_BYTES) != headers:
                self._end, self._left = end, self._left - taken
                return taken, read
            begin = end + front
            following = end + payload
            buffer[end:following] = buffer[begin : begin + payload]
            end = following
        self._end, self._left = end, self._left - left
        return left, -1

    def _merge_ipv6(self, buffer: memoryview, previous: int, fresh: int, count: int) -> int:
        """`merge` of a plain record whose virtio_net_hdr puts the UDP header where it is in IPv6."""
        label, size, hops, flow, length = _FRESH6.unpack_from(buffer, fresh + LENGTH_BYTES)
        record, kind, _, gso, csum, old_label, old_size, old_hops, old_flow, old_length, _ = (
            _RECORD6.unpack_from(buffer, previous)
        )
        if flow != old_flow or label != old_label or hops != old_hops or csum != _CSUM6:
            return 0
        plain = kind == _PLAIN and label >> 28 == _VERSION_6 and hops >> 8 == UDP
        payload, old_payload = length - UDP_BYTES, old_length - UDP_BYTES
        segment = _segment(kind, gso, old_payload, plain)
        if not 0 < payload <= segment or old_size + payload > _LARGEST or old_size != old_length:
            return 0
        if size != length or size != count - VNET_BYTES - IPV6_BYTES:
            return 0
        end = previous + PACKET_OFFSET + IPV6_BYTES + old_size
        if end > fresh or record != old_size + VNET_BYTES + IPV6_BYTES:
            return 0
        if payload == segment:
            self._begin(_V6, buffer, previous, fresh, end, payload, old_payload)
        return _append(_V6, buffer, previous, fresh, end, payload)

    def _begin(
        self,
        version: _Version,
        buffer: memoryview,
        previous: int,
        fresh: int,
        end: int,
        payload: int,
        before: int,
    ) -> None:
        """A run begins with the datagram at `fresh`, which is about to be appended to `before` bytes of payload."""
        self._buffer, self._previous, self._version = buffer, previous, version
        self._headers = version.same(buffer, fresh + LENGTH_BYTES)
        self._count, self._payload = version.front - LENGTH_BYTES + payload, payload
        self._left = min(UDP_MAX_SEGMENTS, version.room // payload) - before // payload - 1
        self._end = self._written = end + payload

    def finish(self) -> None:
        """The record that grew last is whole, and may be published. Harmless at any time."""
        previous, self._previous = self._previous, -1
        if previous >= 0 and (added := self._end - self._written):
            self._version.stretch(self._buffer, previous, added)


def _segment(kind: int, gso: int, payload: int, plain: bool) -> int:
    """How large datagrams are in a record with so much payload; 0: none may come behind them. `plain`: it is one whole
    datagram."""
    if kind != _MERGED:
        return payload if plain else 0
    size = gso >> 8 | (gso & 0xFF) << 8
    # A segment smaller than the others is the last.
    return size if size and not payload % size and payload < size * UDP_MAX_SEGMENTS else 0


def _stretch4(buffer: memoryview, previous: int, added: int) -> None:
    """Make the headers say that the record at `previous` has so much more payload."""
    length, kind, _, gso, csum, tos, size, identity, shape, check, flow, udp_size, udp_sum = (
        _RECORD4.unpack_from(buffer, previous)
    )
    if kind != _MERGED:
        segment = udp_size - UDP_BYTES & 0xFFFF
        gso = (segment & 0xFF) << 8 | segment >> 8
    # Both sums move by the same number: that of the IPv4 header as its complement, the other as it is.
    check -= added
    udp_sum += added
    _RECORD4.pack_into(
        buffer,
        previous,
        length + added & 0xFFFFFFFF,
        _MERGED,
        _HEADER4,
        gso,
        csum,
        tos,
        size + added & 0xFFFF,
        identity,
        shape,
        check if check >= 0 else check + 0xFFFF,
        flow,
        udp_size + added & 0xFFFF,
        udp_sum if udp_sum <= 0xFFFF else udp_sum - 0xFFFF,
    )


def _stretch6(buffer: memoryview, previous: int, added: int) -> None:
    """The same for IPv6."""
    length, kind, _, gso, csum, label, size, hops, flow, udp_size, udp_sum = _RECORD6.unpack_from(
        buffer, previous
    )
    if kind != _MERGED:
        segment = udp_size - UDP_BYTES & 0xFFFF
        gso = (segment & 0xFF) << 8 | segment >> 8
    udp_sum += added
    _RECORD6.pack_into(
        buffer,
        previous,
        length + added & 0xFFFFFFFF,
        _MERGED,
        _HEADER6,
        gso,
        csum,
        label,
        size + added & 0xFFFF,
        hops,
        flow,
        udp_size + added & 0xFFFF,
        udp_sum if udp_sum <= 0xFFFF else udp_sum - 0xFFFF,
    )


class _Version(NamedTuple):
    """Of IP. `same`: the headers that a run has in common, of a fresh record behind its length; `front`: bytes of a
    record before the payload; `room`: the most payload that the headers can tell."""

    same: Callable[[memoryview, int], tuple[Any, ...]]
    stretch: Callable[[memoryview, int, int], None]
    front: int
    room: int


_V4 = _Version(_same4, _stretch4, PACKET_OFFSET + _UDP4_HEADERS, _LARGEST - _UDP4_HEADERS)
_V6 = _Version(_same6, _stretch6, PACKET_OFFSET + _UDP6_HEADERS, _LARGEST - UDP_BYTES)


def _append(version: _Version, buffer: memoryview, previous: int, fresh: int, end: int, payload: int) -> int:
    """The payload of the datagram at `fresh` goes to `end`, and the headers of the record say so. How much it is."""
    version.stretch(buffer, previous, payload)
    begin = fresh + version.front
    buffer[end : end + payload] = buffer[begin : begin + payload]
    return payload
