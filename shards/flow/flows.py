"""Flow workers: the state of one destination IP:port, and the places a flow's packets may go to.

A flow worker is an entry in a table, not a task. It is pinned to one `Sink`: a lane (a stream of a session),
the pending packets of a peer without a session, or a discard sink that counts and drops. When a sink ends, its flows
are unpinned and find a new one with their next packet; what it had not sent is dispatched anew, in order.

States, as told in status:

    active    packets came since the table was last cleaned, and go out as they come
    stalled   its oldest packet has waited for worker.stall_timeout
    draining  held back until what it sent before has arrived (see shards/flow/queues.py)
    idle      no packet since the table was last cleaned; forgotten after worker.idle_timeout
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Protocol

from shards.counters import Counts, Dropping
from shards.stream.spec import MAX_FRAME_PAYLOAD_BYTES
from vpnd.config.live import Live
from vpnd.packet.flow import READ_AHEAD_BYTES
from vpnd.packet.record import LENGTH, LENGTH_BYTES
from vpnd.packet.ring import SCRATCH

#: `Sink.movable_before_s` of a sink whose flows stay.
STAY = float("-inf")
#: `Sink.most_bytes` of a sink that is no lane, and of what waits in one piece.
SPAN_BYTES = MAX_FRAME_PAYLOAD_BYTES
#: Entries of a full table that are looked at for one to forget: enough that it is rarely one in use.
_LOOKED_AT = 8


class Sink(Protocol):
    """Where spans of records go."""

    #: flows pinned here
    flows: set[Flow]
    #: flows whose last packet is older look for a better place with their next one: nothing of theirs is on
    #: its way
    movable_before_s: float
    #: whether packets wait here, or go back, for the sake of order: its flows are not to be forgotten
    holding: bool
    #: the longest span that is submitted at once, unless it is of one record
    most_bytes: int

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        """Take the records in buffer[start:end]. borrowed: until this returns; SCRATCH bytes in front of
        `start` may be overwritten, READ_AHEAD_BYTES behind the last packet's start must be readable."""

    def flush(self) -> None:
        """The end of a batch: let go of what was held together."""


class Chunk:
    """Records that wait, copied out of the ring: buffer[start:end], with SCRATCH bytes in front of them."""

    __slots__ = ("buffer", "end", "packets", "since_s", "start")

    def __init__(self, source: memoryview, start: int, end: int, packets: int, now_s: float) -> None:
        size = end - start
        self.buffer = memoryview(bytearray(SCRATCH + size + READ_AHEAD_BYTES))
        self.buffer[SCRATCH : SCRATCH + size] = source[start:end]
        self.start, self.end = SCRATCH, SCRATCH + size
        self.packets = packets
        self.since_s = now_s

    def __len__(self) -> int:
        return self.end - self.start

    def drop(self, drops: Dropping, reason: str) -> None:
        drops.span(reason, self.buffer, self.start, self.end, self.packets)

    def drop_first(self, drops: Dropping, reason: str) -> int:
        """Leave out the first record, and count it; the bytes it took. Scratch grows by what it was."""
        (count,) = LENGTH.unpack_from(self.buffer, self.start)
        size: int = LENGTH_BYTES + count
        drops.span(reason, self.buffer, self.start, self.start + size, 1)
        self.start += size
        self.packets -= 1
        return size


class Backlog:
    """What waits of one flow in the fair queue of a session; there while something waits, and kept until the
    flow is forgotten. Owner: the fair queue, whose state of the flow (deficit, CoDel) is here too."""

    __slots__ = ("above_s", "bytes", "chunks", "count", "deficit", "drop_s", "dropping", "packets", "queue")

    def __init__(self) -> None:
        self.chunks: deque[Chunk] = deque()
        self.bytes = self.packets = 0
        self.deficit = 0
        self.queue: object | None = None  # the fair queue in whose lists it is
        self.above_s = 0.0  # when dropping begins if the delay stays above the target; 0: it is below
        self.drop_s = 0.0  # when the next packet is dropped
        self.count = 0  # packets dropped since dropping began
        self.dropping = False


class Flow:
    """One flow worker. `last_s`: when a packet of it came, or left the queue it had waited in, last."""

    __slots__ = ("backlog", "dropped", "key", "last_s", "packets", "sink")

    def __init__(self, key: int) -> None:
        self.key = key
        self.packets = self.dropped = 0
        self.last_s = 0.0
        self.sink: Sink | None = None
        self.backlog: Backlog | None = None

    def pin(self, sink: Sink) -> None:
        if self.sink is not None:
            self.sink.flows.discard(self)
        self.sink = sink
        sink.flows.add(self)

    def oldest_s(self) -> float | None:
        """Since when its oldest waiting packet waits; None when none does."""
        backlog = self.backlog
        return backlog.chunks[0].since_s if backlog is not None and backlog.chunks else None


class Discard:
    """A sink that drops, under one reason. `seen(buffer, start, end)` is called before each drop, for those who act on
    demand, with the records; borrowed until it returns."""

    movable_before_s = STAY
    most_bytes = SPAN_BYTES
    holding = False

    def __init__(self, reason: str, drops: Dropping, seen: Callable[[memoryview, int, int], None]) -> None:
        self.flows: set[Flow] = set()
        self._reason, self._drops, self._seen = reason, drops, seen

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        self._seen(buffer, start, end)
        self._drops.span(self._reason, buffer, start, end, packets)

    def flush(self) -> None:
        pass


class FlowTable:
    """All flow workers of a shard. `sink_for(key)` finds the sink for a flow. Owner: shard loop."""

    def __init__(self, live: Live, sink_for: Callable[[int], Sink], counts: Counts) -> None:
        self.flows: dict[int, Flow] = {}
        self._live, self._sink_for, self._counts = live, sink_for, counts
        #: how many flows were in each state when they were last counted
        self.states = {"active": 0, "idle": 0, "stalled": 0, "draining": 0}
        self._cleaned_s = 0.0

    def open(self, key: int, now_s: float) -> Flow:
        """The flow worker for a key that is not in `flows`, whose sink has ended, or that may move."""
        flow = self.flows.get(key)
        if flow is not None and flow.sink is not None and flow.oldest_s() is not None:
            return flow  # it may not move: what waits of it has not been sent
        sink = self._sink_for(key)
        if flow is None:
            if len(self.flows) >= self._live.config.worker.max_flows:
                self._make_room()
            flow = self.flows[key] = Flow(key)
            flow.last_s = now_s
            self._counts.flows_created += 1
        elif flow.sink is not None and sink is not flow.sink:
            self._counts.flows_moved += 1
        if flow.sink is not sink:
            flow.pin(sink)
        return flow

    def pinned(self, key: int, sink: Sink, now_s: float) -> Flow:
        """The flow worker for a key, on `sink` from now on if it was not."""
        flow = self.flows.get(key) or self.open(key, now_s)
        if flow.sink is not sink:
            flow.pin(sink)
        return flow

    def forget_idle(self, now_s: float) -> None:
        """Forget the flows that were idle for worker.idle_timeout."""
        before_s = now_s - self._live.config.worker.idle_timeout
        for flow in [flow for flow in self.flows.values() if flow.last_s < before_s]:
            self._remove(flow)
        self.count_states(now_s)
        self._cleaned_s = now_s

    def count_states(self, now_s: float) -> None:
        """Bring `states` up to date. Every flow is looked at: not for the packet path, nor many times a second."""
        stalled_s = now_s - self._live.config.worker.stall_timeout
        self.states = dict.fromkeys(self.states, 0)
        for flow in self.flows.values():
            self.states[self._state(flow, stalled_s)] += 1

    def _state(self, flow: Flow, stalled_s: float) -> str:
        if flow.sink is not None and flow.sink.holding:
            return "draining"
        oldest_s = flow.oldest_s()
        if oldest_s is not None and oldest_s <= stalled_s:
            return "stalled"
        return "active" if flow.last_s >= self._cleaned_s else "idle"

    def _make_room(self) -> None:
        """The table is full: of the next few in turn, the one longest without a packet goes. All get to the
        end of the line, so that a flow that is alive is looked at once a round and a flood of new ones costs
        a few steps each."""
        flows = self.flows
        longest: Flow | None = None
        for key in list(itertools.islice(flows, _LOOKED_AT)):
            flow = flows[key] = flows.pop(key)
            if not _waits(flow) and (longest is None or flow.last_s < longest.last_s):
                longest = flow
        if longest is not None:
            self._remove(longest)

    def _remove(self, flow: Flow) -> None:
        if _waits(flow):
            return  # it is not over, and a new worker of the same flow would overtake what waits
        del self.flows[flow.key]
        if flow.sink is not None:
            flow.sink.flows.discard(flow)
        self._counts.flows_reaped += 1


def _waits(flow: Flow) -> bool:
    """Whether something of it waits to be sent, or may."""
    return flow.oldest_s() is not None or (flow.sink is not None and flow.sink.holding)


def unpin(sink: Sink, flows: set[Flow] | None = None) -> None:
    """A sink has ended, or may no longer be the right one for these flows: they look for a new one with their
    next packet."""
    leaving = list(sink.flows) if flows is None else sink.flows & flows
    for flow in leaving:
        flow.sink = None
    sink.flows.difference_update(leaving)
