"""How many bytes each direction of a pair may move, and whose turn it is. No I/O; time is an argument.

Two token buckets: each direction has one of relay.bytes_per_s, all together one of relay.total_bytes_per_s. A direction
that has to wait stands in a queue and gets one part at a time, so none is kept waiting by one that takes much.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

#: A bucket holds what comes in so long. Less, and timers cannot keep the rate; more, and a limit is none for a while.
BURST_S = 0.1


class Bucket:
    """Tokens for bytes, `rate` a second; 0: no limit."""

    def __init__(self, rate: int, now_s: float) -> None:
        self._rate, self._since_s = rate, now_s
        self._most = rate * BURST_S if rate else math.inf
        self._tokens = self._most

    def fill(self, now_s: float) -> None:
        """What has come in until now."""
        self._tokens = min(self._most, self._tokens + (now_s - self._since_s) * self._rate)
        self._since_s = now_s

    def take(self, count: int) -> None:
        self._tokens -= count

    def wait_s(self, count: int) -> float:
        """From the last `fill` until there are `count`."""
        lacking = count - self._tokens
        return lacking / self._rate if lacking > 0 else 0.0


class Shaper:
    """Owner: the relay's loop. `part`: the most a direction may move in one turn, bytes."""

    def __init__(self, rate: int, total_rate: int, part: int, now_s: float) -> None:
        self.part = self._most_part = part
        self._rate, self._total = rate, Bucket(total_rate, now_s)
        self._buckets: dict[Hashable, Bucket] = {}
        self._waiting: dict[Hashable, None] = {}
        self._free = False  # there are no limits
        self.limit(rate, total_rate, now_s)

    def limit(self, rate: int, total_rate: int, now_s: float) -> None:
        rates = [each for each in (rate, total_rate) if each]
        self._free = not rates
        self.part = max(1, min([self._most_part, *(int(each * BURST_S) for each in rates)]))
        self._rate = rate
        self._total = Bucket(total_rate, now_s)
        self._buckets = {direction: Bucket(rate, now_s) for direction in self._buckets}

    def join(self, direction: Hashable, now_s: float) -> None:
        self._buckets[direction] = Bucket(self._rate, now_s)

    def leave(self, direction: Hashable) -> None:
        """It has ended. Idempotent."""
        self._buckets.pop(direction, None)
        self._waiting.pop(direction, None)

    def may_move(self, direction: Hashable, now_s: float) -> int:
        """Bytes it may move now; 0: it waits until `due` names it."""
        # Without limits nothing is counted: that would be a fifth of what relaying costs.
        if self._free or (not self._waiting and not self._wait_s(direction, now_s)):
            return self.part
        self._waiting[direction] = None
        return 0

    def moved(self, direction: Hashable, count: int) -> None:
        """It has moved so many, at most a part."""
        if not self._free:
            self._total.take(count)
            self._buckets[direction].take(count)

    def due(self, now_s: float) -> tuple[Hashable | None, float]:
        """The one whose turn it is, out of the queue now; or None, and in how many seconds to ask again, infinite
        while nobody waits."""
        soonest_s = math.inf
        for direction in self._waiting:
            wait_s = self._wait_s(direction, now_s)
            if not wait_s:
                del self._waiting[direction]
                return direction, 0.0
            soonest_s = min(soonest_s, wait_s)
        return None, soonest_s

    def _wait_s(self, direction: Hashable, now_s: float) -> float:
        bucket = self._buckets[direction]
        for each in (bucket, self._total):
            each.fill(now_s)
        return max(bucket.wait_s(self.part), self._total.wait_s(self.part))
