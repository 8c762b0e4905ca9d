"""The multiplexer of one peer: which lane a flow gets, and when there should be more of them.

pick      Of two lanes drawn at random, the one with less ahead of the next packet (power of two choices:
          nearly as even as looking at all, and neighbours do not all run to the same one). A flow then stays
          there.
scale     Every multiplexer.auto_scaling_interval: where packets had to wait all through the interval, or
          every session is busy, one more session, and when there may be no more of those, one more stream,
          within the limits. Idle ones the pool closes.
move      Small flows leave a busy session when another one is not: with the next packet that comes after
          everything they sent before is known to have arrived, so none is overtaken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shards.flow.flows import STAY
from shards.peer.pool import StreamPool
from vpnd.config.live import Live

if TYPE_CHECKING:
    from shards.session.lane import Lane
    from shards.session.link import Link


class _Load:
    """What a session has done up to the last look at it, and between the last two."""

    __slots__ = ("busy", "carried", "delayed", "recent", "sent", "waited")

    def __init__(self) -> None:
        self.carried = self.sent = self.waited = self.recent = 0
        self.busy = self.delayed = False


class Multiplexer:
    """Owner: the peer's `Peer`, on the shard's loop. `draw(n)`: a random number below n."""

    def __init__(self, live: Live, pool: StreamPool, draw: Callable[[int], int]) -> None:
        self._live, self._pool, self._draw = live, pool, draw
        self._loads: dict[Link, _Load] = {}
        #: when something went to or came from the peer, as far as `look` has seen
        self.used_s = 0.0
        self._busy_s = 0.0

    def pick(self) -> Lane | None:
        """The lane for a flow; None when there is none."""
        lanes = self._pool.lanes()
        if not lanes:
            return None
        if len(lanes) == 1:
            return lanes[0]
        first = self._draw(len(lanes))
        second = self._draw(len(lanes) - 1)
        if second >= first:
            second += 1
        return min(lanes[first], lanes[second], key=self._ahead)

    def _ahead(self, lane: Lane) -> tuple[int, int]:
        load = self._loads.get(lane.link)
        recent = load.recent if load is not None else 0
        return lane.link.load() + recent, len(lane.flows)

    def look(self, now_s: float) -> None:
        """The periodic look at load. Every multiplexer.auto_scaling_interval."""
        pool = self._pool
        links = pool.usable()
        self._loads = {link: self._loads.get(link) or _Load() for link in links}
        for link, load in self._loads.items():
            self._measure(link, load)
        if any(load.recent for load in self._loads.values()):
            self.used_s = now_s
        if not links:
            return
        calm = [link for link, load in self._loads.items() if not load.busy and not load.delayed]
        if len(calm) < len(links):
            self._busy_s = now_s
        if not calm:
            self._grow(links)
        elif len(calm) == len(links):
            self._shrink(now_s, links)
        for link, load in self._loads.items():
            if load.busy and calm:
                link.barrier(lambda sent_s, link=link: _let_go(link, sent_s))  # type: ignore[misc]
            else:
                _let_go(link, STAY)

    def _measure(self, link: Link, load: _Load) -> None:
        settings = self._live.config.multiplexer
        carried = link.bytes_sent + link.received()[1]
        load.recent = carried - load.carried
        load.busy = load.recent >= settings.busy_bytes
        direct = (link.packets_sent - load.sent) - (link.waited - load.waited)
        least_s = link.queue.window()
        load.delayed = not direct and least_s is not None and least_s >= settings.scale_up_delay
        load.carried, load.sent, load.waited = carried, link.packets_sent, link.waited

    def _grow(self, links: list[Link]) -> None:
        pool, config = self._pool, self._live.config
        if pool.streams() + sum(link.opening for link in links) >= config.stream_pool.max_streams_per_peer:
            return
        if len(links) < config.multiplexer.max_sessions:
            if pool.scaled <= len(links):
                pool.scaled = len(links) + 1
                pool.tell_wanted(urgent=False)
        elif any(load.delayed for load in self._loads.values()) and not any(link.opening for link in links):
            pool.open_one(links)

    def _shrink(self, now_s: float, links: list[Link]) -> None:
        """Nothing is busy: what was added goes back to the minimum when it has not been needed for a while."""
        pool, config = self._pool, self._live.config
        added_s = max(link.opened_s for link in links)
        if (
            pool.scaled > config.multiplexer.min_sessions
            and now_s - max(added_s, self._busy_s) >= config.stream_pool.idle_timeout
        ):
            pool.scaled = config.multiplexer.min_sessions
            pool.tell_wanted(urgent=False)


def _let_go(link: Link, before_s: float) -> None:
    """Flows of this session that were silent since `before_s` may go elsewhere."""
    for lane in link.lanes.values():
        lane.movable_before_s = before_s
