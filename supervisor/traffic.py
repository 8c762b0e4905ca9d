"""What went to and from each peer, over all processes a shard's slot has had."""

from __future__ import annotations

import collections

from vpnd.api.reports import PeerTraffic

NAMES = ("bytes_sent", "bytes_received", "packets_sent", "packets_received")


class Traffic:
    """Totals by peer id of one slot. A process counts from zero and tells its counts now and then; when it ends, what
    it told last is kept. Owner: supervisor loop."""

    def __init__(self) -> None:
        self._before: dict[str, collections.Counter[str]] = {}
        self._now: dict[str, collections.Counter[str]] = {}

    def told(self, rows: tuple[PeerTraffic, ...]) -> None:
        """The process there is told its counts, or a part of them."""
        for row in rows:
            self._now[row.peer_id] = collections.Counter({name: getattr(row, name) for name in NAMES})

    def ended(self) -> None:
        """The process is gone; the next one counts from zero."""
        for peer_id, counts in self._now.items():
            self._before.setdefault(peer_id, collections.Counter()).update(counts)
        self._now = {}

    def of(self, peer_id: str) -> collections.Counter[str]:
        """The totals of one peer."""
        nothing: collections.Counter[str] = collections.Counter()
        return self._before.get(peer_id, nothing) + self._now.get(peer_id, nothing)
