"""What a network is: a name, the key it rests on, and where its addresses come from.

The id of a network is a hash over all of this, so the description needs no signature and cannot be changed:
another subnet, name or root key is another network. Addresses of IPv6 are a unique local prefix (RFC 4193 section 3.1)
whose global id is taken from the network id instead of drawn (section 3.2 asks for one that is unlikely to be
another's, which a hash is).
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection
from typing import Annotated

import msgspec
from msgspec import Meta

from vpnd.endpoint import SHORTEST_SUBNET, IPNetwork, ip_of
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import NETWORK_ID_BYTES, Key, Label, is_label

VERSION = 1
MAX_BYTES = 256
#: RFC 4193 section 3.1: fd00::/8, then 40 bits of global id.
ULA_PREFIX = 0xFD
ULA_GLOBAL_ID_BYTES = 5
#: The /64 of the /48 that members are in; the others are free for what lies behind them.
ULA_SUBNET = 0
#: A subnet has room for a few members at least, and its addresses can be counted through.
LONGEST_SUBNET = 30

_DOMAIN = f"vpnd network {VERSION}\0".encode()


class Network(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """A network. `root`: public key of the first authority. `subnet`: where IPv4 addresses of members are from."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)] = VERSION
    name: Label
    root: Key
    subnet: Annotated[str, Meta(max_length=18)]

    @property
    def id(self) -> bytes:
        """16 bytes that stand for all fields."""
        return hashlib.sha256(_DOMAIN + msgspec.msgpack.encode(self)).digest()[:NETWORK_ID_BYTES]

    @property
    def ipv4(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.subnet)

    @property
    def ipv6(self) -> ipaddress.IPv6Network:
        """The unique local /48 of the network."""
        prefix = bytes([ULA_PREFIX]) + self.id[:ULA_GLOBAL_ID_BYTES]
        return ipaddress.IPv6Network((prefix + bytes(16 - len(prefix)), 8 * len(prefix)))

    @property
    def members_ipv6(self) -> ipaddress.IPv6Network:
        """The /64 in it whose addresses members have."""
        return ipaddress.IPv6Network((int(self.ipv6.network_address) + (ULA_SUBNET << 64), 64))

    def encode(self) -> bytes:
        """The description, for others and for the state directory; `parse_untrusted` reads it."""
        return msgspec.msgpack.encode(self)


def create(name: str, root: bytes, subnet: str) -> Network:
    """A network of these. Raises MembershipRefused for a name that is no label, or a subnet of another size."""
    if not is_label(name):
        raise MembershipRefused("malformed", f"{name!r} cannot be a network's name: a-z, 0-9 and - only")
    return parse_untrusted(Network(name=name, root=root, subnet=subnet).encode())


def parse_untrusted(data: bytes) -> Network:
    """The network described by `data`; whether it is the right one, its id says. Raises MembershipRefused only."""
    if len(data) > MAX_BYTES:
        raise MembershipRefused("too_long", f"a network's description has at most {MAX_BYTES} bytes")
    try:
        network = msgspec.msgpack.decode(data, type=Network)
        subnet = network.ipv4
        if str(subnet) != network.subnet:
            raise ValueError(f"{network.subnet} is not written as networks are")
        if (
            not SHORTEST_SUBNET <= subnet.prefixlen <= LONGEST_SUBNET
            or subnet.is_loopback
            or subnet.is_multicast
        ):
            raise ValueError(f"{subnet} cannot be a network's subnet")
    except (msgspec.MsgspecError, ValueError) as error:
        raise MembershipRefused("malformed", f"a network's description is malformed: {error}") from None
    return network


# --- which addresses a new member gets
#
# Chosen by its peer id, next to whatever is taken already. Two authorities that hand out at the same time rarely
# choose alike, because different peer ids start at different places; when they do, the directory says who keeps the
# address, and the other gets a new one at its next renewal. IPv6 addresses are in the network's unique local prefix
# (RFC 4193 section 3.1); their interface identifier is a hash, opaque and stable as RFC 7217 has it.

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
    address = ip_of(text)
    if address is None:
        raise MembershipRefused("address_outside", f"{text!r} is not an IP address")
    inside: IPNetwork = network.ipv4 if address.version == 4 else network.members_ipv6
    last = inside.broadcast_address if address.version == 4 else None
    if address not in inside or address in (inside.network_address, last):
        raise MembershipRefused("address_outside", f"{address} is no member's address in {inside}")
    if str(address) in taken:
        raise MembershipRefused("address_taken", f"{address} is taken by another member")
    return str(address)
