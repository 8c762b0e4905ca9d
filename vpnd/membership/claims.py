"""Who owns what only one may have: an address, a name.

Two authorities that do not know of each other's members may give out the same. Every node then decides alike: the
member enrolled first keeps it, at the same millisecond the smaller peer id; what else the other has stays the other's.
"""

from __future__ import annotations

import msgspec


class Conflict(msgspec.Struct, frozen=True):
    """`what` (an address or a name) is claimed by `losers` too, but is `owner`'s. All are peer ids."""

    what: str
    owner: str
    losers: tuple[str, ...]


_NOTHING: frozenset[str] = frozenset()


class Claims:
    """Claims of members, and who has what. Owner: the directory."""

    def __init__(self) -> None:
        self._by_what: dict[str, dict[str, int]] = {}  # what -> peer id -> enrolled
        self._by_peer: dict[str, tuple[int, frozenset[str]]] = {}
        self._contested: set[str] = set()

    def claim(self, peer_id: str, enrolled_ms: int, wanted: frozenset[str]) -> set[str]:
        """`peer_id` claims `wanted` and nothing else. Returns whom this may have given or taken something."""
        before_ms, before = self._by_peer.get(peer_id, (0, _NOTHING))
        if wanted:
            self._by_peer[peer_id] = (enrolled_ms, wanted)
        else:
            self._by_peer.pop(peer_id, None)
        touched: set[str] = set()
        for what in before - wanted:
            touched |= self._change(what, peer_id, None)
        for what in wanted if before_ms != enrolled_ms else wanted - before:
            if what not in self._by_what:  # nearly always: nobody else has it
                self._by_what[what] = {peer_id: enrolled_ms}
            else:
                touched |= self._change(what, peer_id, enrolled_ms)
        return touched

    def _change(self, what: str, peer_id: str, enrolled_ms: int | None) -> set[str]:
        """Enter a claim, or take it out. Returns who had it, and has it."""
        touched = {self.owner(what)}
        holders = self._by_what.setdefault(what, {})
        if enrolled_ms is None:
            del holders[peer_id]
        else:
            holders[peer_id] = enrolled_ms
        (self._contested.add if len(holders) > 1 else self._contested.discard)(what)
        touched.add(self.owner(what))
        if not holders:
            del self._by_what[what]
        return {one for one in touched if one is not None}

    def lost(self, what: str, peer_id: str) -> bool:
        """Whether somebody else has what `peer_id` claims."""
        return what in self._contested and self.owner(what) != peer_id

    def owner(self, what: str) -> str | None:
        """The peer id that has it."""
        holders = self._by_what.get(what)
        if not holders:
            return None
        if len(holders) == 1:
            return next(iter(holders))
        return min(holders, key=lambda peer_id: (holders[peer_id], peer_id))

    def conflicts(self) -> tuple[Conflict, ...]:
        """What more than one member claims, in order."""
        found = []
        for what in sorted(self._contested):
            owner = self.owner(what) or ""
            losers = tuple(sorted(peer_id for peer_id in self._by_what[what] if peer_id != owner))
            found.append(Conflict(what, owner, losers))
        return tuple(found)
