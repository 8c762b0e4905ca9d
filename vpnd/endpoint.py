"""An IP address with a TCP port, as a value; and what types of ipaddress are called that may be of either version."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple

from vpnd.config.multiaddrs import MAX_PORT

IP = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

#: Prefix length of the broadest IPv4 range that a network's members may have their addresses of.
SHORTEST_SUBNET = 8


def ip_of(text: str) -> IP | None:
    """The IP address that is written as `text`; None for anything else."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


class Endpoint(NamedTuple):
    """One IP address and TCP port; port 0 lets the kernel choose."""

    ip: IP
    port: int

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET if self.ip.version == 4 else socket.AF_INET6

    def multiaddr(self) -> str:
        """As /ip4/…/tcp/… or /ip6/…/tcp/…."""
        return f"/ip{self.ip.version}/{self.ip}/tcp/{self.port}"

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if self.ip.version == 6 else f"{self.ip}:{self.port}"


def of_socket_address(address: tuple[str, int] | tuple[str, int, int, int]) -> Endpoint:
    """What getsockname and getpeername give; IPv4 inside IPv6 is IPv4, and an interface behind % is left out."""
    ip: IP = ipaddress.ip_address(address[0].partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return Endpoint(ip, address[1])


def parse(text: str) -> Endpoint:
    """The endpoint that prints as `text`, and no other spelling of it. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > MAX_PORT:
        raise ValueError(f"{text!r} has no port")
    endpoint = Endpoint(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")), int(port))
    if str(endpoint) != text or "%" in text:
        raise ValueError(f"{text!r} is not written as endpoints are")
    return endpoint
