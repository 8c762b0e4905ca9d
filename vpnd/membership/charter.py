"""Who is an authority: the keys that the root key vouches for, directly or over others.

Grants and revocations of any number of authorities are brought to one table, the same on every node:

    seniority   the root first, then by distance from the root, then by the time of the grant, then by key
    revoking    only a senior may revoke (or an authority itself); the root cannot be revoked
    void        what an authority signed at or after the `since` of its revocation, its grants and revocations too

Because only seniors decide about juniors, the table can be made from the top down, and two authorities cannot
revoke each other. What an authority signed before `since` stays; a thief of its key can date back, so `since` 0 is
what answers a theft, and the revoking authority signs again what was good (`Authority.revoke_stolen`).

What a charter holds is bounded by what whoever has an authority's key cannot choose:

    of one authority about one key    at most `MAX_KEPT` grants and as many revocations
    named by one authority            `MAX_NAMED` keys, those it named first
    below one that the root named     `MAX_NAMED` authorities, the most senior
    revocations                       are not counted and never refused for want of room
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from operator import attrgetter

import msgspec

from vpnd.membership.statements import MAX_TIME_MS, Grant, Revoke, Statement

#: Keys one authority may have named, those revoked since among them, and authorities that rest on one of the root's.
MAX_NAMED = 128
#: In one slot: the newest of effect, the newest of all, the one issued first. The last two may have effect again.
MAX_KEPT = 3
#: Grants and revocations of no effect are kept, for they may have effect again, up to so many in all.
MAX_HELD = 4096


class Standing(msgspec.Struct, frozen=True):
    """One authority.

    `peer_id`: the node that holds the key, empty until known. `until_ms`: what it signs from then on is void.
    """

    key: bytes
    peer_id: str
    distance: int
    granted_ms: int
    until_ms: int = MAX_TIME_MS

    @property
    def revoked(self) -> bool:
        """Whether it was an authority once and is none now."""
        return self.until_ms < MAX_TIME_MS

    @property
    def seniority(self) -> tuple[int, int, bytes]:
        """Smaller is more senior."""
        return (self.distance, self.granted_ms, self.key)


Table = dict[bytes, Standing]


def settle(root: bytes, statements: Iterable[Statement]) -> Table:
    """The table: key -> standing, of all keys that are or were authorities, the most senior first.

    `statements`: grants and revocations in any order; those without effect are left aside.
    """
    grants: dict[bytes, list[tuple[Statement, Grant]]] = {}  # by signer
    revokes: dict[bytes, list[Revoke]] = {}  # by subject
    for statement in statements:
        if isinstance(statement.body, Grant):
            grants.setdefault(statement.body.signer, []).append((statement, statement.body))
        elif isinstance(statement.body, Revoke):
            revokes.setdefault(statement.body.key, []).append(statement.body)
    table: Table = {}
    below: dict[bytes, int] = {}  # key that the root named -> authorities that rest on it
    # (seniority, newest first, node, named by the root): of several grants of one key at one time the newest says
    # who holds it
    waiting: list[tuple[tuple[int, int, bytes], int, str, bytes]] = [((0, 0, root), 0, "", b"")]
    while waiting:
        (distance, granted_ms, key), _, peer_id, branch = heapq.heappop(waiting)
        if key in table:
            continue
        if distance == 1:
            branch = key
        elif distance:
            if below.get(branch, 0) >= MAX_NAMED:
                continue
            below[branch] = below.get(branch, 0) + 1
        until_ms = MAX_TIME_MS
        for revoke in revokes.get(key, ()) if key != root else ():
            senior = table.get(revoke.signer)
            if revoke.signer == key or (senior is not None and revoke.issued_ms < senior.until_ms):
                until_ms = min(until_ms, revoke.since_ms)
        newest: dict[bytes, tuple[Statement, Grant]] = {}  # by the key granted
        for statement, grant in grants.get(key, ()):
            held = newest.get(grant.key)
            if grant.issued_ms < until_ms and (held is None or held[0].rank < statement.rank):
                newest[grant.key] = (statement, grant)
        if key == root and root in newest:
            peer_id = newest[root][1].peer_id
        table[key] = Standing(key, peer_id, distance, granted_ms, until_ms)
        for _, grant in newest.values():
            seniority = (distance + 1, grant.granted_ms, grant.key)
            heapq.heappush(waiting, (seniority, -grant.issued_ms, grant.peer_id, branch))
    return table


def refusal(table: Table, statement: Statement) -> str:
    """Why what an authority signed has no effect; empty when it has."""
    body = statement.body
    standing = table.get(statement.signer)
    if standing is None:
        return "unknown_authority"
    if isinstance(body, Revoke):
        subject = table.get(body.key)
        if subject is None:
            return "unknown_authority"
        if subject.distance == 0 or (body.signer != body.key and standing.seniority >= subject.seniority):
            return "not_permitted"
        if body.signer == body.key:
            return ""
    return "revoked_authority" if statement.issued_ms >= standing.until_ms else ""


class Charter:
    """The grants and revocations of one network, and the table they come to. Owner: the directory.

    `effective`: by slot, the newest of those that have effect; it is these that are told to others.
    """

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._slots: dict[bytes, list[Statement]] = {}
        self._held = 0
        self.table = settle(root, ())
        self.effective: dict[bytes, Statement] = {}

    def __iter__(self) -> Iterator[Statement]:
        for slot in self._slots.values():
            yield from slot

    def with_(self, statement: Statement) -> Table:
        """The table as it would be with one statement more."""
        return settle(self._root, [*self, statement])

    def vouching(self, key: bytes) -> list[Statement]:
        """The grants that make `key` an authority, from the root's on."""
        grants = [(one, one.body) for one in self.effective.values() if isinstance(one.body, Grant)]
        found: list[Statement] = []
        standing = self.table.get(key)
        while standing is not None and standing.distance:
            senior = None
            for statement, grant in grants:
                signer = self.table.get(grant.signer)
                if (grant.key, grant.granted_ms) != (standing.key, standing.granted_ms) or signer is None:
                    continue
                if signer.distance == standing.distance - 1:
                    found.append(statement)
                    senior = signer
                    break
            standing = senior
        return found[::-1]

    def take(self, statement: Statement) -> tuple[str, list[Statement]]:
        """Take in a grant or revocation. Returns why it was not taken, if it was not, and what was given up for it."""
        shown = self.effective.get(statement.slot)
        if shown is not None and shown.rank >= statement.rank:
            return "rolled_back", []
        self._put(statement)
        dropped = self._drop_all(self._crowded_out(statement))
        if statement in dropped:
            return "directory_full", [one for one in dropped if one is not statement]
        self._settle()
        if isinstance(statement.body, Grant):
            beyond = self._beyond()
            dropped += self._drop_all(beyond)
            for slot in beyond:
                del self.effective[slot]
        dropped += self._thin(statement.slot)
        if self._held > MAX_HELD:
            unreached = [slot for slot, (one, *_) in self._slots.items() if one.signer not in self.table]
            dropped += self._drop_all(unreached)
        if statement in dropped:
            dropped.remove(statement)
            return "directory_full", dropped
        return "", dropped

    def restore(self, statements: Iterable[Statement]) -> None:
        """Take in what was held before a restart, with effect or without, all at once."""
        for statement in statements:
            self._put(statement)
        self._settle()

    def _put(self, statement: Statement) -> None:
        self._slots.setdefault(statement.slot, []).append(statement)
        self._held += 1

    def _settle(self) -> None:
        self.table = settle(self._root, self)
        self.effective = {}
        for slot, held in self._slots.items():
            valid = [one for one in held if not refusal(self.table, one)]
            if valid:
                self.effective[slot] = max(valid, key=_rank)

    def _crowded_out(self, statement: Statement) -> list[bytes]:
        """Slots of the keys its signer named beyond the first `MAX_NAMED`."""
        if not isinstance(statement.body, Grant):
            return []
        named = [
            (min(map(_age, held)), slot)
            for slot, held in self._slots.items()
            if held[0].kind is statement.kind and held[0].signer == statement.signer
        ]
        return [slot for _, slot in sorted(named)[MAX_NAMED:]]

    def _beyond(self) -> list[bytes]:
        """Slots of grants that would have effect, but for the number of authorities there may be."""
        return [
            slot
            for slot, one in self.effective.items()
            if isinstance(one.body, Grant) and one.body.key not in self.table
        ]

    def _thin(self, slot: bytes) -> list[Statement]:
        held = self._slots.get(slot, [])
        if len(held) <= MAX_KEPT:
            return []
        shown = self.effective.get(slot)
        kept = {id(one) for one in (shown, max(held, key=_rank), min(held, key=_age))}
        gone = [one for one in held if id(one) not in kept]
        self._slots[slot] = [one for one in held if id(one) in kept]
        self._held -= len(gone)
        return gone

    def _drop_all(self, slots: Iterable[bytes]) -> list[Statement]:
        gone = []
        for slot in slots:
            gone += self._slots.pop(slot)
        self._held -= len(gone)
        return gone


_rank, _age = attrgetter("rank"), attrgetter("issued_ms", "digest")
