"""Which networks behind members are routed into the tunnel, and who is believed when two announce the same.

what              is decided by
----------------  --------------------------------------------------------------------------------------------
may announce it   the member's signed membership (`Member.routes` has no other)
is wanted         network.accept_routes; a default route only of the member network.exit_node names
meets ours        parts of the VPN's own subnets are ignored (whose address is whose is not up to members), and
                  what this node itself announces it reaches without the tunnel
which of two      the more specific network, as everywhere in routing; of equal ones that of the member to which
                  the most senior authority permits it, then the older membership, then the smaller peer id: the
                  same on every node
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping

import msgspec

from vpnd.api.messages import RoutesKnown
from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Network as Settings
from vpnd.endpoint import IPNetwork
from vpnd.membership.roster import Member


class Announced(msgspec.Struct, frozen=True, kw_only=True):
    """What came of all announcements. `owners`: network -> peer id of the member it is routed to.

    `problems`: a line for the user each.
    """

    owners: Mapping[str, str]
    exit_peer: str = ""
    problems: tuple[str, ...] = ()

    def known(self) -> RoutesKnown:
        """The message to the supervisor."""
        return RoutesKnown(routes=tuple(self.owners), exit_peer=self.exit_peer)

    def prefixes(self, member: Member) -> tuple[str, ...]:
        """What a member may send from: its addresses, and the networks that are routed to it."""
        own = member.prefixes[: len(member.addresses)]
        return (*own, *(network for network, peer_id in self.owners.items() if peer_id == member.peer_id))


def announced(members: Iterable[Member], own: OwnAddresses, settings: Settings) -> Announced:
    """Settle what `members` (this node not among them) announce; `settings` say what of it this node wants."""
    members = list(members)
    exit_peer, problems = _exit(members, settings.exit_node)
    own_networks = [ipaddress.ip_network(text) for text in (*own.subnets, *own.advertised)]
    owners: dict[str, str] = {}
    ranked = sorted(
        (rank, member.peer_id, text)
        for member in members
        for text, rank in zip(member.routes, member.ranks, strict=True)
    )
    for _, peer_id, text in ranked:
        network = ipaddress.ip_network(text)
        wanted = peer_id == exit_peer if not network.prefixlen else settings.accept_routes
        if wanted and not _meets(network, own_networks):
            owners.setdefault(text, peer_id)
    return Announced(
        owners=dict(sorted(owners.items(), key=lambda item: _order(item[0]))),
        exit_peer=exit_peer,
        problems=problems,
    )


def _exit(members: list[Member], wanted: str) -> tuple[str, tuple[str, ...]]:
    """The peer id of the exit node, "" for none, and what the user has to know."""
    if not wanted:
        return "", ()
    for member in members:
        if wanted in (member.name, member.peer_id, *member.addresses):
            if any(not ipaddress.ip_network(text).prefixlen for text in member.routes):
                return member.peer_id, ()
            return "", (f"network.exit_node: {wanted} announces neither 0.0.0.0/0 nor ::/0",)
    return "", (f"network.exit_node: there is no member {wanted}",)


def _meets(network: IPNetwork, ours: Iterable[IPNetwork]) -> bool:
    """Whether a network is a part of ours. A broader one is fine: ours is more specific in every table."""
    return any(
        network.version == other.version and network.subnet_of(other)  # type: ignore[arg-type]
        for other in ours
        if other.prefixlen
    )


def _order(text: str) -> tuple[int, int, int]:
    network = ipaddress.ip_network(text)
    return network.version, int(network.network_address), network.prefixlen
