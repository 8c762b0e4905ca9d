"""Which addresses a new member gets: chosen by its peer id, next to whatever is taken already.

Two authorities that hand out at the same time rarely choose alike, because different peer ids start at different
places; when they do, the directory says who keeps the address, and the other gets a new one at its next renewal.

IPv6 addresses are in the network's unique local prefix (RFC 4193 section 3.1); their interface identifier is a hash,
opaque and stable as RFC 7217 has it.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection

from vpnd.endpoint import IPNetwork
from vpnd.membership.network import Network
from vpnd.membership.refusal import MembershipRefused

_IPV4 = b"vpnd ipv4 1\0"
_IPV6 = b"vpnd ipv6 1\0"


def ipv4(network: Network, peer_id: str, taken: Collection[str]) -> str:
    """An address of the subnet that is not in `taken`, and neither its first nor its last.

    Raises MembershipRefused with the reason subnet_full.
    """
    subnet = network.ipv4
    hosts = subnet.num_addresses - 2
    start = int.from_bytes(hashlib.sha256(_IPV4 + peer_id.encode()).digest()) % hosts
    # one more place than can be taken, or all there are
    for step in range(min(len(taken) + 1, hosts)):
        address = str(subnet.network_address + 1 + (start + step) % hosts)
        if address not in taken:
            return address
    raise MembershipRefused("subnet_full", f"every address of {subnet} is taken")


def ipv6(network: Network, peer_id: str, taken: Collection[str]) -> str:
    """An address of the network's members that is not in `taken`; never the first, the routers' anycast (RFC 4291)."""
    prefix = int(network.members_ipv6.network_address)
    for attempt in range(len(taken) + 1):
        digest = hashlib.sha256(_IPV6 + attempt.to_bytes(4) + peer_id.encode()).digest()
        address = str(ipaddress.IPv6Address(prefix + max(1, int.from_bytes(digest[:8]))))
        if address not in taken:
            return address
    raise MembershipRefused("subnet_full")


def check_wish(network: Network, text: str, taken: Collection[str]) -> str:
    """An address somebody asks for, in its usual spelling. Raises MembershipRefused: address_outside, address_taken."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise MembershipRefused("address_outside", f"{text!r} is not an IP address") from None
    inside: IPNetwork = network.ipv4 if address.version == 4 else network.members_ipv6
    ends = (
        (inside.network_address, inside.broadcast_address)
        if address.version == 4
        else (inside.network_address,)
    )
    if address not in inside or address in ends:
        raise MembershipRefused("address_outside", f"{address} is no member's address in {inside}")
    if str(address) in taken:
        raise MembershipRefused("address_taken", f"{address} is taken by another member")
    return str(address)
