"""Who is an authority: the keys that the root key vouches for, directly or over others.

Grants and revocations of any number of authorities are brought to one table, the same on every node:

    seniority   the root first, then by distance from the root, then by the time of the grant, then by key
    revoking    only a senior may revoke (or an authority itself); the root cannot be revoked
    void        what an authority signed at or after the `since` of its revocation, its grants and revocations too

Because only seniors decide about juniors, the table can be made from the top down, and two authorities cannot
revoke each other. What an authority signed before `since` stays; a thief of its key can date back, so `since` 0 is
what answers a theft, and the revoking authority signs again what was good (`Authority.revoke`).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import msgspec

from vpnd.membership.statements import MAX_TIME_MS, Grant, Revoke, Statement

#: Grants and revocations a directory holds at most.
MAX_CHARTER = 256


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


def settle(root: bytes, charter: Iterable[Statement]) -> dict[bytes, Standing]:
    """The table: key -> standing, of all keys that are or were authorities, the most senior first.

    `charter`: grants and revocations in any order; those without effect are left aside.
    """
    grants: dict[bytes, list[tuple[Statement, Grant]]] = {}  # by signer
    revokes: dict[bytes, list[Revoke]] = {}  # by subject
    for statement in charter:
        if isinstance(statement.body, Grant):
            grants.setdefault(statement.body.signer, []).append((statement, statement.body))
        elif isinstance(statement.body, Revoke):
            revokes.setdefault(statement.body.key, []).append(statement.body)
    table: dict[bytes, Standing] = {}
    # (seniority, newest first, node): of several grants of one key at one time the newest says who holds it
    waiting: list[tuple[tuple[int, int, bytes], int, str]] = [((0, 0, root), 0, "")]
    while waiting:
        (distance, granted_ms, key), _, peer_id = heapq.heappop(waiting)
        if key in table:
            continue
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
            heapq.heappush(waiting, (seniority, -grant.issued_ms, grant.peer_id))
    return table


def refusal(table: dict[bytes, Standing], statement: Statement) -> str:
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
