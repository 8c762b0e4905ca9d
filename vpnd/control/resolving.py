"""What this node knows of a member by itself, for look-ups (`vpnd.discovery.lookup`)."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from vpnd.control.state import MILLISECONDS, OwnNetwork
from vpnd.discovery.lookup import Known
from vpnd.discovery.registry import CompositeRegistry, Member
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Presence


class LocalDirectory:
    """Configured peers and the signed directory. Owner: control's loop."""

    def __init__(
        self, registry: CompositeRegistry, own: OwnNetwork | None, now_ms: Callable[[], int]
    ) -> None:
        self._registry = registry
        self._own = own
        self._now_ms = now_ms

    def find(self, what: str) -> Known | None:
        """See vpnd.discovery.lookup.Directory; this node itself is found too."""
        if self._own is not None:
            try:
                peer_id = self._own.whom(what)
            except MembershipRefused:
                peer_id = ""
            if peer_id and (known := self._in_network(self._own, peer_id)) is not None:
                return known
        address = _address(what)
        for member in self._registry.claims().values():
            if what in (member.name, member.peer_id) or (address and address in member.virtual_ips):
                return _known(member)
        return None

    def _in_network(self, own: OwnNetwork, peer_id: str) -> Known | None:
        now_ms = self._now_ms()
        member = own.directory.find(peer_id, now_ms)
        if member is None:
            return None
        statement = own.directory.presence(peer_id)
        presence = statement.body if statement is not None else None
        said_ms = presence.sequence_ms if isinstance(presence, Presence) else member.issued_ms
        return Known(
            peer_id=peer_id,
            name=member.name,
            virtual_ips=member.addresses,
            addresses=member.multiaddrs,
            age_s=max(0.0, (now_ms - said_ms) / MILLISECONDS),
        )


def _known(member: Member) -> Known:
    return Known(
        peer_id=member.peer_id,
        name=member.name,
        virtual_ips=member.virtual_ips,
        addresses=member.addresses,
    )


def _address(text: str) -> str:
    """An IP address in its usual spelling; empty for what is none."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return ""
