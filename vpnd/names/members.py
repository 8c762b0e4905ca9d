"""The members a zone answers for: label -> addresses, address -> label.

A table is a picture of one moment and never changes; when members come or go, a new one is made and handed to the
zone. Control makes one per change of membership, not per query.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Protocol

from vpnd.discovery.registry import Member
from vpnd.names.labels import assign

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Members(Protocol):
    """What a zone asks. All methods are cheap: they are called per query."""

    def addresses(self, label: str) -> Sequence[Address] | None:
        """Addresses behind a label in small letters; None when no member has it."""
        ...

    def label(self, address: Address) -> str | None:
        """The label of the member that owns an address; None when none does."""
        ...


class MemberTable:
    """`Members` of given names and addresses. An address named twice belongs to the name that sorts first."""

    def __init__(self, members: Iterable[tuple[str, Sequence[Address]]]) -> None:
        by_name = {name: tuple(addresses) for name, addresses in members}
        #: name of a member -> its label
        self.labels = assign(by_name)
        self._addresses = {self.labels[name]: addresses for name, addresses in by_name.items()}
        self._owners: dict[Address, str] = {}
        for name in sorted(by_name):
            for address in by_name[name]:
                self._owners.setdefault(address, self.labels[name])

    def addresses(self, label: str) -> Sequence[Address] | None:
        """See Members."""
        return self._addresses.get(label)

    def label(self, address: Address) -> str | None:
        """See Members."""
        return self._owners.get(address)

    def find(self, text: str, origin: str) -> Sequence[Address] | None:
        """What a user means: a member's name as it is, its label, or its full name in the zone `origin`."""
        if text in self.labels:
            return self._addresses[self.labels[text]]
        label = text.lower().rstrip(".")
        return self._addresses.get(label.removesuffix(f".{origin.lower().rstrip('.')}"))


def table_of(members: Iterable[Member]) -> MemberTable:
    """A table of the registry's members. Their addresses are the prefixes of one address; networks have no name.

    Of two members with one name, the peer id that sorts first keeps it; the other is found by its name, a dot
    and the end of its peer id, made a label.
    """
    rows: dict[str, list[Address]] = {}
    for member in sorted(members, key=lambda member: (member.name, member.peer_id)):
        name = member.name if member.name not in rows else f"{member.name}.{member.peer_id[-_ID_END:]}"
        rows[name] = [
            network.network_address
            for network in map(ipaddress.ip_network, member.prefixes)
            if network.prefixlen == network.max_prefixlen
        ]
    return MemberTable(rows.items())


#: Characters of a peer id that tell members of one name apart; its beginning is the same for all.
_ID_END = 12
