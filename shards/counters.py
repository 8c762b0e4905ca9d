"""A shard's counts, written into its page of shared memory.

The page outlives the process: counts go on from what an earlier process of the same shard left there, gauges
start at zero. What changes with every batch is stored with every batch; the rest at metrics.interval and when
asked for.
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

    def store_batch(
        self,
        from_tun: int,
        bytes_from_tun: int,
        to_tun: int,
        bytes_to_tun: int,
        sent: int,
        bytes_sent: int,
        received: int,
        bytes_received: int,
    ) -> None:
        """Store what changes with every batch; in the order of the first eight of SHARD_COUNTERS."""
        values, base = self._values, self._base
        values[0] = base[0] + from_tun
        values[1] = base[1] + bytes_from_tun
        values[2] = base[2] + to_tun
        values[3] = base[3] + bytes_to_tun
        values[4] = base[4] + sent
        values[5] = base[5] + bytes_sent
        values[6] = base[6] + received
        values[7] = base[7] + bytes_received

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


assert SHARD_COUNTERS[:8] == (
    "packets_from_tun",
    "bytes_from_tun",
    "packets_to_tun",
    "bytes_to_tun",
    "packets_sent",
    "bytes_sent",
    "packets_received",
    "bytes_received",
)
