"""What programs of this machine are told whose packets have nowhere to go: ICMP errors into the TUN, as of a router."""

from __future__ import annotations

from collections.abc import Callable

from shards.counters import Counts
from vpnd.config.live import Live
from vpnd.packet import icmp
from vpnd.packet.record import LENGTH, LENGTH_BYTES, PACKET_OFFSET, VNET_BYTES

_NO_OFFLOAD = bytes(VNET_BYTES)


class Unreachable:
    """At most network.unreachable_rate answers a second, as many at once. `write` as of Inbound. Owner: shard loop."""

    def __init__(
        self, live: Live, write: Callable[[memoryview], object], now: Callable[[], float], counts: Counts
    ) -> None:
        self._live, self._write, self._now, self._counts = live, write, now, counts
        self._left, self._since_s = 0.0, float("-inf")

    def tell(self, buffer: memoryview, start: int, end: int) -> None:
        """Answer the records in buffer[start:end], as far as they may be. borrowed: until this returns."""
        rate, now_s = self._live.config.network.unreachable_rate, self._now()
        self._left = min(float(rate), self._left + (now_s - self._since_s) * rate) if rate else 0.0
        self._since_s = now_s
        while start < end and self._left >= 1:
            (count,) = LENGTH.unpack_from(buffer, start)
            following = start + LENGTH_BYTES + count
            answer = icmp.unreachable(buffer[start + PACKET_OFFSET : following])
            start = following
            if answer is None:
                continue
            self._left -= 1
            try:
                self._write(memoryview(_NO_OFFLOAD + answer))
            except OSError:  # the device is going down
                return
            self._counts.unreachables_told += 1
