"""All that is known of one peer id: its memberships and removals by each authority, and its presence.

Per authority the newest of each kind is kept (so that what one authority said is still known when another is revoked).
The whole is a product of maxima, hence the same in whatever order and however often statements arrive:

    removed until   the latest removal by any authority; it voids every membership enrolled up to then
    membership      of what is not void, the one enrolled last, and of that enrolment the one issued last
"""

from __future__ import annotations

from collections.abc import Iterator

from vpnd.membership.statements import Kind, Membership, Removal, Statement


class Dossier:
    """The statements about one peer id, all of them of valid signature and standing. Owner: the directory."""

    def __init__(self) -> None:
        self._by_slot: dict[bytes, Statement] = {}
        self.removed_ms = -1
        self.presence: Statement | None = None
        #: What of this is in the index now.
        self.shared: dict[bytes, Statement] = {}
        #: When the directory looks at this again, because something expires.
        self.due_ms = -1

    def held(self, slot: bytes) -> Statement | None:
        return self._by_slot.get(slot)

    def put(self, statement: Statement) -> list[Statement]:
        """Take a statement into its slot. Returns the memberships it voids, which are taken out."""
        self._by_slot[statement.slot] = statement
        if statement.kind is Kind.PRESENCE:
            self.presence = statement
        if not isinstance(statement.body, Removal) or statement.body.issued_ms <= self.removed_ms:
            return []
        self.removed_ms = statement.body.issued_ms
        void = [held for held in self.memberships() if _membership(held).enrolled_ms <= self.removed_ms]
        for held in void:
            del self._by_slot[held.slot]
        return void

    def drop(self, statement: Statement) -> None:
        """Take out a membership or the presence."""
        self._by_slot.pop(statement.slot, None)
        if statement is self.presence:
            self.presence = None

    def memberships(self) -> list[Statement]:
        """Those not void, of all authorities."""
        return [held for held in self._by_slot.values() if held.kind is Kind.MEMBERSHIP]

    def newest(self) -> Statement | None:
        """The membership that counts, expired or not."""
        return max(self.memberships(), key=lambda held: held.rank, default=None)

    def removal(self) -> Statement | None:
        """The removal that counts; a later membership may have let the peer in again."""
        removals = [held for held in self._by_slot.values() if held.kind is Kind.REMOVAL]
        return max(removals, key=lambda held: held.rank, default=None)

    def __iter__(self) -> Iterator[Statement]:
        return iter(self._by_slot.values())

    def __len__(self) -> int:
        return len(self._by_slot)


def _membership(statement: Statement) -> Membership:
    assert isinstance(statement.body, Membership)
    return statement.body
