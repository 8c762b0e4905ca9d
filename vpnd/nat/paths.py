"""The ways by which a session may reach its peer, and which addresses may be tried."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from vpnd.config import multiaddrs
from vpnd.endpoint import IP, Endpoint, IPNetwork
from vpnd.endpoint import parse as parse_endpoint

DIRECT, PUNCHED, RELAYED = "direct", "punched", "relayed"
#: How good a way is, the best first; a better one takes the place of a worse one: within the local network, dialed,
#: punched, relayed.
NEAR, DIALED, THROUGH, AROUND = range(4)

#: Addresses that mean another machine in every network: RFC 1918, RFC 6598 (carrier-grade NAT), RFC 4193.
_OWN_USE = tuple(
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)
#: IPv6 endpoints of a peer's own word that are tried in one meeting: nobody has seen it there.
MAX_UNSEEN = 2


class Path(msgspec.Struct, frozen=True, kw_only=True):
    """How a session reaches its peer. `address`: the other end of its TCP connection, which where `kind` is relayed
    is the relay's; `relay`: the relay's peer id."""

    kind: str = DIRECT
    address: str = ""
    relay: str = ""

    @property
    def rank(self) -> int:
        """NEAR, DIALED, THROUGH or AROUND."""
        if self.kind != DIRECT:
            return AROUND if self.kind == RELAYED else THROUGH
        return NEAR if self.address and is_private(parse_endpoint(self.address).ip) else DIALED


def kind_of(told: str) -> str:
    """Of a path as status tells it (`PeerReport.paths`)."""
    kind = told.partition(" ")[0]
    return PUNCHED if told.endswith(f" ({PUNCHED})") else kind


class RelayAt(NamedTuple):
    """A member that relays, and the multiaddr to dial it at."""

    address: str
    peer_id: str


def is_private(ip: IP) -> bool:
    """Whether the address means something within one network only."""
    return any(ip in network for network in _OWN_USE)


def is_local(address: str) -> bool:
    """Whether a multiaddr has such an address; a name has not."""
    try:
        return is_private(ipaddress.ip_address(multiaddrs.parse(address).host))
    except ValueError:
        return False


def rank_at(address: str) -> int:
    """Of a session that is dialed at a multiaddr."""
    return NEAR if is_local(address) else DIALED


def to_punch(
    you: Endpoint,
    peer: Endpoint,
    candidates: Iterable[Endpoint],
    local: Sequence[IPNetwork],
    without: Sequence[IPNetwork],
) -> list[Endpoint]:
    """Where to look for a peer after a meeting: where the relay saw it, and those of its `candidates` that could be
    its own. So a member cannot have others dialed.

    `you`: where the relay saw this node. `local`: the networks of this machine's interfaces. `without`: networks that
    lead into the VPN.
    """
    found = {peer: None} if _means_one_machine(peer, without) else {}
    unseen = 0
    for candidate in candidates:
        if not _means_one_machine(candidate, without):
            continue
        if is_private(candidate.ip):
            near = you.ip == peer.ip or any(candidate.ip in network for network in local)
        elif candidate.ip.version == 6 and candidate.ip != peer.ip:
            unseen += 1
            near = unseen <= MAX_UNSEEN
        else:
            near = candidate.ip == peer.ip
        if near:
            found[candidate] = None
    return list(found)


def _means_one_machine(endpoint: Endpoint, without: Sequence[IPNetwork]) -> bool:
    ip = endpoint.ip
    nowhere = ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified
    return bool(endpoint.port) and not nowhere and not any(ip in network for network in without)
