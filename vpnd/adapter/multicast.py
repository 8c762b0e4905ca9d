"""UDP sockets that say one thing from each address of this machine to a group of its link, one class per IP version.

A message tells where it comes from by its source address, so that is chosen for each: in IPv6 a link-local one, which
nobody could dial, would be taken otherwise.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple, Protocol

from vpnd import interfaces


class Own(NamedTuple):
    """An address of this machine, and the index of its interface."""

    address: str
    interface: int


class Multicast(Protocol):
    """One socket, non-blocking."""

    sock: socket.socket
    version: int

    def join(self, own: Own) -> None:
        """Hear what is said to the group on the interface of that address. Raises OSError, also when it is heard
        already."""
        ...

    def say(self, own: Own, message: bytes) -> None:
        """Send to the group from that address. Raises OSError."""
        ...


class Multicast4:
    """Of IPv4. The constructor raises OSError."""

    version = 4

    def __init__(self, group: str, port: int, ttl: int) -> None:
        self._group, self._port = group, port
        self.sock = _bound(socket.AF_INET, "", port)
        self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)

    def join(self, own: Own) -> None:
        """See Multicast."""
        request = struct.pack("4s4s", socket.inet_aton(self._group), socket.inet_aton(own.address))
        self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)

    def say(self, own: Own, message: bytes) -> None:
        """See Multicast."""
        self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own.address))
        self.sock.sendto(message, (self._group, self._port))


class Multicast6:
    """Of IPv6. The constructor raises OSError."""

    version = 6

    def __init__(self, group: str, port: int, hops: int) -> None:
        self._group, self._port = group, port
        self.sock = _bound(socket.AF_INET6, "::", port)
        self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, hops)

    def join(self, own: Own) -> None:
        """See Multicast."""
        request = socket.inet_pton(socket.AF_INET6, self._group) + struct.pack("@I", own.interface)
        self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)

    def say(self, own: Own, message: bytes) -> None:
        """See Multicast."""
        source = socket.inet_pton(socket.AF_INET6, own.address) + struct.pack("@I", own.interface)
        chosen = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, source)]
        self.sock.sendmsg([message], chosen, 0, (self._group, self._port, 0, own.interface))


def _bound(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def own_addresses(version: int, without: str) -> set[Own]:
    """The addresses of that IP version that others in a local network could dial, but for those of one interface."""
    found = set()
    for name, held in interfaces.addresses():
        ip = held.ip
        useful = not ip.is_loopback and (version == 4 or not ip.is_link_local)
        if name != without and ip.version == version and useful:
            found.add((name, str(ip)))
    return {own for name, address in found if (own := _own(name, address)) is not None}


def _own(name: str, address: str) -> Own | None:
    try:
        return Own(address, socket.if_nametoindex(name))
    except OSError:  # it has just gone
        return None
