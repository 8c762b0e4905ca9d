"""What nearly every part of control uses: settings, counters, the rate-limited log, clocks and dice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import msgspec
import trio

from vpnd.adapter.guards import Count
from vpnd.config.live import Live
from vpnd.logs import Seldom
from vpnd.resilience import Backoff


class Common(msgspec.Struct, frozen=True):
    """`count` adds one to a counter of control's, `seldom` logs what strangers can provoke. `now_s` is a
    monotonic clock in seconds, `now_ms` the wall clock in milliseconds since 1970."""

    live: Live
    count: Count
    seldom: Seldom
    now_s: Callable[[], float]
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    dice: random.Random = msgspec.field(default_factory=random.SystemRandom)

    def backoff(self) -> Backoff:
        """By [retry] as it is now."""
        retry = self.live.config.retry
        return Backoff(retry.initial_interval, retry.max_interval, retry.multiplier, self.dice.uniform)


class Waits:
    """Peers not to be tried again yet, each with its own backoff. Moments are trio's. Owner: control's loop."""

    def __init__(self, common: Common) -> None:
        self._common = common
        self._by_peer: dict[str, tuple[Backoff, float]] = {}

    def until_s(self, peer_id: str) -> float:
        """When the peer may be tried again; long ago for one that has not failed."""
        return self._by_peer[peer_id][1] if peer_id in self._by_peer else 0.0

    def fail(self, peer_id: str, least_s: float = 0.0) -> None:
        """It failed: the next wait begins now, and is at least so long."""
        now_s = trio.current_time()
        backoff = self._by_peer[peer_id][0] if peer_id in self._by_peer else self._common.backoff()
        self._by_peer[peer_id] = backoff, max(backoff.fail(now_s), now_s + least_s)

    def reset(self, peer_id: str) -> None:
        self._by_peer.pop(peer_id, None)

    def clear(self) -> None:
        """The circumstances are new: everybody may be tried at once."""
        self._by_peer.clear()
