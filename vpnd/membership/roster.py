"""The members of a network as they are now, what changes, and who owns what only one may have: an address, a name.

A member is a valid membership, less what another has by a better claim. Two authorities that do not know of each
other's members may give out the same, and one that was stolen may give away what is another's. Every node decides
alike, by what whoever signs cannot choose: it belongs to the member that the most senior authority gave it to, as long
as the membership that authority signed holds, be it that a junior one has signed a newer for the same member. Among
members of one authority its own word counts: enrolled first, at the same millisecond the smaller peer id. What else the
loser has stays its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping

import msgspec

from vpnd.endpoint import IPNetwork
from vpnd.membership.statements import Membership, Presence

#: What a claim is worth, the smaller the more: the seniority of the authority that gave it, the enrolment.
Rank = tuple[tuple[int, int, bytes], int]


class Conflict(msgspec.Struct, frozen=True):
    """`what` (an address or a name) is claimed by `losers` too, but is `owner`'s. All are peer ids."""

    what: str
    owner: str
    losers: tuple[str, ...]


_NOTHING: dict[str, Rank] = {}


class Claims:
    """Claims of members, and who has what. Owner: the directory."""

    def __init__(self) -> None:
        self._by_what: dict[str, dict[str, Rank]] = {}  # what -> peer id -> rank
        self._by_peer: dict[str, Mapping[str, Rank]] = {}
        self._wanted: dict[str, frozenset[str]] = {}
        self._contested: set[str] = set()

    def claim(self, peer_id: str, given: Mapping[str, Rank], wanted: frozenset[str]) -> set[str]:
        """`peer_id` has a claim on what it was `given` and on nothing else, and uses of that what it `wanted`. Returns
        whom this may have given or taken something."""
        before = self._by_peer.get(peer_id, _NOTHING)
        if given:
            self._by_peer[peer_id], self._wanted[peer_id] = given, wanted
        else:
            self._by_peer.pop(peer_id, None)
            self._wanted.pop(peer_id, None)
        touched: set[str] = set()
        for what in before.keys() - given.keys():
            touched |= self._change(what, peer_id, None)
        for what, rank in given.items():
            if before.get(what) == rank:
                continue
            if what not in self._by_what:  # nearly always: nobody else has it
                self._by_what[what] = {peer_id: rank}
            else:
                touched |= self._change(what, peer_id, rank)
        return touched

    def of(self, peer_id: str) -> Mapping[str, Rank]:
        """What a peer has a claim on."""
        return self._by_peer.get(peer_id, _NOTHING)

    def _change(self, what: str, peer_id: str, rank: Rank | None) -> set[str]:
        """Enter a claim, or take it out. Returns who had it, and has it."""
        touched = {self.holder(what)}
        holders = self._by_what.setdefault(what, {})
        if rank is None:
            del holders[peer_id]
        else:
            holders[peer_id] = rank
        (self._contested.add if len(holders) > 1 else self._contested.discard)(what)
        touched.add(self.holder(what))
        if not holders:
            del self._by_what[what]
        return {one for one in touched if one is not None}

    def lost(self, what: str, peer_id: str) -> bool:
        """Whether somebody else has what `peer_id` claims."""
        return what in self._contested and self.holder(what) != peer_id

    def owner(self, what: str) -> str | None:
        """The peer id that has and uses it."""
        holder = self.holder(what)
        return holder if holder is not None and what in self._wanted[holder] else None

    def holder(self, what: str) -> str | None:
        """The peer id nobody else can have it beside, whether it uses it or not."""
        holders = self._by_what.get(what)
        if not holders:
            return None
        if len(holders) == 1:
            return next(iter(holders))
        return min(holders, key=lambda peer_id: (holders[peer_id], peer_id))

    def conflicts(self) -> tuple[Conflict, ...]:
        """What more than one member wants, in order."""
        found = []
        for what in sorted(self._contested):
            owner = self.holder(what) or ""
            others = (peer_id for peer_id in self._by_what[what] if peer_id != owner)
            losers = tuple(sorted(peer_id for peer_id in others if what in self._wanted[peer_id]))
            if losers:
                found.append(Conflict(what, owner, losers))
        return tuple(found)


class Valid(msgspec.Struct, frozen=True):
    """What makes a member: the membership that counts, and where it can be dialed, if it said so.

    `vouched`: the memberships by all authorities that have not expired, each with what a claim by it is worth.
    """

    membership: Membership
    presence: Presence | None
    vouched: tuple[tuple[Membership, Rank], ...]

    def given(self) -> dict[str, Rank]:
        """The name and addresses it was given by anybody, and by the most senior that did."""
        found: dict[str, Rank] = {}
        for body, rank in self.vouched:
            for what in (body.name, *body.addresses):
                found[what] = min(rank, found.get(what, rank))
        return found


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One member. `addresses`: what is really its own. `routes`: networks it announces, and may by its membership.

    `lost`: addresses and the name another member has by a better claim; an authority gives others at the next renewal.
    `name` is empty when it was lost. `multiaddrs`: where it can be dialed, by its own word, and `relays` which members
    can call it. `ranks`: of each of the routes, what the claim on it is worth.
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
    ranks: tuple[Rank, ...]
    relays: tuple[str, ...] = ()

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The networks it may send packets from, its own addresses first."""
        own = (f"{text}/{ipaddress.ip_address(text).max_prefixlen}" for text in self.addresses)
        return (*own, *self.routes)


class Changes(msgspec.Struct, frozen=True):
    """How the members changed.

    `removed` holds them as they last were; they expired, were removed, or are void with their authority. `moved`: what
    is another member's now, whose it was, whose it is.
    """

    added: tuple[Member, ...] = ()
    removed: tuple[Member, ...] = ()
    changed: tuple[Member, ...] = ()
    moved: tuple[tuple[str, str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


class Roster:
    """The members, by peer id; `claims`: who has what. Owner: the directory."""

    def __init__(self) -> None:
        self._valid: dict[str, Valid] = {}
        self._members: dict[str, Member] = {}
        self.claims = Claims()

    def update(self, news: Mapping[str, Valid | None]) -> Changes:
        """What is valid of some peer ids from now on; None: nothing.

        Others change with them when they own more or less.
        """
        touched = set(news)
        owners: dict[str, str | None] = {}
        for peer_id, valid in news.items():
            given = valid.given() if valid is not None else {}
            for what in (*self.claims.of(peer_id), *given):
                owners.setdefault(what, self.claims.owner(what))
        for peer_id, valid in news.items():
            if valid is None:
                self._valid.pop(peer_id, None)
                touched |= self.claims.claim(peer_id, {}, frozenset())
            else:
                self._valid[peer_id] = valid
                body = valid.membership
                wanted = frozenset((body.name, *body.addresses))
                touched |= self.claims.claim(peer_id, valid.given(), wanted)
        added, removed, changed = [], [], []
        for peer_id in sorted(touched):
            before = self._members.pop(peer_id, None)
            if peer_id not in self._valid:
                if before is not None:
                    removed.append(before)
                continue
            after = self._members[peer_id] = self._member(self._valid[peer_id])
            if before is None:
                added.append(after)
            elif before != after:
                changed.append(after)
        moved = [
            (what, old, new)
            for what, old in sorted(owners.items())
            if old and (new := self.claims.owner(what)) and new != old
        ]
        return Changes(tuple(added), tuple(removed), tuple(changed), tuple(moved))

    def get(self, peer_id: str) -> Member | None:
        """The member with that peer id."""
        return self._members.get(peer_id)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def _member(self, valid: Valid) -> Member:
        body, presence = valid.membership, valid.presence
        lost = tuple(what for what in (*body.addresses, body.name) if self.claims.lost(what, body.peer_id))
        addresses = tuple(text for text in body.addresses if text not in lost) if lost else body.addresses
        routes = permitted(presence.routes, body.routes) if presence is not None else ()
        return Member(
            peer_id=body.peer_id,
            name="" if body.name in lost else body.name,
            addresses=addresses,
            routes=routes,
            ranks=tuple(
                min(rank for one, rank in valid.vouched if permitted((text,), one.routes)) for text in routes
            ),
            groups=body.groups,
            lost=lost,
            multiaddrs=presence.addresses if presence is not None else (),
            relays=presence.relays if presence is not None else (),
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


def _within(network: IPNetwork, allowed: IPNetwork) -> bool:
    if network == allowed:
        return True
    if not allowed.prefixlen or network.version != allowed.version:
        return False
    return network.subnet_of(allowed)  # type: ignore[arg-type]
