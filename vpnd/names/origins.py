"""Where names of a network begin, as text, for those that do not answer them."""

from __future__ import annotations

from collections.abc import Iterable

from vpnd.endpoint import IPNetwork

#: Every network's zone is a child of this name, which the root does not have.
SUFFIX = "vpn"
#: By IP version: the root of reverse names, and the bits of an address a label stands for (see vpnd/names/reverse.py).
ROOTS = {4: ("in-addr.arpa", 8), 6: ("ip6.arpa", 4)}


def origin_of(network: str) -> str:
    """The zone of a network, without the last dot. `network` must be a host label (`members.is_label`)."""
    return f"{network}.{SUFFIX}"


def zone_names(prefixes: Iterable[IPNetwork]) -> list[str]:
    """The tops of the reverse zones, without the last dot; up to 128 for an IPv4 prefix, 8 for an IPv6 one."""
    found: dict[str, None] = {}
    for prefix in prefixes:
        root, bits = ROOTS[prefix.version]
        steps = -(-prefix.prefixlen // bits)
        for network in prefix.subnets(new_prefix=steps * bits):
            value = int(network.network_address) >> (network.max_prefixlen - steps * bits)
            digits = [value >> bits * step & (1 << bits) - 1 for step in range(steps)]
            labels = [f"{digit:x}" if prefix.version == 6 else str(digit) for digit in digits]
            found[".".join([*labels, root])] = None
    return list(found)
