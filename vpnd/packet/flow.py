"""Flow keys, and which shard a flow belongs to.

A flow is everything to one destination: IP address, protocol, destination port. Packets of protocols without ports,
and every fragment of a fragmented datagram (only the first one has the port), go by the address alone, so that a
datagram and all its fragments take one way.

Keys are ints, made with one unpack and a few shifts: they are the price every packet pays twice.

    IPv4   address (32 bits) | protocol (8) | port (16)                          below 2**56
    IPv6   1 | address (128 bits) | protocol (8) | port (16)                     from 2**152 on
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

#: Protocols whose header begins with source and destination port: TCP, UDP, DCCP, SCTP, UDP-Lite (IANA).
PORT_PROTOCOLS = frozenset({6, 17, 33, 132, 136})

#: Those that rules can name (IANA).
PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1}
#: ICMP of IPv4 (IANA).
_ICMP = 1

#: IPv4 header without options and the first four bytes behind it: version and IHL, flags and fragment offset,
#: protocol, destination, destination port.
IPV4 = struct.Struct(">B5xHxB6xI2xH")
#: IPv6 header and the first four bytes behind it: version …, payload length, next header, destination, port.
IPV6 = struct.Struct(">B3xHBx16xQQ2xH")
#: More-fragments flag and offset of an IPv4 header.
IPV4_FRAGMENT = 0x3FFF
#: So many bytes from a packet's start are read to make its key, whatever its length.
READ_AHEAD_BYTES = IPV6.size
IPV6_MARK = 1 << 152
_ipv4_from = IPV4.unpack_from

_MASK64 = (1 << 64) - 1


def key_of(buffer: memoryview, offset: int, length: int) -> int:
    """Flow key of the packet at buffer[offset : offset + length]; -1 when it is not an IP packet.

    `buffer` must be readable for READ_AHEAD_BYTES from `offset`, whatever `length` says; bytes beyond it do not
    enter the key.
    """
    first, fragment, protocol, destination, port = _ipv4_from(buffer, offset)
    if first == 0x45 and protocol in PORT_PROTOCOLS and not fragment & IPV4_FRAGMENT and length >= 24:
        return destination << 24 | protocol << 16 | port  # nearly all there is
    version = first >> 4
    if version == 4:
        header = (first & 0x0F) * 4
        if header < 20 or header > length:
            return -1
        if fragment & IPV4_FRAGMENT:
            return destination << 24
        if protocol in PORT_PROTOCOLS and length >= header + 4:
            port = buffer[offset + header + 2] << 8 | buffer[offset + header + 3]
            return destination << 24 | protocol << 16 | port
        return destination << 24 | protocol << 16
    if version == 6:
        if length < 40:
            return -1
        _, _, protocol, high, low, port = IPV6.unpack_from(buffer, offset)
        key = IPV6_MARK | high << 88 | low << 24
        if protocol in PORT_PROTOCOLS and length >= 44:
            return key | protocol << 16 | port
        # Extension headers are not walked: such a packet goes by the address, as do its fragments.
        return key
    return -1


def key_to(destination: IPv4Address | IPv6Address, protocol: int, port: int) -> int:
    """Flow key of whole packets to an address, of an IP protocol; `port` counts where the protocol has any."""
    what = protocol << 16 | (port if protocol in PORT_PROTOCOLS else 0)
    if destination.version == 4:
        return int(destination) << 24 | what
    return IPV6_MARK | int(destination) << 24 | (what if protocol in PORT_PROTOCOLS else 0)


def echo_key(destination: IPv4Address | IPv6Address) -> int:
    """Flow key of ICMP and ICMPv6 packets to an address: echo requests, as ping sends them."""
    return key_to(destination, _ICMP, 0)


def kind_of(key: int) -> int:
    """Protocol (8 bits) and port (16) of a flow; see `key_of` for those that are 0."""
    return key & 0xFFFFFF


def rule_of(text: str) -> int:
    """What `kind_of` gives for flows of a protocol, as PROTOCOL, or of one port of it, as PROTOCOL/PORT. Raises
    ValueError."""
    name, slash, port = text.partition("/")
    number = PROTOCOLS.get(name, -1)
    if number < 0 and name.isascii() and name.isdigit() and 0 < int(name) < 256:
        number = int(name)
    if number < 0:
        raise ValueError(
            f"names no protocol; write {', '.join(PROTOCOLS)} or a number, with /PORT for one port"
        )
    if not slash:
        return number << 16
    if number not in PORT_PROTOCOLS:
        raise ValueError(f"names a port, which {name} does not have; write {name} alone")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError("names a port that is none; give one from 1 to 65535")
    return number << 16 | int(port)


def is_unicast(key: int) -> bool:
    """False for multicast, broadcast and unspecified destinations, which no peer owns."""
    if key < IPV6_MARK:
        address = key >> 24
        return 0 < address < 0xE0000000
    return (key >> 144) & 0xFF != 0xFF and (key >> 24) & ((1 << 128) - 1) != 0


def destination_of(key: int) -> tuple[int, int]:
    """(version, address as a number) of a key."""
    if key < IPV6_MARK:
        return 4, key >> 24
    return 6, (key >> 24) & ((1 << 128) - 1)


def weight(key: int, shard: int) -> int:
    """The rendezvous weight of a flow on a shard: 64 mixed bits (the finalizer of splitmix64, Steele et al. 2014)."""
    value = (key ^ key >> 64 ^ key >> 128 ^ (shard + 1) * 0x9E3779B97F4A7C15) & _MASK64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31


def shard_of(key: int, shards: Sequence[int]) -> int:
    """The shard, of those given, that a flow belongs to: losing one moves its flows only, a new one takes its share."""
    return max(shards, key=lambda shard: weight(key, shard))
