"""Reverse names: 1.0.86.10.in-addr.arpa is the network 10.86.0.1/32 (RFC 1035 section 3.5, RFC 3596 2.5).

Each label stands for 8 bits of an IPv4 address, 4 of an IPv6 one, so a network whose length is not a multiple of
that has several reverse zones. Answers need no list of them: that a name is in one, and where that begins, can be told
from the name (`locate`). A resolver that is to send us its queries needs the list
(`origins.zone_names`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

import dns.name

from vpnd.endpoint import IPNetwork
from vpnd.names.origins import ROOTS

_ROOTS = {version: (dns.name.from_text(root), bits) for version, (root, bits) in ROOTS.items()}
_DIGITS = {4: frozenset(b"0123456789"), 6: frozenset(b"0123456789abcdef")}


class Place(NamedTuple):
    """Where a reverse name is: below `apex`, the top of its zone. `network` None: no address can have it."""

    apex: dns.name.Name
    network: IPNetwork | None


def locate(name: dns.name.Name, prefixes: Iterable[IPNetwork]) -> Place | None:
    """The place of `name` (absolute) in the reverse zones of `prefixes`; None when it is in none of them."""
    for version, (root, bits) in _ROOTS.items():
        if not name.is_subdomain(root) or name == root:
            continue
        labels = [label.lower() for label in name.labels[: -len(root.labels)]]
        numbers = _numbers(labels[::-1], version, bits)
        for prefix in prefixes:
            steps = -(-prefix.prefixlen // bits)
            if prefix.version != version or len(numbers) < steps:
                continue
            if _network(numbers[:steps], version, bits).subnet_of(prefix):  # type: ignore[arg-type]
                apex = dns.name.Name(name.labels[len(labels) - steps :])
                whole = len(numbers) == len(labels)
                return Place(apex, _network(numbers, version, bits) if whole else None)
    return None


def _numbers(labels: list[bytes], version: int, bits: int) -> list[int]:
    """The labels from the root down as numbers, up to the first that is none, or one too many."""
    numbers: list[int] = []
    most = (32 if version == 4 else 128) // bits
    for label in labels[:most]:
        base = 10 if version == 4 else 16
        if not label or len(label) > 3 or not _DIGITS[version].issuperset(label):
            break
        number = int(label, base)
        written = b"%d" % number if version == 4 else b"%x" % number
        if number >= 1 << bits or label != written:
            break
        numbers.append(number)
    return numbers


def _network(numbers: list[int], version: int, bits: int) -> IPNetwork:
    length = 32 if version == 4 else 128
    value = 0
    for number in numbers:
        value = value << bits | number
    value <<= length - bits * len(numbers)
    if version == 4:
        return ipaddress.IPv4Network((value, bits * len(numbers)))
    return ipaddress.IPv6Network((value, bits * len(numbers)))
