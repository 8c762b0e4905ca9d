"""A shard's slot: what stays when its process dies or is scaled away. The ring is made anew for each process, the
counter page is not."""

from __future__ import annotations

import os

from supervisor.network.tun import Tun
from supervisor.pump import Pump, ShardPort
from supervisor.traffic import Traffic
from vpnd.api import messages
from vpnd.config.schema import Config
from vpnd.metrics import GAUGES, OUTBOUND_DROPS, SHARD_COUNTERS, create_page
from vpnd.packet import ring


class Slot:
    """Shard `index`, seen from the supervisor. Owner: supervisor loop.

    The books, for the way out:  packets_from_tun = packets_sent + dropped + packets_queued. When a process is killed
    what it had taken is gone; `end` settles the difference as shard_died, so that the sum holds for ever.
    """

    def __init__(self, index: int, pump: Pump) -> None:
        self.index = index
        self._pump = pump
        self.traffic = Traffic()
        #: the configuration and our own prefixes its process was started with
        self.given: Config | None = None
        self.own_given: tuple[str, ...] = ()
        self.page, self._page_fd = create_page(SHARD_COUNTERS, f"vpnd-counters-{index}")
        self.port: ShardPort | None = None
        self._ring: ring.Descriptors | None = None
        self._packets_in = 0

    def begin(
        self, config: Config, own: tuple[str, ...], tun: Tun
    ) -> tuple[messages.Message, tuple[int, ...]]:
        """A new ring, and the first message for a new process."""
        self.given, self.own_given = config, own
        self._ring = ring.Descriptors.create(config.worker.ring_bytes, f"vpnd-ring-{self.index}")
        self.port = ShardPort(self.index, self._ring)
        start = messages.ShardStart(config=config, index=self.index, own=own, tun_offloads=int(tun.offloads))
        return start, (*self._ring.all(), self._page_fd, tun.fd)

    def up(self) -> None:
        """The process is ready: flows may be given to it."""
        assert self.port is not None
        self._pump.attach(self.port)

    def leave(self) -> int:
        """The process is scaled away: its flows move, their number is returned. What the ring has is still its own."""
        return self._pump.detach(self.port) if self.port is not None else 0

    def ended(self) -> None:
        """The process is gone, or no longer trusted: settle the books, drop the ring."""
        self.traffic.ended()
        port, self.port = self.port, None
        if port is None or self._ring is None:
            return
        self._pump.detach(port)
        self._packets_in += port.packets_in
        self._settle()
        port.close()
        self._ring.close()
        self._ring = None

    def _settle(self) -> None:
        """Between two processes the supervisor is the page's only writer."""
        page = self.page
        counts = page.read()
        done = counts["packets_sent"] + sum(counts[f"dropped_{reason}"] for reason in OUTBOUND_DROPS)
        page.add("dropped_shard_died", max(0, self._packets_in - done))
        page.set("packets_from_tun", max(self._packets_in, done))
        for gauge in GAUGES & page.index.keys():
            page.set(gauge, 0)

    def in_ring(self) -> int:
        """(Super)packets given to the shard that it has not taken yet."""
        given = self._packets_in + (self.port.packets_in if self.port is not None else 0)
        return max(0, given - self.page.read()["packets_from_tun"])

    def ring_use(self) -> dict[str, int]:
        """Bytes in use and size of the ring; nothing is used while there is no process."""
        used = self.port.to_shard.used() if self.port is not None else 0
        return {"used": used, "size": self.given.worker.ring_bytes if self.given is not None else 0}

    def close(self) -> None:
        """The node stops."""
        self.ended()
        self.page.close()
        os.close(self._page_fd)
