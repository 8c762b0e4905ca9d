"""What a shard counts, and the page of shared memory it is stored in.

The page outlives the process: counts go on from what an earlier process of the same shard left there, gauges
start at zero. What changes with every batch is stored with every batch; the rest at metrics.interval and when
asked for.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

from vpnd.metrics import DROP_REASONS, GAUGES, SHARD_COUNTERS, SHARD_HISTOGRAMS, CounterPage, Drops, Times

#: The counters stored with every batch: the first of SHARD_COUNTERS.
BATCH = (
    "packets_from_tun",
    "bytes_from_tun",
    "packets_to_tun",
    "bytes_to_tun",
    "packets_sent",
    "bytes_sent",
    "packets_received",
    "bytes_received",
)
assert SHARD_COUNTERS[: len(BATCH)] == BATCH
_store = struct.Struct(f"{len(BATCH)}Q").pack_into


class Counts:
    """Counts of this process, each under its name in SHARD_COUNTERS; `drops`: by reason; `times`: histograms;
    `refused`, `refused_bytes`: received, and not written into the TUN.

    One for a shard; whoever counts something adds to it. Owner: shard loop.
    """

    def __init__(self) -> None:
        self.drops = Drops()
        self.packets_from_tun = self.bytes_from_tun = self.refused = self.refused_bytes = 0
        self.packets_sent = self.bytes_sent = self.packets_received = self.bytes_received = 0
        self.segments_sent = self.segments_received = 0
        self.flows_created = self.flows_reaped = self.flows_moved = 0
        self.streams_opened = self.streams_closed = self.streams_failed = self.streams_acquired = 0
        self.sessions_opened = self.sessions_closed = self.sessions_rotated = 0
        self.session_errors = self.session_floods = 0
        self.unreachables_told = 0
        self.health_probes = self.health_failures = self.health_deaths = 0
        self.datagrams_sent = self.datagrams_unsent = self.datagrams_received = self.datagrams_missed = 0
        self.datagrams_late = self.datagrams_replayed = self.datagrams_forged = self.datagrams_unknown = 0
        self.datagrams_marked = self.datagrams_over = 0
        self.batches = 0
        self.times = {name: Times() for name in SHARD_HISTOGRAMS}

    @property
    def packets_to_tun(self) -> int:
        """Written into the TUN device."""
        return self.packets_received - self.refused


class Dropping(Protocol):
    """Who counts what was dropped: Drops, of all, or PeerDrops."""

    def span(self, reason: str, buffer: memoryview, start: int, end: int, records: int) -> None:
        """See Drops."""

    def plain(self, reason: str, records: int = 1) -> None:
        """See Drops."""


class PeerDrops:
    """What of one peer's packets was dropped, in `records` by reason; counted in `total` as well."""

    __slots__ = ("_total", "records")

    def __init__(self, total: Drops) -> None:
        self._total = total
        self.records: dict[str, int] = {}  # of many peers nothing is ever dropped

    def span(self, reason: str, buffer: memoryview, start: int, end: int, records: int) -> None:
        self._total.span(reason, buffer, start, end, records)
        self.records[reason] = self.records.get(reason, 0) + records

    def plain(self, reason: str, records: int = 1) -> None:
        self._total.plain(reason, records)
        self.records[reason] = self.records.get(reason, 0) + records


class Traffic(NamedTuple):
    """Records, their packets' bytes without any framing, and the packets on a link that they are: `segments`."""

    bytes_sent: int = 0
    bytes_received: int = 0
    packets_sent: int = 0
    packets_received: int = 0
    segments_sent: int = 0
    segments_received: int = 0

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(*(one + another for one, another in zip(self, other, strict=True)))


class Sender(Protocol):
    """What counts what it sends."""

    bytes_sent: int
    packets_sent: int
    segments_sent: int


def sent(sender: Sender) -> Traffic:
    """What it has sent."""
    return Traffic(
        bytes_sent=sender.bytes_sent, packets_sent=sender.packets_sent, segments_sent=sender.segments_sent
    )


class Counters:
    """Owner: shard loop, which is the page's only writer."""

    def __init__(self, page: CounterPage, counts: Counts) -> None:
        self._values, self._index, self._counts = page.values, page.index, counts
        self._base = [0 if name in GAUGES else value for name, value in page.read().items()]
        for name in GAUGES & page.index.keys():
            page.set(name, 0)
        self._drops = SHARD_COUNTERS.index(f"dropped_{DROP_REASONS[0]}")

    def store_batch(self) -> None:
        """Store what changes with every batch of packets."""
        base, counts = self._base, self._counts
        _store(
            self._values,
            0,
            base[0] + counts.packets_from_tun,
            base[1] + counts.bytes_from_tun,
            base[2] + counts.packets_to_tun,
            base[3] + counts.bytes_received - counts.refused_bytes,
            base[4] + counts.packets_sent,
            base[5] + counts.bytes_sent,
            base[6] + counts.packets_received,
            base[7] + counts.bytes_received,
        )

    def store_all(self, **gauges: int) -> None:
        """Store all counts, and the `gauges` as they are now."""
        self.store_batch()
        values, base, index = self._values, self._base, self._index
        for name, count in (vars(self._counts) | gauges).items():
            offset = index.get(name)
            if offset is not None:
                values[offset] = base[offset] + count
        drops = self._counts.drops
        times = (count for each in self._counts.times.values() for count in each.counts)
        for offset, count in enumerate((*drops.values(), *drops.packets.values(), *times), self._drops):
            values[offset] = base[offset] + count
