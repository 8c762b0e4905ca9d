"""ICMP of both IP versions (RFC 792, RFC 4443): echo requests made, replies taken apart; hosts called unreachable.

type (8) | code (8) | checksum (16) | identifier (16) | sequence (16) | payload           echo
type (8) | code (8) | checksum (16) | 0 (32) | the packet it is about, or its beginning    an error
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vpnd.errors import BadPacket
from vpnd.packet import checksum
from vpnd.packet.offload.headers import FRAGMENT, IPV4_FRAGMENT_MASK, transport

_ECHO = struct.Struct(">BBHHH")
#: Types by IP version (IANA); the code of both is 0.
_REQUEST = {4: 8, 6: 128}
REPLY = {4: 0, 6: 129}
_PROTOCOL, _PROTOCOL6 = 1, 58
_IPV4_HEADER_BYTES, _IPV6_HEADER_BYTES = 20, 40
_ERROR_BYTES = 8
#: Type and code of "host unreachable" and "address unreachable".
_UNREACHABLE = {4: b"\x03\x01", 6: b"\x01\x03"}
#: Types of ICMP that ask or answer something (IANA); all others are errors. Of ICMPv6: from 128 on, but the redirect.
_QUERIES = frozenset({0, 8, 9, 10, 13, 14, 15, 16, 17, 18, 42, 43})
_FIRST_QUERY6, _REDIRECT6 = 128, 137
#: An error is no longer than this: RFC 1812, 4.3.2.3, and RFC 4443, 2.4 (c).
_MOST = {4: 576, 6: 1280}
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_IPV6 = struct.Struct(">IHBB16s16s")
#: Linux' class of "internetwork control" (RFC 1812, 4.3.2.5), and the hops any packet gets.
_CONTROL, _HOPS = 0xC0, 64
#: Types of errors that routers send: unreachable, time exceeded, parameter problem; of ICMPv6 also packet too big.
_OF_ROUTERS, _OF_ROUTERS6 = frozenset({3, 11, 12}), frozenset({1, 2, 3, 4})
_ADDRESSES4, _ADDRESSES6 = struct.Struct(">12xII"), struct.Struct(">8xQQQQ")
_OFFSET4, _OFFSET6 = 0x1FFF, 0xFFF8


class Reply(NamedTuple):
    """An echo reply: what the request had, if the other end is honest."""

    identifier: int
    sequence: int
    payload: bytes


def request(version: int, identifier: int, sequence: int, payload: bytes) -> bytes:
    """An echo request, without an IP header. The checksum of ICMPv6 is left to the kernel, which knows the addresses
    that go into it."""
    body = _ECHO.pack(_REQUEST[version], 0, 0, identifier, sequence) + payload
    if version == 6:
        return body
    return body[:2] + checksum.complement(checksum.total(body)).to_bytes(2, "big") + body[4:]


def reply_untrusted(version: int, packet: bytes) -> Reply:
    """What a raw socket gave: of IPv4 with the IP header, of IPv6 without it and with its checksum verified.

    Raises BadPacket for anything but a whole echo reply.
    """
    message = _payload_untrusted(packet) if version == 4 else packet
    if len(message) < _ECHO.size:
        raise BadPacket("malformed_remote")
    kind, code, _, identifier, sequence = _ECHO.unpack_from(message)
    if (kind, code) != (REPLY[version], 0) or (version == 4 and checksum.total(message)):
        raise BadPacket("malformed_remote")
    return Reply(identifier, sequence, message[_ECHO.size :])


def _payload_untrusted(packet: bytes) -> bytes:
    """What is behind an IPv4 header."""
    if len(packet) < _IPV4_HEADER_BYTES or packet[0] >> 4 != 4:
        raise BadPacket("malformed_remote")
    header = (packet[0] & 0x0F) * 4
    if header < _IPV4_HEADER_BYTES or header > len(packet) or packet[9] != _PROTOCOL:
        raise BadPacket("malformed_remote")
    return packet[header:]


def quoted_untrusted(packet: memoryview) -> tuple[int, int, int]:
    """Which packet an ICMP error of a router is about, whose IP header and length have been looked at: the error's IP
    version, and source and destination of that packet, as numbers. Raises BadPacket for anything else."""
    version = packet[0] >> 4
    if version == 4:
        place = (packet[0] & 0x0F) * 4
        about = place + _ERROR_BYTES
        fragment = (packet[6] << 8 | packet[7]) & IPV4_FRAGMENT_MASK
        if packet[9] != _PROTOCOL or fragment or len(packet) < about + _IPV4_HEADER_BYTES:
            raise BadPacket("malformed_remote")
        if packet[place] not in _OF_ROUTERS or packet[about] >> 4 != 4:
            raise BadPacket("malformed_remote")
        return 4, *_ADDRESSES4.unpack_from(packet, about)
    about = _IPV6_HEADER_BYTES + _ERROR_BYTES
    if packet[6] != _PROTOCOL6 or len(packet) < about + _IPV6_HEADER_BYTES:
        raise BadPacket("malformed_remote")
    if packet[_IPV6_HEADER_BYTES] not in _OF_ROUTERS6 or packet[about] >> 4 != 6:
        raise BadPacket("malformed_remote")
    halves = _ADDRESSES6.unpack_from(packet, about)
    return 6, halves[0] << 64 | halves[1], halves[2] << 64 | halves[3]


def unreachable(packet: memoryview) -> bytes | None:
    """What the sender of a packet of this machine is told when there is no way to its destination: an IP packet, which
    comes from there. None for what must not be answered (RFC 1122, 3.2.2; RFC 4443, 2.4 (e)): errors of ICMP, fragments
    but the first, what is for many or from nobody. `packet` may be a superpacket, or broken.
    """
    version = packet[0] >> 4 if len(packet) else 0
    if version == 4:
        header = (packet[0] & 0x0F) * 4
        if len(packet) < header or header < _IPV4_HEADER_BYTES:
            return None
        source, destination = bytes(packet[12:16]), bytes(packet[16:20])
        later = (packet[6] << 8 | packet[7]) & _OFFSET4
        if later or not (_is_one4(source) and _is_one4(destination)):
            return None
        if packet[9] == _PROTOCOL and (len(packet) <= header or packet[header] not in _QUERIES):
            return None
        quoted = packet[: _MOST[4] - _IPV4_HEADER_BYTES - _ERROR_BYTES]
        body = _error(4, quoted, 0)
        length = _IPV4_HEADER_BYTES + len(body)
        fields = [0x45, _CONTROL, length, 0, 0, _HOPS, _PROTOCOL, 0, destination, source]
        fields[7] = checksum.complement(checksum.total(_IPV4.pack(*fields)))
        return _IPV4.pack(*fields) + body
    if version != 6 or len(packet) < _IPV6_HEADER_BYTES:
        return None
    source, destination = bytes(packet[8:24]), bytes(packet[24:40])
    if not (_is_one6(source) and _is_one6(destination)):
        return None
    place, protocol = transport(packet, 0, len(packet))
    if protocol == FRAGMENT:
        if place + 8 >= len(packet) or (packet[place + 2] << 8 | packet[place + 3]) & _OFFSET6:
            return None
        place, protocol = place + 8, packet[place]
    if protocol == _PROTOCOL6 and (
        place >= len(packet) or packet[place] < _FIRST_QUERY6 or packet[place] == _REDIRECT6
    ):
        return None
    quoted = packet[: _MOST[6] - _IPV6_HEADER_BYTES - _ERROR_BYTES]
    length = _ERROR_BYTES + len(quoted)
    pseudo = checksum.total(source + destination) + length + _PROTOCOL6
    return _IPV6.pack(6 << 28, length, _PROTOCOL6, _HOPS, destination, source) + _error(6, quoted, pseudo)


def _error(version: int, quoted: memoryview, pseudo: int) -> bytes:
    """`pseudo`: sum of the words of a pseudo header."""
    body = _UNREACHABLE[version] + bytes(_ERROR_BYTES - 2) + quoted
    return body[:2] + checksum.complement(checksum.total(body) + pseudo).to_bytes(2, "big") + body[4:]


def _is_one4(address: bytes) -> bool:
    """Whether it is an address of one machine, and not of every one alike."""
    return address[0] not in (0, 127) and address[0] < 0xE0


def _is_one6(address: bytes) -> bool:
    return address[0] != 0xFF and any(address[:15])
