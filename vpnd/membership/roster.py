"""The members of a network as they are now, and what changes.

A member is a valid membership, less what another has by an older claim.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping

import msgspec

from vpnd.membership.claims import Claims, Conflict
from vpnd.membership.statements import Membership, Presence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: A valid membership, and where the member can be dialed, if it said so.
Valid = tuple[Membership, Presence | None]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One member. `addresses`: what is really its own. `routes`: networks it announces, and may by its membership.

    `lost`: addresses and the name another member has by an older claim; an authority gives others at the next renewal.
    `name` is empty when it was lost. `multiaddrs`: where it can be dialed, by its own word.
    """

    peer_id: str
    name: str
    addresses: tuple[str, ...]
    routes: tuple[str, ...]
    groups: tuple[str, ...]
    lost: tuple[str, ...]
    multiaddrs: tuple[str, ...]
    signer: bytes
    enrolled_ms: int
    issued_ms: int
    expires_ms: int

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The networks it may send packets from, its own addresses first."""
        own = (f"{text}/{ipaddress.ip_address(text).max_prefixlen}" for text in self.addresses)
        return (*own, *self.routes)


class Changes(msgspec.Struct, frozen=True):
    """How the members changed.

    `removed` holds them as they last were; they expired, were removed, or are void with their authority.
    """

    added: tuple[Member, ...] = ()
    removed: tuple[Member, ...] = ()
    changed: tuple[Member, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


class Roster:
    """The members, by peer id. Owner: the directory."""

    def __init__(self) -> None:
        self._valid: dict[str, Valid] = {}
        self._members: dict[str, Member] = {}
        self._claims = Claims()

    def update(self, news: Mapping[str, Valid | None]) -> Changes:
        """What is valid of some peer ids from now on; None: nothing.

        Others change with them when they own more or less.
        """
        touched = set(news)
        for peer_id, valid in news.items():
            if valid is None:
                self._valid.pop(peer_id, None)
                touched |= self._claims.claim(peer_id, 0, frozenset())
            else:
                self._valid[peer_id] = valid
                body = valid[0]
                touched |= self._claims.claim(
                    peer_id, body.enrolled_ms, frozenset((body.name, *body.addresses))
                )
        added, removed, changed = [], [], []
        for peer_id in sorted(touched):
            before = self._members.pop(peer_id, None)
            if peer_id not in self._valid:
                if before is not None:
                    removed.append(before)
                continue
            after = self._members[peer_id] = self._member(*self._valid[peer_id])
            if before is None:
                added.append(after)
            elif before != after:
                changed.append(after)
        return Changes(tuple(added), tuple(removed), tuple(changed))

    def get(self, peer_id: str) -> Member | None:
        """The member with that peer id."""
        return self._members.get(peer_id)

    def owner(self, what: str) -> str | None:
        """The peer id that has an address or name."""
        return self._claims.owner(what)

    def conflicts(self) -> tuple[Conflict, ...]:
        """What more than one member claims."""
        return self._claims.conflicts()

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def _member(self, body: Membership, presence: Presence | None) -> Member:
        lost = tuple(what for what in (*body.addresses, body.name) if self._claims.lost(what, body.peer_id))
        addresses = tuple(text for text in body.addresses if text not in lost) if lost else body.addresses
        return Member(
            peer_id=body.peer_id,
            name="" if body.name in lost else body.name,
            addresses=addresses,
            routes=permitted(presence.routes, body.routes) if presence is not None else (),
            groups=body.groups,
            lost=lost,
            multiaddrs=presence.addresses if presence is not None else (),
            signer=body.signer,
            enrolled_ms=body.enrolled_ms,
            issued_ms=body.issued_ms,
            expires_ms=body.expires_ms,
        )


def permitted(announced: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Of the networks somebody announces those that are, or lie within, one it may announce.

    What is allowed to be the way to everywhere (0.0.0.0/0, ::/0) is not thereby allowed to announce every network.
    """
    if not announced or not allowed:
        return ()
    wide = [ipaddress.ip_network(text) for text in allowed]
    return tuple(text for text in announced if any(_within(ipaddress.ip_network(text), one) for one in wide))


def _within(network: Network, allowed: Network) -> bool:
    if network == allowed:
        return True
    if not allowed.prefixlen or network.version != allowed.version:
        return False
    return network.subnet_of(allowed)  # type: ignore[arg-type]
