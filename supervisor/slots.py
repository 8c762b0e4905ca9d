"""What stays when a process of a child dies or is scaled away, and what the next one begins with: its first message and
descriptors. A ring is made anew for each process, a counter page is not."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from supervisor import statedir
from supervisor.network.tun import Tun
from supervisor.overlay import Overlay
from supervisor.pump import Pump, ShardPort
from vpnd.api import messages
from vpnd.api.reports import PeerTraffic
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.errors import ProtocolViolation
from vpnd.metrics import CONTROL_COUNTERS, DROPS, GAUGES, OUTBOUND_DROPS, SHARD_COUNTERS, TIMES, create_page
from vpnd.packet import ring
from vpnd.status import Spread

log = logging.getLogger("supervisor")


TRAFFIC = (
    "bytes_sent", "bytes_received", "packets_sent", "packets_received", "segments_sent", "segments_received",
)  # fmt: skip
_NO_TIMES = (0,) * TIMES
_NOTHING = [0] * (len(TRAFFIC) + TIMES)


class Traffic:
    """What went to and from each peer, over all processes of one slot. Owner: supervisor loop.

    A process counts from zero and tells its counts now and then; when it ends, what it told last is kept.
    """

    def __init__(self) -> None:
        # counts in the order of TRAFFIC, then round trips as metrics.Times has them
        self._before: dict[str, list[int]] = {}
        self._now: dict[str, list[int]] = {}
        # drops by reason; of most peers there are none
        self._drops_before: dict[str, dict[str, int]] = {}
        self._drops_now: dict[str, dict[str, int]] = {}

    def told(self, rows: tuple[PeerTraffic, ...]) -> None:
        """The process there is told its counts, or a part of them."""
        for row in rows:
            counts = [getattr(row, name) for name in TRAFFIC]
            self._now[row.peer_id] = [*counts, *row.rtt, *_NO_TIMES[len(row.rtt) :]]
            if row.drops:
                self._drops_now[row.peer_id] = row.drops

    def ended(self) -> None:
        """The process is gone; the next one counts from zero."""
        for peer_id in self._now:
            self._before[peer_id] = self.of(peer_id)
        for peer_id in self._drops_now:
            self._drops_before[peer_id] = self.drops_of(peer_id)
        self._now, self._drops_now = {}, {}

    def __len__(self) -> int:
        """Peers, those of the process there is and those of the processes before each counted."""
        return len(self._before) + len(self._now)

    def of(self, peer_id: str) -> list[int]:
        """The totals of one peer, in that order."""
        return [*map(sum, zip(_NOTHING, *self.parts(peer_id), strict=True))]

    def parts(self, peer_id: str) -> list[list[int]]:
        """What they are the sums of: what the processes before told, and the one there is; often neither did."""
        return [told[peer_id] for told in (self._before, self._now) if peer_id in told]

    def drops_of(self, peer_id: str) -> dict[str, int]:
        """What of its packets was dropped, either way, by reason; without those that are 0."""
        before, now = self._drops_before.get(peer_id, {}), self._drops_now.get(peer_id, {})
        if not before and not now:
            return {}
        return {reason: n for reason in DROPS if (n := before.get(reason, 0) + now.get(reason, 0))}


def drops_with(peer_id: str, slots: Sequence[Traffic]) -> dict[str, int]:
    """What was dropped of one peer's packets over all slots."""
    total: dict[str, int] = {}
    for slot in slots:
        for reason, count in slot.drops_of(peer_id).items():
            total[reason] = total.get(reason, 0) + count
    return total


def traffic_with(peer_id: str, slots: Sequence[Traffic]) -> dict[str, Any]:
    """What went to and from one peer over all slots, as status.Peer has it."""
    parts = [part for slot in slots for part in slot.parts(peer_id)]
    counts = [*map(sum, zip(_NOTHING, *parts, strict=True))]
    *buckets, sum_us = counts[len(TRAFFIC) :]
    rtt = Spread(buckets=tuple(buckets), sum_s=sum_us / 1e6) if sum_us else Spread()
    return {**dict(zip(TRAFFIC, counts, strict=False)), "rtt": rtt}


class ControlSlot:
    """Control, seen from the supervisor: a children.Slot. Owner: supervisor loop.

    `token`: what it joins a network with, until it has.
    """

    title, role, module = "control", "control", "vpnd.control"

    def __init__(self, live: Live, peer_id: str, token: str, *, in_network: bool) -> None:
        """Raises PrivilegeError, MachineError or OSError; nothing is left open then."""
        config = live.config
        self._live, self._peer_id, self._in_network = live, peer_id, in_network
        self.token = token
        #: the configuration its process was started with
        self.given = config
        with contextlib.ExitStack() as closing:
            path = Path(config.state_dir, config.p2p.identity_file)
            self._identity_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            closing.callback(os.close, self._identity_fd)
            self._network_fds: tuple[int, ...] = ()
            if in_network:
                self._network_fds = (statedir.open_network(config),)
                closing.callback(os.close, *self._network_fds)
            self.page, self._page_fd = create_page(CONTROL_COUNTERS, "vpnd-counters-control")
            closing.callback(self.page.close)
            closing.callback(os.close, self._page_fd)
            self._closing = closing.pop_all()

    @property
    def more_time_s(self) -> float:
        """See children.Slot: joining takes others."""
        return self._live.config.membership.join_timeout if self.token else 0.0

    def begin(self) -> tuple[messages.Message, tuple[int, ...]]:
        config = self.given = self._live.config
        os.lseek(self._identity_fd, 0, os.SEEK_SET)  # the offset is shared with the children before
        start = messages.ControlStart(
            config=config,
            node_name=config.node.name,
            peer_id=self._peer_id,
            virtual_ip="" if self._in_network else config.network.virtual_ip,
            token=self.token,
        )
        return start, (self._identity_fd, self._page_fd, *self._network_fds)

    def close(self) -> None:
        """The node stops."""
        self._closing.close()


class ShardSlot:
    """Shard `index`, seen from the supervisor: a children.Slot. Owner: supervisor loop.

    The books, for the way out:  packets_from_tun = packets_sent + dropped + packets_queued. When a process is killed
    what it had taken is gone; `ended` settles the difference as shard_died, so that the sum holds for ever.
    """

    role, module = "shard", "shards"

    def __init__(self, index: int, live: Live, overlay: Overlay, tun: Tun, pump: Pump) -> None:
        self.title, self.more_time_s = f"shard {index}", 0.0
        self._live, self._overlay, self._tun = live, overlay, tun
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

    def begin(self) -> tuple[messages.Message, tuple[int, ...]]:
        """See children.Slot: with a new ring."""
        config = self.given = self._live.config
        own = self.own_given = self._overlay.prefixes
        self._ring = ring.Descriptors.create(config.worker.ring_bytes, f"vpnd-ring-{self.index}")
        self.port = ShardPort(self.index, self._ring)
        start = messages.ShardStart(
            config=config, index=self.index, own=own, tun_offloads=int(self._tun.offloads)
        )
        return start, (*self._ring.all(), self._page_fd, self._tun.fd)

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
        if page.mend():
            log.error("%s: counters with impossible values were reset to 0", self.title)
        counts = page.read()
        done = counts["packets_sent"] + sum(counts[f"dropped_{reason}"] for reason in OUTBOUND_DROPS)
        for name in ("dropped_shard_died", "dropped_packets_shard_died"):
            page.add(name, max(0, self._packets_in - done))
        page.set("packets_from_tun", max(self._packets_in, done))
        for gauge in GAUGES & page.index.keys():
            page.set(gauge, 0)

    def told(self, rows: tuple[PeerTraffic, ...]) -> None:
        """The process tells what went to and from its peers. Raises ProtocolViolation for more peers than there are."""
        self.traffic.told(rows)
        config = self._live.config
        if len(self.traffic) > 4 * (config.membership.max_members + len(config.peers)):
            raise ProtocolViolation("it tells of more peers than this node can have")

    def in_ring(self, taken: int) -> int:
        """(Super)packets given to the shard that it has not taken yet. `taken`: packets_from_tun, from its page."""
        given = self._packets_in + (self.port.packets_in if self.port is not None else 0)
        return max(0, given - taken)

    def ring_use(self) -> dict[str, int]:
        """Bytes in use and size of the ring; nothing is used while there is no process."""
        used = self.port.to_shard.used() if self.port is not None else 0
        size = self.given.worker.ring_bytes if self.given is not None else 0
        return {"used": min(used, size), "size": size}

    def close(self) -> None:
        """The node stops."""
        self.ended()
        self.page.close()
        os.close(self._page_fd)
