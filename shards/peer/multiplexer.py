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

from shards.counters import Traffic
from shards.flow.flows import STAY
from shards.peer.carrier import Carrier, Lane
from shards.peer.pool import StreamPool
from vpnd.config.live import Live


class _Load:
    """What a session has carried up to the last measurement, and between the last two."""

    __slots__ = ("beside", "busy", "carried", "delayed", "recent")

    def __init__(self) -> None:
        self.carried = self.recent = self.beside = 0
        self.busy = self.delayed = False


class Multiplexer:
    """Owner: the peer's `Peer`, on the shard's loop. `draw(n)`: a random number below n."""

    def __init__(self, live: Live, pool: StreamPool, draw: Callable[[int], int]) -> None:
        self._live, self._pool, self._draw = live, pool, draw
        self._loads: dict[Carrier, _Load] = {}
        #: when traffic with the peer was last seen by `rebalance`
        self.used_s = 0.0
        self._busy_s = 0.0

    def pick(self) -> Lane | None:
        """The lane for a flow; None when the peer has none."""
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
        load = self._loads.get(lane.carrier)
        recent = load.recent if load is not None else 0
        return lane.carrier.load() + recent, len(lane.flows)

    def rebalance(self, now_s: float) -> None:
        """Measure load, scale, let small flows move. Every multiplexer.auto_scaling_interval."""
        pool = self._pool
        carriers = pool.usable()
        self._loads = {carrier: self._loads.get(carrier) or _Load() for carrier in carriers}
        for carrier, load in self._loads.items():
            self._measure(carrier, load)
        if any(load.recent for load in self._loads.values()):
            self.used_s = now_s
        if not carriers:
            return
        calm = [carrier for carrier, load in self._loads.items() if not load.busy and not load.delayed]
        if len(calm) < len(carriers):
            self._busy_s = now_s
        if not calm:
            self._grow(carriers)
        elif len(calm) == len(carriers):
            self._shrink(now_s, carriers)
        for carrier, load in self._loads.items():
            if load.busy and calm:
                carrier.barrier(lambda sent_s, carrier=carrier: _allow_moves(carrier, sent_s))  # type: ignore[misc]
            else:
                _allow_moves(carrier, STAY)

    def _measure(self, carrier: Carrier, load: _Load) -> None:
        settings = self._live.config.multiplexer
        traffic, least_s = carrier.traffic(), carrier.least_delay_s()
        carried = traffic.bytes_sent + traffic.bytes_received
        load.recent = carried - load.carried
        # What goes in datagrams another session would not make faster.
        in_datagrams = carrier.beside.traffic() if carrier.beside is not None else Traffic()
        beside = in_datagrams.bytes_sent + in_datagrams.bytes_received
        load.busy = load.recent - (beside - load.beside) >= settings.busy_bytes
        load.beside = beside
        load.delayed = least_s is not None and least_s >= settings.scale_up_delay
        load.carried = carried

    def _grow(self, carriers: list[Carrier]) -> None:
        pool, config = self._pool, self._live.config
        if (
            pool.streams() + sum(carrier.opening for carrier in carriers)
            >= config.stream_pool.max_streams_per_peer
        ):
            return
        if len(carriers) < config.multiplexer.max_sessions:
            if pool.scaled <= len(carriers):
                pool.scaled = len(carriers) + 1
                pool.tell_wanted(urgent=False)
        elif any(load.delayed for load in self._loads.values()) and not any(
            carrier.opening for carrier in carriers
        ):
            pool.open_one(carriers)

    def _shrink(self, now_s: float, carriers: list[Carrier]) -> None:
        """No session is busy: want the minimum again once more were not needed for stream_pool.idle_timeout."""
        pool, config = self._pool, self._live.config
        added_s = max(carrier.opened_s for carrier in carriers)
        if (
            pool.scaled > config.multiplexer.min_sessions
            and now_s - max(added_s, self._busy_s) >= config.stream_pool.idle_timeout
        ):
            pool.scaled = config.multiplexer.min_sessions
            pool.tell_wanted(urgent=False)


def _allow_moves(carrier: Carrier, before_s: float) -> None:
    """Flows of this session that were silent since `before_s` may go elsewhere."""
    for lane in carrier.lanes:
        lane.movable_before_s = before_s
