"""What nearly every part of control uses: settings, counters, the rate-limited log, clocks and dice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import msgspec

from vpnd.adapter.guards import Count
from vpnd.adapter.logs import Seldom
from vpnd.config.live import Live

NANOSECONDS_PER_MS = 1_000_000


def wall_clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // NANOSECONDS_PER_MS


class Common(msgspec.Struct, frozen=True):
    """`count` adds one to a counter of control's, `seldom` logs what strangers can provoke. `now_s` is a
    monotonic clock in seconds, `now_ms` the wall clock in milliseconds since 1970."""

    live: Live
    count: Count
    seldom: Seldom
    now_s: Callable[[], float]
    now_ms: Callable[[], int] = wall_clock_ms
    dice: random.Random = msgspec.field(default_factory=random.SystemRandom)
