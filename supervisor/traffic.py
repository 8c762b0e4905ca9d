"""What went to and from each peer, over all processes a shard's slot has had."""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import Any

from vpnd.api.reports import PeerTraffic

NAMES = ("bytes_sent", "bytes_received", "packets_sent", "packets_received")
_NOTHING = [0] * len(NAMES)


class Traffic:
    """Totals by peer id of one slot. A process counts from zero and tells its counts now and then; when it ends, what
    it told last is kept. Owner: supervisor loop."""

    def __init__(self) -> None:
        # counts in the order of NAMES
        self._before: dict[str, list[int]] = {}
        self._now: dict[str, list[int]] = {}

    def told(self, rows: tuple[PeerTraffic, ...]) -> None:
        """The process there is told its counts, or a part of them."""
        for row in rows:
            self._now[row.peer_id] = [getattr(row, name) for name in NAMES]

    def ended(self) -> None:
        """The process is gone; the next one counts from zero."""
        for peer_id in self._now:
            self._before[peer_id] = self.of(peer_id)
        self._now = {}

    def __len__(self) -> int:
        """Peers, those of the process there is and those of the processes before each counted."""
        return len(self._before) + len(self._now)

    def of(self, peer_id: str) -> list[int]:
        """The totals of one peer, in the order of NAMES."""
        return list(map(add, self._before.get(peer_id, _NOTHING), self._now.get(peer_id, _NOTHING)))


def total(peer_id: str, slots: Sequence[Traffic]) -> dict[str, Any]:
    """The totals of one peer over all slots, by name."""
    return dict(
        zip(NAMES, map(sum, zip(_NOTHING, *(slot.of(peer_id) for slot in slots), strict=True)), strict=True)
    )
