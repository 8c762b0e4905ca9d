"""Multiaddrs of TCP endpoints: reading them, looking up names in them, and what to announce for wildcards."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence

import psutil
import trio

from vpnd.config import multiaddrs
from vpnd.endpoint import Endpoint
from vpnd.errors import ConfigError

#: Protocol name in a multiaddr -> address family to look a host name up in.
NAME_FAMILIES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}
FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}


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
    node through the VPN it carries is a loop), and `without_ips`.
    """
    excluded = {ipaddress.ip_address(text) for text in without_ips if text}
    result: dict[Endpoint, None] = {}
    for endpoint in bound:
        if not endpoint.ip.is_unspecified:
            result[endpoint] = None
            continue
        for ip in _interface_addresses(without_interface):
            if ip.version == endpoint.ip.version and ip not in excluded:
                result[Endpoint(ip, endpoint.port)] = None
    return list(result)


def _interface_addresses(without: str) -> Iterable[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    for name, entries in psutil.net_if_addrs().items():
        if name == without:
            continue
        for entry in entries:
            if entry.family in FAMILIES.values():
                ip = ipaddress.ip_address(entry.address.partition("%")[0])
                if not ip.is_loopback and not ip.is_link_local:
                    yield ip
