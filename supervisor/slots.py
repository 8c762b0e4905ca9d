"""A shard's slot: what stays when its process dies. Rings are made anew for each process, the counter page is not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from supervisor.pump import Pump, ShardPort
from vpnd.api import messages
from vpnd.config.schema import Config
from vpnd.metrics import DROP_REASONS, OUTBOUND_DROPS, SHARD_COUNTERS, create_page
from vpnd.packet import ring


class Slot:
    """Shard `index`, seen from the supervisor. Owner: supervisor loop.

    The books, for the way out:  packets_from_tun = packets_sent + dropped + packets_queued. When a process is killed
    what it had taken is gone; `end` settles the difference as shard_died, so that the sum holds for ever.
    """

    def __init__(self, index: int, config: Config, pump: Pump, broken: Callable[[Slot, str], None]) -> None:
        self.index = index
        self._config, self._pump, self._broken = config, pump, broken
        self._loop = asyncio.get_running_loop()
        self.page, self.page_fd = create_page(SHARD_COUNTERS, f"vpnd-counters-{index}")
        self.port: ShardPort | None = None
        self._rings: tuple[ring.Descriptors, ring.Descriptors] | None = None
        self._packets_in = self._packets_out = 0

    def begin(self, own: tuple[str, ...], tun_offloads: int) -> tuple[messages.Message, tuple[int, ...]]:
        """New rings, and the first message for a new process."""
        size = self._config.worker.ring_bytes
        to_shard = ring.Descriptors.create(size, f"vpnd-ring-to-{self.index}")
        from_shard = ring.Descriptors.create(size, f"vpnd-ring-from-{self.index}")
        self._rings = to_shard, from_shard
        self.port = ShardPort(self.index, to_shard, from_shard)
        start = messages.ShardStart(config=self._config, index=self.index, own=own, tun_offloads=tun_offloads)
        return start, (*to_shard.all(), *from_shard.all(), self.page_fd)

    def up(self) -> None:
        """The process is ready: packets flow both ways."""
        assert self.port is not None
        self._loop.add_reader(self.port.from_shard.wake_fd, self._on_wake)
        self._loop.call_soon(self._on_wake)
        self._pump.attach(self.port)

    def _on_wake(self) -> None:
        port = self.port
        if port is None:
            return
        ring.drain(port.from_shard.wake_fd)
        try:
            if self._pump.write_tun(port) or not port.from_shard.sleep():
                self._loop.call_soon(self._on_wake)
        except ring.RingBroken as error:
            self.ended()
            self._broken(self, str(error))

    def ended(self) -> None:
        """The process is gone, or no longer trusted: deliver what it had finished, settle the books, drop the rings."""
        port, self.port = self.port, None
        if port is None or self._rings is None:
            return
        self._pump.detach(port)
        self._loop.remove_reader(port.from_shard.wake_fd)
        try:
            while self._pump.write_tun(port):
                pass
        except ring.RingBroken:
            pass  # the rest cannot be read; it counts as shard_died_inbound below
        self._packets_in += port.packets_in
        self._packets_out += port.packets_out
        self._settle()
        port.close()
        for descriptors in self._rings:
            descriptors.close()
        self._rings = None

    def _settle(self) -> None:
        """Between two processes the supervisor is the page's only writer."""
        page = self.page
        counts = page.read()
        done = counts["packets_sent"] + sum(counts[f"dropped_{reason}"] for reason in OUTBOUND_DROPS)
        page.add("dropped_shard_died", max(0, self._packets_in - done))
        page.set("packets_from_tun", max(self._packets_in, done))
        lost = counts["packets_to_tun"] - counts["dropped_shard_died_inbound"] - self._packets_out
        if lost > 0:
            page.add("dropped_shard_died_inbound", lost)
        for gauge in ("packets_queued", "flows", "streams", "sessions"):
            page.set(gauge, 0)

    def in_ring(self) -> int:
        """(Super)packets given to the shard that it has not taken yet."""
        given = self._packets_in + (self.port.packets_in if self.port is not None else 0)
        return max(0, given - self.page.read()["packets_from_tun"])

    def ring_use(self) -> dict[str, dict[str, int]]:
        """Bytes in use and size of both rings; zeros while there is no process."""
        size = self._config.worker.ring_bytes
        port = self.port
        return {
            "ring_in": {"used": port.to_shard.used() if port is not None else 0, "size": size},
            "ring_out": {"used": port.from_shard.used() if port is not None else 0, "size": size},
        }

    def close(self) -> None:
        """The node stops."""
        self.ended()
        self.page.close()
        os.close(self.page_fd)


assert set(OUTBOUND_DROPS) < set(DROP_REASONS)
