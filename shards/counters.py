"""A shard's counts, written into its page of shared memory.

The page outlives the process: counts go on from what an earlier process of the same shard left there, gauges start
at zero. What changes with every batch is stored with every batch; the rest at metrics.interval and when asked for.
"""

from __future__ import annotations

from vpnd.metrics import DROP_REASONS, GAUGES, SHARD_COUNTERS, CounterPage


class Counters:
    """Owner: shard loop, which is the page's only writer."""

    def __init__(self, page: CounterPage) -> None:
        self._values = page.values
        self._base = [0 if name in GAUGES else value for name, value in page.read().items()]
        for name in GAUGES & page.index.keys():
            page.set(name, 0)
        self._index = page.index
        self._drops = SHARD_COUNTERS.index(f"dropped_{DROP_REASONS[0]}")

    def store(self, **counts: int) -> None:
        """Store some counts of this process by name."""
        values, base, index = self._values, self._base, self._index
        for name, count in counts.items():
            place = index[name]
            values[place] = base[place] + count

    def store_drops(self, drops: dict[str, int]) -> None:
        """Store all drop counts; `drops` is in the order of DROP_REASONS, as `new_drops` makes it."""
        values, base = self._values, self._base
        for place, count in enumerate(drops.values(), self._drops):
            values[place] = base[place] + count
