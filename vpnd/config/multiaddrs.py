"""The multiaddrs a configuration may hold: one TCP endpoint, perhaps with the peer id behind it.

    /ip4/192.0.2.1/tcp/4001
    /ip6/2001:db8::1/tcp/4001
    /dns/node.example.org/tcp/4001       also dns4, dns6
    …/p2p/12D3KooW…                      only where a peer is dialed

Parsed here and not by a library: the one libp2p brings takes longer to load than the rest of the command.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from vpnd import peerid

MAX_PORT = 65535
#: RFC 1035 section 2.3.4, without the closing dot.
MAX_HOST_NAME = 253

_DNS = ("dns", "dns4", "dns6")
_label = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)", re.ASCII)
_bare = re.compile(r"\[?(?P<host>[0-9a-fA-F:.]+?)\]?:(?P<port>[0-9]{1,5})", re.ASCII)


class Refused(ValueError):
    """A value cannot be used. Its text is the reason and the remedy, ready to stand behind the value."""


class Endpoint(NamedTuple):
    """A multiaddr in its parts; `peer_id` is empty without /p2p."""

    kind: str
    host: str
    port: int
    peer_id: str = ""

    def __str__(self) -> str:
        tail = f"/p2p/{self.peer_id}" if self.peer_id else ""
        return f"/{self.kind}/{self.host}/tcp/{self.port}{tail}"


def is_port(text: str) -> bool:
    """True for 1 to 65535 written without leading zeros."""
    return bool(re.fullmatch(r"[1-9][0-9]{0,4}", text, re.ASCII)) and int(text) <= MAX_PORT


def parse(text: str) -> Endpoint:
    """The endpoint `text` names; port 0 is let through. Raises Refused."""
    if not text.startswith("/"):
        raise Refused(f"is not a multiaddr; write {_guess(text)}")
    parts = text.split("/")[1:]
    if len(parts) not in (4, 6):
        raise Refused("is not a TCP multiaddr; write it like /ip4/192.0.2.1/tcp/4001")
    kind, host, transport, port = parts[:4]
    if transport != "tcp":
        raise Refused(f"uses {transport!r}, but sessions are TCP; write it like /{kind}/{host}/tcp/4001")
    if port != "0" and not is_port(port):
        raise Refused(f"has no port behind /tcp/; write one from 1 to {MAX_PORT}")
    peer_id = ""
    if len(parts) == 6:
        if parts[4] != "p2p":
            raise Refused(f"has /{parts[4]} behind the port, where only /p2p/<peer id> may stand; remove it")
        peer_id = parts[5]
        try:
            peerid.public_key_untrusted(peer_id)
        except ValueError as error:
            raise Refused(f"has a /p2p/ that {error}; copy what `vpnd id` prints on that node") from None
    return Endpoint(kind, _host(kind, host), int(port), peer_id)


def _host(kind: str, host: str) -> str:
    if kind in _DNS:
        labels = host.removesuffix(".").split(".")
        if len(host) > MAX_HOST_NAME or not all(_label.fullmatch(label) for label in labels):
            raise Refused(
                f"has no host name behind /{kind}/; write it like /{kind}/host.example.org/tcp/4001"
            )
        return host
    if kind not in ("ip4", "ip6"):
        raise Refused(f"starts with /{kind}; write /ip4, /ip6, /dns, /dns4 or /dns6")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise Refused(f"has no IP address behind /{kind}/; write it like /ip4/192.0.2.1/tcp/4001") from None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        raise Refused(f"is IPv4 inside IPv6; write /ip4/{address.ipv4_mapped}/…")
    if f"ip{address.version}" != kind:
        raise Refused(
            f"has an IPv{address.version} address behind /{kind}/; write /ip{address.version}/{host}/…"
        )
    if address.is_multicast:
        raise Refused("is a multicast address; name one machine")
    if "%" in host:
        raise Refused("names an interface; TCP multiaddrs have no place for it, use an address without %")
    return str(address)


def _guess(text: str) -> str:
    """What the user probably meant by "192.0.2.1:4001"."""
    match = _bare.fullmatch(text)
    if match and is_port(match["port"]):
        try:
            version = ipaddress.ip_address(match["host"]).version
        except ValueError:
            pass
        else:
            return f"/ip{version}/{match['host']}/tcp/{match['port']}"
    return "it like /ip4/192.0.2.1/tcp/4001"
