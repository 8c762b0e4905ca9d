"""Who owns what only one may have: an address, a name.

Two authorities that do not know of each other's members may give out the same, and one that was stolen may give away
what is another's. Every node decides alike, by what whoever signs cannot choose: it belongs to the member that the
most senior authority gave it to, as long as the membership that authority signed holds, be it that a junior one has
signed a newer for the same member. Only among members of one authority does its own word count: enrolled first, at the
same millisecond the smaller peer id. What else the loser has stays its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

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
