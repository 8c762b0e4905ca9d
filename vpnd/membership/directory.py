"""The directory: all statements a node knows of its network, and the members they make.

    bytes ── parse ──▶ statement ── admit ──▶ charter (who is an authority) ─┐
                          │ refused, why      dossiers (one per peer id) ────┴─▶ members, owners of addresses
                                                        └────────────────────▶ index (what is told to others)

Directories that were given the same statements are equal, whatever the order and however often, as long as each
statement came after those it rests on (a grant before what the granted key signs, a membership before its member's
presence); `merge` orders what comes at once, and what came too early is refused and taken when it is offered again.
What is void because its authority was revoked, or its subject removed, is set aside and comes back should the
revocation or removal turn out to be void itself; of these it keeps at most as many as it may have members.

Expired memberships are neither valid nor told to others, but known for a while longer: the member may still renew,
and its addresses are not given away; those of authorities are known for ever, for it is they who are asked. Removals
are kept for ever, or a removed member could come back by an authority that has not heard of them.

What is held and seems to be from the future, after a start or when the clock was set, is *early*: it has no effect
until its time comes, but is not forgotten, for it may be this machine's clock that is wrong (`judge_anew`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from vpnd.membership import charter
from vpnd.membership.charter import Charter, Standing, Table
from vpnd.membership.dossier import Dossier
from vpnd.membership.index import Index
from vpnd.membership.network import Network
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.roster import Changes, Conflict, Member, Roster, Valid
from vpnd.membership.statements import (
    Grant,
    Kind,
    Membership,
    Presence,
    Removal,
    Revoke,
    Statement,
    digest_of,
    parse_untrusted,
)


class Refused(msgspec.Struct, frozen=True):
    """A statement that was not taken. `slot` is empty when it could not even be read."""

    reason: str
    digest: bytes
    slot: bytes = b""


class Merged(msgspec.Struct, frozen=True):
    """What a merge did. Statements known before are neither accepted nor refused."""

    accepted: tuple[Statement, ...]
    refused: tuple[Refused, ...]
    changes: Changes


#: Void, but not by their own fault or age: set aside.
VOID = frozenset({"revoked_authority", "unknown_authority", "removed"})
Parse = Callable[[bytes], Statement]


class Directory:
    """The directory of one node. Times are milliseconds since 1970 and an argument everywhere.

    `skew_ms`: how far clocks may differ. `forget_ms`: how long expired memberships are remembered. `max_members`: peer
    ids it holds at most. `parse` reads a statement and verifies its signature. Owner: control.
    """

    def __init__(
        self,
        network: Network,
        *,
        skew_ms: int,
        forget_ms: int,
        max_members: int,
        parse: Parse = parse_untrusted,
    ) -> None:
        self.network = network
        self.index = Index()
        self._id = network.id
        self._skew_ms = skew_ms
        self._forget_ms = forget_ms
        self._max_members = max_members
        self._parse = parse
        self._digests: set[bytes] = set()
        self._aside: dict[bytes, Statement] = {}  # by digest
        self._early: dict[bytes, Statement] = {}  # by digest
        self._charter = Charter(network.root)
        self._dossiers: dict[str, Dossier] = {}
        self._roster = Roster()
        self._due: list[tuple[int, str]] = []  # (when something of a peer expires, peer id)

    # reading

    def find(self, peer_id: str, now_ms: int) -> Member | None:
        """The member with that peer id; None for everybody else, the expired and removed too."""
        member = self._roster.get(peer_id)
        return member if member is not None and now_ms <= member.expires_ms + self._skew_ms else None

    def members(self, now_ms: int) -> tuple[Member, ...]:
        """All members, by name and peer id."""
        valid = (member for member in self._roster if now_ms <= member.expires_ms + self._skew_ms)
        return tuple(sorted(valid, key=lambda member: (member.name, member.peer_id)))

    def owner(self, what: str) -> str | None:
        """The peer id of the member that has a virtual address, written as usual, or a name, which is never one."""
        return self._roster.claims.owner(what)

    def holder(self, what: str) -> str | None:
        """The peer id beside which nobody can have an address or name, whether it uses it or not."""
        return self._roster.claims.holder(what)

    def conflicts(self) -> tuple[Conflict, ...]:
        """Addresses and names that more than one member claims."""
        return self._roster.claims.conflicts()

    def newest(self, peer_id: str) -> Membership | None:
        """The membership of a peer, expired (and not forgotten) ones too; None for the removed."""
        held = self.membership(peer_id)
        return held.body if held is not None and isinstance(held.body, Membership) else None

    def membership(self, peer_id: str) -> Statement | None:
        """The statement of `newest`."""
        dossier = self._dossiers.get(peer_id)
        return dossier.newest() if dossier is not None else None

    def vouched(self, peer_id: str, table: Table, now_ms: int) -> Membership | None:
        """The newest membership of a peer that is good by another table of authorities (`charter_with`)."""
        dossier = self._dossiers.get(peer_id)
        good = [
            held
            for held in (dossier.memberships() if dossier is not None else ())
            if not charter.refusal(table, held)
            and isinstance(held.body, Membership)
            and now_ms <= held.body.expires_ms + self._skew_ms
        ]
        newest = max(good, key=lambda held: held.rank, default=None)
        return newest.body if newest is not None and isinstance(newest.body, Membership) else None

    def void_membership(self, peer_id: str) -> Membership | None:
        """The last membership of a peer that has none any more, because it or its authority was put out."""
        bodies = (held.body for held in self._aside.values())
        void = (body for body in bodies if isinstance(body, Membership) and body.peer_id == peer_id)
        return max(void, key=lambda body: (body.enrolled_ms, body.issued_ms), default=None)

    def departed(self, now_ms: int) -> list[tuple[Membership, Removal | None]]:
        """The last memberships of those who are no members any more, with the removal; without one it has expired."""
        last: dict[str, Membership] = {}
        for body in (one.body for one in (*self._aside.values(), *self._of_peers())):
            if isinstance(body, Membership) and self.find(body.peer_id, now_ms) is None:
                held = last.get(body.peer_id)
                if held is None or held.issued_ms < body.issued_ms:
                    last[body.peer_id] = body
        return [
            (body, self.removal(peer_id) if self.newest(peer_id) is None else None)
            for peer_id, body in last.items()
        ]

    def last_named(self, name: str) -> str | None:
        """The peer id of who had a name last and is no member any more."""
        held = (one.body for one in self._aside.values())
        void = [one for one in held if isinstance(one, Membership) and one.name == name]
        return max(void, key=lambda one: one.issued_ms).peer_id if void else None

    def removal(self, peer_id: str) -> Removal | None:
        """The latest removal of a peer; it may have been let in again since (`find`)."""
        dossier = self._dossiers.get(peer_id)
        held = dossier.removal() if dossier else None
        return held.body if held is not None and isinstance(held.body, Removal) else None

    def presence(self, peer_id: str) -> Statement | None:
        """Where a peer says it is, and what it announces."""
        dossier = self._dossiers.get(peer_id)
        return dossier.presence if dossier is not None else None

    def last_seen(self, peer_id: str) -> tuple[str, ...]:
        """Where a peer was last, to ask it something: by what has no effect, too."""
        held = self.presence(peer_id)
        bodies = [one.body for one in (*([held] if held else []), *self._early.values())]
        said = [one for one in bodies if isinstance(one, Presence) and one.peer_id == peer_id]
        return tuple(dict.fromkeys(text for one in said for text in one.addresses))

    def removal_proof(self, peer_id: str) -> list[bytes]:
        """What shows anybody that a peer was removed, and is no authority any more, behind the grants of who says so;
        empty when it was not."""
        dossier = self._dossiers.get(peer_id)
        held = dossier.removal() if dossier is not None else None
        if held is None:
            return []
        keys = {standing.key for standing in self.authorities() if standing.peer_id == peer_id}
        charter = self._charter.effective.values()
        proof = [held, *(one for one in charter if isinstance(one.body, Revoke) and one.body.key in keys)]
        grants = (grant for one in proof for grant in self.vouching(one.signer))
        return list(dict.fromkeys(one.wire for one in (*grants, *reversed(proof))))

    def taken(self) -> set[str]:
        """Every address and name somebody has or may have again: not to be given to others."""
        return {
            what
            for dossier in self._dossiers.values()
            for held in dossier.memberships()
            if isinstance(held.body, Membership)
            for what in (held.body.name, *held.body.addresses)
        }

    def authorities(self) -> tuple[Standing, ...]:
        """All that are or were authorities, the most senior first."""
        return tuple(self._charter.table.values())

    def authority(self, key: bytes) -> Standing | None:
        return self._charter.table.get(key)

    def charter_with(self, statement: Statement) -> Table:
        """Who would be an authority with one grant or revocation more."""
        return self._charter.with_(statement)

    def statements(self) -> list[bytes]:
        """Everything to be kept over a restart, for `restore`."""
        held = [*self._charter, *self._of_peers()]
        return [one.wire for one in _in_order([*held, *self._aside.values(), *self._early.values()])]

    def vouching(self, key: bytes) -> list[Statement]:
        """The grants that make a key an authority, from the root's on."""
        return self._charter.vouching(key)

    def charter(self) -> list[Statement]:
        """The grants and revocations that have effect."""
        return _in_order(self._charter.effective.values())

    def early(self) -> tuple[Statement, ...]:
        """What is held and was signed in the future, by this machine's clock."""
        return tuple(self._early.values())

    def give_up(self, early: Iterable[Statement]) -> None:
        """Forget some of `early`: they were signed by a clock that was ahead, and are signed again."""
        for statement in early:
            self._early.pop(statement.digest, None)

    def knows(self, digest: bytes) -> bool:
        """Whether that very statement is held."""
        return digest in self._digests

    # writing

    def merge(self, wires: Iterable[bytes], now_ms: int) -> Merged:
        """Take in statements of anybody; nothing is raised. Bad ones are refused and change nothing."""
        return self._merge(wires, now_ms, self._parse, restoring=False)

    def restore(self, wires: Iterable[bytes], now_ms: int, parse: Parse | None = None) -> Merged:
        """Take in what `statements` gave before a restart: also the expired and the set aside. `parse`: see above."""
        return self._merge(wires, now_ms, parse or self._parse, restoring=True)

    def judge_anew(self, now_ms: int) -> Changes:
        """The clock was set: judge again, by that time, everything that is held."""
        held = [*self._charter, *self._of_peers()]
        everything = [*held, *self._aside.values(), *self._early.values()]
        peer_ids = set(self._dossiers)
        self.index = Index()
        self._charter = Charter(self.network.root)
        self._digests, self._aside, self._early, self._dossiers, self._due = set(), {}, {}, {}, []
        _, dirty = self._take_in(everything, {}, now_ms, restoring=True)
        return self._refresh(dirty | peer_ids, now_ms)

    def advance(self, now_ms: int) -> Changes:
        """Let time pass: expired members go, the expired for long are forgotten, what was early may not be any more."""
        if self._early and self._early_until_ms() <= now_ms:
            return self.judge_anew(now_ms)
        due = set()
        while self._due and self._due[0][0] < now_ms:
            due.add(heapq.heappop(self._due)[1])
        return self._refresh(due, now_ms)

    def next_expiry_ms(self) -> int | None:
        """When `advance` has something to do: the first millisecond in which something is no longer valid."""
        due_ms = [self._due[0][0] + 1] if self._due else []
        return min([*due_ms, self._early_until_ms()] if self._early else due_ms, default=None)

    # inside

    def _of_peers(self) -> Iterator[Statement]:
        return (statement for dossier in self._dossiers.values() for statement in dossier)

    def _merge(self, wires: Iterable[bytes], now_ms: int, parse: Parse, *, restoring: bool) -> Merged:
        fresh: dict[bytes, Statement] = {}
        refused: dict[bytes, Refused] = {}
        for wire in wires:
            digest = digest_of(wire)
            if digest in self._digests or digest in fresh:
                continue
            try:
                fresh[digest] = parse(wire)
            except MembershipRefused as refusal:
                refused[digest] = Refused(refusal.reason, digest)
        if not fresh:
            return Merged((), tuple(refused.values()), Changes())
        accepted, dirty = self._take_in(fresh.values(), refused, now_ms, restoring=restoring)
        return Merged(tuple(accepted), tuple(refused.values()), self._refresh(dirty, now_ms))

    def _take_in(
        self, statements: Iterable[Statement], refused: dict[bytes, Refused], now_ms: int, *, restoring: bool
    ) -> tuple[list[Statement], set[str]]:
        """What was taken, and the peer ids that are to be looked at for it."""
        dirty: set[str] = set()
        accepted: list[Statement] = []
        if restoring:
            self._early |= {one.digest: one for one in statements if self._is_early(one, now_ms)}
            statements = [one for one in statements if one.digest not in self._early]

        def take(statement: Statement) -> bool:
            reason = self._admit(statement, now_ms, dirty, restoring)
            if reason:
                refused[statement.digest] = Refused(reason, statement.digest, statement.slot)
                return False
            refused.pop(statement.digest, None)
            self._digests.add(statement.digest)
            if self._early and not restoring:  # its signer's clock was ahead when it said another
                self.give_up([one for one in self.early() if one.slot == statement.slot])
            accepted.append(statement)
            return True

        ordered = _in_order(statements)
        grants = [statement for statement in ordered if statement.kind in _CHARTER]
        if restoring:
            accepted += self._restore_charter(grants, refused, dirty)
            grants = []
        while grants:  # the grant that one of them rests on may stand behind it
            left = [statement for statement in grants if not take(statement)]
            grants = left if len(left) < len(grants) else []
        for statement in ordered:
            if statement.kind not in _CHARTER:
                take(statement)
        if len(self._aside) > self._max_members:
            self._forget_aside()
        return accepted, dirty

    def _forget_aside(self) -> None:
        """Of what is set aside keep the half of max_members that authorities signed that are the most senior, and of
        one authority the newest: who can remove and let in without end pushes out its own."""
        table, aside = self._charter.table, self._aside

        def worth(statement: Statement) -> tuple[Any, ...]:
            standing = table.get(statement.signer)
            return (standing is None, standing.seniority if standing else (), -statement.issued_ms)

        for statement in sorted(aside.values(), key=worth)[self._max_members // 2 :]:
            del aside[statement.digest]
            self._digests.discard(statement.digest)

    def _is_early(self, statement: Statement, now_ms: int) -> bool:
        return statement.issued_ms > now_ms + self._skew_ms

    def _early_until_ms(self) -> int:
        return min(one.issued_ms for one in self._early.values()) - self._skew_ms

    def _admit(self, statement: Statement, now_ms: int, dirty: set[str], restoring: bool) -> str:
        """Take the statement, or say why not. The members it concerns are added to `dirty`."""
        body = statement.body
        if body.network != self._id:
            return "wrong_network"
        if self._is_early(statement, now_ms):
            return "not_yet_valid"
        if isinstance(body, Membership):
            grace_ms = self._skew_ms + (self._forget_ms if restoring else 0)
            if now_ms > body.expires_ms + grace_ms and not (restoring and self._is_authority(body.peer_id)):
                return "expired"
        reason = self._void(statement)
        if isinstance(body, Grant | Revoke):
            return reason or self._admit_charter(statement, dirty)
        if reason:
            if not (restoring and reason in VOID):
                return reason
            self._aside[statement.digest] = statement
            return ""
        if body.peer_id not in self._dossiers and len(self._dossiers) >= self._max_members:
            return "directory_full"
        held = self._held(statement)
        if held is not None and held.rank >= statement.rank:
            return "rolled_back"
        self._place(statement)
        dirty.add(body.peer_id)
        return ""

    def _void(self, statement: Statement) -> str:
        """Why a statement has no effect, its age and time left aside; empty when it has."""
        body = statement.body
        if not isinstance(body, Presence):
            reason = charter.refusal(self._charter.table, statement)
            if reason or isinstance(body, Grant | Revoke | Removal):
                return reason
        dossier = self._dossiers.get(body.peer_id)
        if isinstance(body, Membership):
            return "removed" if dossier is not None and body.enrolled_ms <= dossier.removed_ms else ""
        return "" if dossier is not None and dossier.newest() is not None else "not_member"

    def _is_authority(self, peer_id: str) -> bool:
        return any(one.peer_id == peer_id and not one.revoked for one in self._charter.table.values())

    def _admit_charter(self, statement: Statement, dirty: set[str]) -> str:
        before, shown = self._charter.table, self._charter.effective
        reason, dropped = self._charter.take(statement)
        self._digests.difference_update(one.digest for one in dropped)
        self._charter_changed(before, shown, dirty)
        return reason

    def _restore_charter(
        self, statements: list[Statement], refused: dict[bytes, Refused], dirty: set[str]
    ) -> list[Statement]:
        """Those taken: all of this network, for they were judged when they came."""
        taken = [one for one in statements if one.body.network == self._id]
        for one in statements:
            if one.body.network != self._id:
                refused[one.digest] = Refused("wrong_network", one.digest, one.slot)
        before, shown = self._charter.table, self._charter.effective
        self._charter.restore(taken)
        self._digests.update(one.digest for one in taken)
        self._charter_changed(before, shown, dirty)
        return taken

    def _charter_changed(self, before: Table, shown: dict[bytes, Statement], dirty: set[str]) -> None:
        """Bring the index to what is effective now, and judge all else again where an authority's word has another
        weight."""
        after = self._charter.table
        if self._charter.effective is not shown:
            for old in shown.values():
                self.index.discard(old)
            for new in self._charter.effective.values():
                self.index.put(new)
        changed = any(_weight(after.get(key)) != _weight(standing) for key, standing in before.items())
        if changed or (self._aside and len(after) > len(before)):
            self._replay(dirty)

    def _replay(self, dirty: set[str]) -> None:
        """Authorities came or went: judge again everything that is held or was set aside."""
        everything = [*self._aside.values(), *self._of_peers()]
        dirty.update(self._dossiers)
        for dossier in self._dossiers.values():
            for shown in dossier.shared.values():
                self.index.discard(shown)
        self._dossiers, self._aside = {}, {}
        for statement in _in_order(everything):
            reason = self._void(statement)
            if reason == "not_member":
                self._digests.discard(statement.digest)
                continue
            if reason:
                self._aside[statement.digest] = statement
                continue
            held = self._held(statement)
            if held is not None and held.rank >= statement.rank:
                self._digests.discard(statement.digest)
            else:
                self._place(statement)
        dirty.update(self._dossiers)

    def _held(self, statement: Statement) -> Statement | None:
        """What is in its slot now."""
        body = statement.body
        dossier = None if isinstance(body, Grant | Revoke) else self._dossiers.get(body.peer_id)
        return dossier.held(statement.slot) if dossier is not None else None

    def _place(self, statement: Statement) -> None:
        """Put a statement that has effect into its dossier, instead of the older one there."""
        body = statement.body
        assert isinstance(body, Membership | Removal | Presence)
        dossier = self._dossiers.setdefault(body.peer_id, Dossier())
        held = dossier.held(statement.slot)
        if held is not None:
            self._digests.discard(held.digest)
        for void in dossier.put(statement):
            self._aside[void.digest] = void
        if dossier.presence is not None and dossier.newest() is None:
            self._drop(dossier, dossier.presence)

    def _drop(self, dossier: Dossier, statement: Statement) -> None:
        dossier.drop(statement)
        self._digests.discard(statement.digest)

    def _refresh(self, dirty: Iterable[str], now_ms: int) -> Changes:
        """Bring index, claims and members up to date for some peer ids, and say what changed."""
        return self._roster.update({peer_id: self._refresh_dossier(peer_id, now_ms) for peer_id in dirty})

    def _refresh_dossier(self, peer_id: str, now_ms: int) -> Valid | None:
        """Forget what is too old, update the index. Returns what is valid now, if it is a member."""
        dossier = self._dossiers.get(peer_id)
        if dossier is None:
            return None
        shared: dict[bytes, Statement] = {}
        due_ms: list[int] = []
        for held in list(dossier):
            if not isinstance(held.body, Membership):
                shared[held.slot] = held
                continue
            last_ms = held.body.expires_ms + self._skew_ms
            if now_ms <= last_ms:
                shared[held.slot] = held
                due_ms.append(last_ms)
            elif now_ms <= last_ms + self._forget_ms:
                due_ms.append(last_ms + self._forget_ms)
            elif not self._is_authority(peer_id):
                self._drop(dossier, held)
        newest = dossier.newest()
        if dossier.presence is not None and (newest is None or newest.slot not in shared):
            shared.pop(dossier.presence.slot, None)
            if newest is None:
                self._drop(dossier, dossier.presence)
        for slot, shown in dossier.shared.items():
            if shared.get(slot) is not shown:
                self.index.discard(shown)
        for slot, held in shared.items():
            if dossier.shared.get(slot) is not held:
                self.index.put(held)
        dossier.shared = shared
        if due_ms and min(due_ms) != dossier.due_ms:
            dossier.due_ms = min(due_ms)
            heapq.heappush(self._due, (dossier.due_ms, peer_id))
        if not len(dossier):
            del self._dossiers[peer_id]
        if newest is None or newest.slot not in shared or not isinstance(newest.body, Membership):
            return None
        presence = dossier.presence.body if dossier.presence is not None else None
        vouched = tuple(
            (held.body, (self._charter.table[held.signer].seniority, held.body.enrolled_ms))
            for held in shared.values()
            if isinstance(held.body, Membership)
        )
        return Valid(newest.body, presence if isinstance(presence, Presence) else None, vouched)


_CHARTER = (Kind.GRANT, Kind.REVOKE)


def _weight(standing: Standing | None) -> tuple[object, ...]:
    return (standing.until_ms, standing.seniority) if standing is not None else ()


def _in_order(statements: Iterable[Statement]) -> list[Statement]:
    """Each behind those it can rest on."""
    return sorted(statements, key=lambda statement: statement.kind)
