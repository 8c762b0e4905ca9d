"""Asking a router for a port: PCP (RFC 6887, MAP) and NAT-PMP (RFC 6886), as bytes. Datagrams to its port 5351.

    PCP, both ways        version 2, opcode 1 (answers: 0x81), 16 bits, lifetime in seconds (32), then in a request the
                          client's address (128), in an answer epoch (32) and 96 bits; in the answer's 16 bits the last
                          8 are the result
    PCP, MAP              nonce (96), protocol (8), 24 bits, internal and external port (16), external address (128)
    NAT-PMP, address      version 0, opcode 0; answer: 128, result (16), epoch (32), address (32)
    NAT-PMP, map TCP      version 0, opcode 2, 16 bits, internal and external port (16), lifetime (32);
                          answer: 130, result (16), epoch (32), internal and external port (16), lifetime (32)
    announcements         what a router that has started says to all, to ANNOUNCED_TO: a PCP answer of opcode 0, or the
                          NAT-PMP answer with its address

A lifetime of 0 takes a mapping back.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

from vpnd.endpoint import Endpoint
from vpnd.errors import RemoteProtocolError

ROUTER_PORT = 5351
#: RFC 6887 section 14.1.3, RFC 6886 section 3.2.1: all machines of the local network.
ANNOUNCED_TO = ("224.0.0.1", 5350)
NONCE_BYTES = 12
TCP = 6
#: RFC 6887 section 7: no message is longer.
MAX_DATAGRAM = 1100

_PCP_VERSION, _PMP_VERSION = 2, 0
_ANNOUNCE, _MAP, _ANSWER = 0, 1, 0x80
_PMP_ADDRESS, _PMP_MAP_TCP = 0, 2
_pcp_request = struct.Struct("!BBHI16s")
_pcp_answer = struct.Struct("!BBBBII12x")
_pcp_map = struct.Struct("!12sB3xHH16s")
_pmp_map_request = struct.Struct("!BBHHHI")
_pmp_address_answer = struct.Struct("!BBHI4s")
_pmp_map_answer = struct.Struct("!BBHIHHI")
_ANNOUNCEMENTS = (bytes((_PCP_VERSION, _ANNOUNCE | _ANSWER)), bytes((_PMP_VERSION, _PMP_ADDRESS | _ANSWER)))

_PCP_RESULTS = {
    1: "it speaks another version", 2: "it is not permitted", 3: "the request is malformed",
    4: "it knows no such request", 5: "it knows no such option", 6: "an option is malformed",
    7: "its network does not work", 8: "it has no room", 9: "it maps no TCP", 10: "this machine has too many",
    11: "it cannot give that port", 12: "another router is in between", 13: "the request has too many peers",
}  # fmt: skip
_PMP_RESULTS = {
    1: "it speaks another version", 2: "it is not permitted", 3: "its network does not work", 4: "it has no room",
    5: "it knows no such request",
}  # fmt: skip


class Granted(NamedTuple):
    """A port of the router's that leads here. `ip` None: the router has not said at which address."""

    ip: ipaddress.IPv4Address | None
    port: int
    lifetime_s: int


class PortRefused(RemoteProtocolError):
    """The router has answered, and gives no port."""


def pcp_request(
    nonce: bytes, client: ipaddress.IPv4Address, port: int, wanted: Endpoint | None, lifetime_s: int
) -> bytes:
    """For `port` of this machine, which is `client`; `wanted`: the outside it would like, or had."""
    outside = wanted or Endpoint(ipaddress.IPv4Address(0), port)
    assert isinstance(outside.ip, ipaddress.IPv4Address)
    head = _pcp_request.pack(_PCP_VERSION, _MAP, 0, lifetime_s, _mapped(client))
    return head + _pcp_map.pack(nonce, TCP, port, outside.port, _mapped(outside.ip))


def pcp_answer_untrusted(data: bytes, nonce: bytes, port: int) -> Granted:
    """What the answer to a `pcp_request` grants. Raises PortRefused; RemoteProtocolError when it is no answer to it."""
    if len(data) < _pcp_answer.size or len(data) > MAX_DATAGRAM:
        raise _stray(data)
    version, opcode, _, result, lifetime_s, _ = _pcp_answer.unpack_from(data)
    if version == _PMP_VERSION:
        raise PortRefused("it speaks NAT-PMP")
    if (version, opcode) != (_PCP_VERSION, _MAP | _ANSWER):
        raise _stray(data)
    if result:
        raise PortRefused(_PCP_RESULTS.get(result, f"it gives the reason {result}"))
    if len(data) < _pcp_answer.size + _pcp_map.size:
        raise _stray(data)
    heard, protocol, internal, external, packed = _pcp_map.unpack_from(data, _pcp_answer.size)
    ip = ipaddress.IPv6Address(packed).ipv4_mapped
    if (heard, protocol, internal) != (nonce, TCP, port) or not external or ip is None:
        raise _stray(data)
    return Granted(ip, external, lifetime_s)


def is_announcement_untrusted(data: bytes) -> bool:
    """Whether a router says that it has started, or has another address. Cannot fail."""
    return data[:2] in _ANNOUNCEMENTS and len(data) in (_pcp_answer.size, _pmp_address_answer.size)


def pmp_address_request() -> bytes:
    """For the router's outside address."""
    return bytes((_PMP_VERSION, _PMP_ADDRESS))


def pmp_address_untrusted(data: bytes) -> ipaddress.IPv4Address:
    """The router's outside address. Raises PortRefused, RemoteProtocolError."""
    _pmp_result_untrusted(data, _PMP_ADDRESS, _pmp_address_answer.size)
    return ipaddress.IPv4Address(_pmp_address_answer.unpack_from(data)[4])


def pmp_request(port: int, wanted_port: int, lifetime_s: int) -> bytes:
    """For `port` of this machine; `wanted_port`: the outside one it would like, or had; 0 with a lifetime of 0."""
    return _pmp_map_request.pack(_PMP_VERSION, _PMP_MAP_TCP, 0, port, wanted_port, lifetime_s)


def pmp_answer_untrusted(data: bytes, port: int) -> Granted:
    """What the answer to a `pmp_request` grants. Raises PortRefused, RemoteProtocolError."""
    _pmp_result_untrusted(data, _PMP_MAP_TCP, _pmp_map_answer.size)
    *_, internal, external, lifetime_s = _pmp_map_answer.unpack_from(data)
    if internal != port or not external:
        raise _stray(data)
    return Granted(None, external, lifetime_s)


def _pmp_result_untrusted(data: bytes, opcode: int, size: int) -> None:
    if len(data) < 4 or data[0] != _PMP_VERSION or data[1] != opcode | _ANSWER:
        raise _stray(data)
    if result := int.from_bytes(data[2:4]):
        raise PortRefused(_PMP_RESULTS.get(result, f"it gives the reason {result}"))
    if len(data) != size:
        raise _stray(data)


def _mapped(ip: ipaddress.IPv4Address) -> bytes:
    """IPv4 in IPv6 (RFC 4291 section 2.5.5.2), as PCP writes it."""
    return bytes(10) + b"\xff\xff" + ip.packed


def _stray(data: bytes) -> RemoteProtocolError:
    return RemoteProtocolError(f"{len(data)} bytes from the router are no answer to what it was asked")
