"""Multiaddrs of TCP endpoints: reading them, looking up names in them, and what to announce for wildcards."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable, Sequence

import trio

from vpnd import interfaces
from vpnd.config import multiaddrs
from vpnd.endpoint import IP, Endpoint
from vpnd.errors import ConfigError

#: Protocol name in a multiaddr -> address family to look a host name up in.
NAME_FAMILIES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}
FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}
#: How interfaces are called that lead to containers and virtual machines.
INSIDE = (
    "docker",
    "br-",
    "veth",
    "virbr",
    "vnet",
    "cni",
    "flannel",
    "cali",
    "lxc",
    "lxdbr",
    "podman",
    "kube",
)


def parse_endpoint(text: str) -> Endpoint:
    """An endpoint from /ip4|ip6/…/tcp/…; a /p2p part behind it is ignored. Raises ConfigError."""
    parsed = _parse(text)
    if parsed.kind not in FAMILIES:
        raise ConfigError(f"{text}: an IP address is needed here, not a name")
    return Endpoint(ipaddress.ip_address(parsed.host), parsed.port)


def literal(text: str) -> Endpoint | None:
    """The endpoint of a multiaddr with an IP address; None for one with a host name, for which nobody waits here."""
    try:
        return parse_endpoint(text)
    except ConfigError:
        return None


async def resolve(text: str) -> list[Endpoint]:
    """The endpoints behind an address to dial, host names looked up the way the machine does it.

    The machine's resolver rather than libp2p's, which knows no /etc/hosts. Has no deadline of its own.
    Raises ConfigError for what is no TCP multiaddr, OSError when the name is not found.
    """
    parsed = _parse(text)
    if parsed.kind in FAMILIES:
        return [Endpoint(ipaddress.ip_address(parsed.host), parsed.port)]
    family = NAME_FAMILIES[parsed.kind]
    found = await trio.socket.getaddrinfo(parsed.host, parsed.port, family, socket.SOCK_STREAM)
    return [Endpoint(ipaddress.ip_address(entry[4][0]), parsed.port) for entry in found]


def _parse(text: str) -> multiaddrs.Endpoint:
    try:
        return multiaddrs.parse(text)
    except multiaddrs.Refused as error:
        raise ConfigError(f"{text} {error}") from error


def expand_wildcards(
    bound: Iterable[Endpoint], without_interface: str, without_ips: Sequence[str] = ()
) -> list[Endpoint]:
    """What others can dial: wildcards become the addresses of the machine's interfaces, the rest stays.

    Left out: loopback and link-local addresses, those of `without_interface` (the VPN's own TUN: reaching a
    node through the VPN it carries is a loop), and `without_ips`. The most useful come first, for a token and a
    presence have room for a few: those that are named, then those of the interface with the default route, those of
    bridges (containers, virtual machines) last; among them public ones, then IPv6's private ones, then IPv4's.
    """
    excluded = {ipaddress.ip_address(text) for text in without_ips if text}
    endpoints = list(bound)
    named = [endpoint for endpoint in endpoints if not endpoint.ip.is_unspecified]
    wild = [endpoint for endpoint in endpoints if endpoint.ip.is_unspecified]
    found = [
        Endpoint(ip, endpoint.port)
        for ip in (_interface_addresses(without_interface) if wild else ())
        for endpoint in wild
        if ip.version == endpoint.ip.version and ip not in excluded
    ]
    return list(dict.fromkeys((*named, *found)))


def _interface_addresses(without: str) -> list[IP]:
    found: list[tuple[int, int, IP]] = []
    uplinks = _uplinks()
    for name, held in interfaces.addresses():
        ip = held.ip
        if name != without and not ip.is_loopback and not ip.is_link_local:
            place = 0 if name in uplinks else 2 if _is_inside(name) else 1
            found.append((place, 0 if ip.is_global else 1 if ip.version == 6 else 2, ip))
    # not by the addresses themselves: in the interfaces' order
    return [ip for _, _, ip in sorted(found, key=lambda each: each[:2])]


def _uplinks() -> set[str]:
    """Interfaces with a default route. Formats: proc(5), /proc/net/route and /proc/net/ipv6_route."""
    found = set()
    for file, interface, target, length in (("route", 0, 1, 7), ("ipv6_route", 9, 0, 1)):
        with contextlib.suppress(OSError), open(f"/proc/net/{file}") as lines:
            for words in (line.split() for line in lines):
                if len(words) > max(interface, length) and not (words[target] + words[length]).strip("0"):
                    found.add(words[interface])
    return found - {"lo"}


def _is_inside(name: str) -> bool:
    """Whether it leads to containers or virtual machines of this machine, not out of it."""
    return name.startswith(INSIDE) or os.path.isdir(f"/sys/class/net/{name}/bridge")
