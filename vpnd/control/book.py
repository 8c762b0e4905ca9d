"""The session book: which shard holds which session with which peer. No I/O, no clock.

It holds what control handed over and what shards said they hold when control came (back). A session leaves
it when its shard says it is down, or when the shard is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TypeVar

import msgspec

from vpnd.nat.paths import Path

#: What a session is taken for of which nothing else is known.
DIRECTLY = Path()

_Key = TypeVar("_Key", bound=Hashable)

#: A control starts giving out session ids at a random multiple of 2**16 and counts up. 48 bits in all: readers
#: of JSON that keep numbers as doubles lose what is beyond 53.
ID_RANDOM_BITS = 32
ID_COUNT_BITS = 16


class Held(msgspec.Struct):
    """One session. `up`: a stream of it is open, packets flow; before that it is on trial.

    `since_s`: when it was entered. `path`: how it reaches the peer, as far as this control made it.
    """

    session_id: int
    peer_id: str
    shard: int
    initiator: bool
    since_s: float
    up: bool = False
    path: Path = Path()


class SessionBook:
    """All sessions of this node. `random_bits(n)` draws an integer of n bits. Owner: control's loop."""

    def __init__(self, random_bits: Callable[[int], int]) -> None:
        # A restarted control must not give out ids that shards still hold from before.
        self._next_id = random_bits(ID_RANDOM_BITS) << ID_COUNT_BITS
        self._held: dict[int, Held] = {}
        self._per_peer: Counter[str] = Counter()
        self._per_pair: Counter[tuple[str, int]] = Counter()
        self._up: Counter[str] = Counter()

    def new_id(self) -> int:
        """An id no session of this node has."""
        self._next_id += 1
        while self._next_id in self._held:
            self._next_id += 1
        return self._next_id

    def add(self, held: Held) -> None:
        """Enter a session. An id that is held already is replaced."""
        self._remove(held.session_id)
        self._held[held.session_id] = held
        self._per_peer[held.peer_id] += 1
        self._per_pair[held.peer_id, held.shard] += 1
        if held.up:
            self._up[held.peer_id] += 1

    def up(self, session_id: int, shard: int) -> Held | None:
        """The shard says packets flow. None when it does not hold such a session."""
        held = self._of_shard(session_id, shard)
        if held is not None and not held.up:
            held.up = True
            self._up[held.peer_id] += 1
        return held

    def down(self, session_id: int, shard: int) -> Held | None:
        """The shard says it has ended; returns what it was; None when the shard has no such one."""
        return self._remove(session_id) if self._of_shard(session_id, shard) else None

    def shard_left(self, shard: int) -> list[Held]:
        """Take out all sessions of a shard, and return them."""
        gone = [held for held in self._held.values() if held.shard == shard]
        for held in gone:
            self._remove(held.session_id)
        return gone

    def count(self, peer_id: str) -> int:
        """Sessions with a peer, in all shards."""
        return self._per_peer[peer_id]

    def connected(self, peer_id: str) -> bool:
        """Whether packets flow in at least one session with the peer."""
        return self._up[peer_id] > 0

    def on_trial(self, peer_id: str) -> int:
        """Sessions with the peer in which no packets flow yet."""
        return self._per_peer[peer_id] - self._up[peer_id]

    def count_of(self, peer_id: str, shard: int) -> int:
        return self._per_pair[peer_id, shard]

    def others(self, peer_id: str, shard: int) -> set[int]:
        """The other shards that have sessions with the peer."""
        return {index for (who, index), held in self._per_pair.items() if held and who == peer_id} - {shard}

    def of_peer(self, peer_id: str) -> list[Held]:
        """Its sessions, oldest first."""
        return [held for held in self._held.values() if held.peer_id == peer_id]

    def best(self, peer_id: str, shard: int) -> Held | None:
        """The session by which the shard reaches the peer best, of equal ones one that this node dialed; None without
        any."""
        held = (each for each in self.of_peer(peer_id) if each.shard == shard)
        return min(held, key=lambda each: (each.path.rank, not each.initiator), default=None)

    def shard_for(self, peer_id: str, wanted: Mapping[int, int], path: Path = DIRECTLY) -> int | None:
        """Of the shards in `wanted`, which says how many sessions with the peer each wants, the one that lacks
        most; among equals the one with the fewest, then the lowest index. For a session by a better `path` one by a
        worse path does not count: it is what this one replaces."""
        worse = Counter(held.shard for held in self.of_peer(peer_id) if held.path.rank > path.rank)

        def order(shard: int) -> tuple[int, int, int]:
            held = self._per_pair[peer_id, shard] - worse[shard]
            return held - wanted[shard], held - worse[shard], shard

        return min(wanted, key=order, default=None)

    def __len__(self) -> int:
        return len(self._held)

    def sessions(self) -> Collection[Held]:
        """All of them; a live view."""
        return self._held.values()

    def _of_shard(self, session_id: int, shard: int) -> Held | None:
        held = self._held.get(session_id)
        return held if held is not None and held.shard == shard else None

    def _remove(self, session_id: int) -> Held | None:
        held = self._held.pop(session_id, None)
        if held is not None:
            _take(self._per_peer, held.peer_id)
            _take(self._per_pair, (held.peer_id, held.shard))
            if held.up:
                _take(self._up, held.peer_id)
        return held


def _take(counter: Counter[_Key], key: _Key) -> None:
    """Count one less; a zero goes, for peers come and go and zeros would pile up."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
