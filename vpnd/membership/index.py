"""The statements two directories compare, by bucket: equal directories cost a few bytes, a difference little more.

An entry is 16 bytes: a statement's slot and the first half of its digest. The first byte of the slot is its bucket.
A bucket's hash is over its entries in order, the root over the buckets' hashes; both are kept until something in
them changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from vpnd.membership.statements import SLOT_BYTES, Statement

BUCKETS = 256
#: Part of a digest that tells versions of one slot apart.
VERSION_BYTES = 8
ENTRY_BYTES = SLOT_BYTES + VERSION_BYTES
BUCKET_HASH_BYTES = 8
ROOT_BYTES = 16

_EMPTY = bytes(BUCKET_HASH_BYTES)


class Index:
    """The statements of a directory that are told to others, by slot. Owner: the directory."""

    def __init__(self) -> None:
        self._buckets: list[dict[bytes, Statement]] = [{} for _ in range(BUCKETS)]
        self._hashes: list[bytes | None] = [_EMPTY] * BUCKETS
        self._root: bytes | None = None
        self._count = 0

    def put(self, statement: Statement) -> None:
        """Take `statement` instead of what was in its slot."""
        bucket = statement.slot[0]
        held = self._buckets[bucket]
        self._count += statement.slot not in held
        held[statement.slot] = statement
        self._hashes[bucket] = self._root = None

    def discard(self, statement: Statement) -> None:
        """Take out `statement`, if it is that which its slot holds."""
        held = self._buckets[statement.slot[0]]
        if held.get(statement.slot) == statement:
            del held[statement.slot]
            self._count -= 1
            self._hashes[statement.slot[0]] = self._root = None

    def get(self, slot: bytes) -> Statement | None:
        return self._buckets[slot[0]].get(slot)

    def bucket(self, number: int) -> dict[bytes, Statement]:
        """slot -> statement of one bucket; a live view, not to be changed."""
        return self._buckets[number]

    def hashes(self) -> bytes:
        """The hashes of all buckets, 8 bytes each."""
        return b"".join(self._hash(number) for number in range(BUCKETS))

    def root(self) -> bytes:
        """16 bytes, equal when the statements are."""
        if self._root is None:
            self._root = hashlib.sha256(self.hashes()).digest()[:ROOT_BYTES]
        return self._root

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Statement]:
        for held in self._buckets:
            yield from held.values()

    def _hash(self, number: int) -> bytes:
        known = self._hashes[number]
        if known is None:
            entries = b"".join(sorted(map(entry, self._buckets[number].values())))
            known = hashlib.sha256(entries).digest()[:BUCKET_HASH_BYTES] if entries else _EMPTY
            self._hashes[number] = known
        return known


def entry(statement: Statement) -> bytes:
    """How a statement is named to others, 16 bytes."""
    return statement.slot + statement.digest[:VERSION_BYTES]
