"""ICMP echo, of both IP versions (RFC 792, RFC 4443): requests made, replies taken apart.

type (8) | code (8) | checksum (16) | identifier (16) | sequence (16) | payload
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vpnd.errors import BadPacket
from vpnd.packet import checksum

_ECHO = struct.Struct(">BBHHH")
#: Types by IP version (IANA); the code of both is 0.
_REQUEST = {4: 8, 6: 128}
REPLY = {4: 0, 6: 129}
_PROTOCOL = 1
_IPV4_HEADER_BYTES = 20


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
