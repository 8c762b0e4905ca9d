"""Flow workers: the state of one destination IP:port, and the places a flow's packets may go to.

A flow worker is an entry in a table, not a task. It is pinned to one `Sink`: a link (a session's stream),
the waiting room of a peer without a session, or a drain that counts and drops. When a sink ends, its flows
are unpinned and find a new one with their next packet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from vpnd.metrics import DROP_REASONS
from vpnd.packet.flow import destination_of
from vpnd.packet.ring import SCRATCH


class Sink(Protocol):
    """Where spans of records go."""

    #: flows pinned here
    flows: set[Flow]

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        """Take the records in buffer[start:end]. borrowed: until this returns; SCRATCH bytes in front of
        `start` may be overwritten."""

    def flush(self) -> None:
        """The end of a batch: let go of what was held together."""


class Flow:
    """One flow worker. `last_s` is the loop's time of its last packet."""

    __slots__ = ("key", "last_s", "packets", "sink")

    def __init__(self, key: int, sink: Sink) -> None:
        self.key = key
        self.packets = 0
        self.last_s = 0.0
        self.sink: Sink | None = sink
        sink.flows.add(self)

    def pin(self, sink: Sink) -> None:
        """From now on packets go to `sink`."""
        if self.sink is not None:
            self.sink.flows.discard(self)
        self.sink = sink
        sink.flows.add(self)


class Drain:
    """A sink that drops, under one reason."""

    def __init__(self, reason: str, drops: dict[str, int]) -> None:
        self.flows: set[Flow] = set()
        self._reason, self._drops = reason, drops

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        self._drops[self._reason] += packets

    def flush(self) -> None:
        pass


class Chunk:
    """Records that wait, copied out of the ring: `buffer[SCRATCH:]`.

    The scratch in front of the span is copied with it, whatever it holds: cheaper than zeroing the room first.
    """

    __slots__ = ("buffer", "packets", "since_s")

    def __init__(self, source: memoryview, start: int, end: int, packets: int, now_s: float) -> None:
        self.buffer = memoryview(bytearray(source[start - SCRATCH : end]))
        self.packets = packets
        self.since_s = now_s

    def __len__(self) -> int:
        return len(self.buffer) - SCRATCH


class Queue:
    """Chunks in order, bounded in bytes and packets. The owner decides what a refused chunk counts as."""

    def __init__(self, most_bytes: int, most_packets: int) -> None:
        self._most_bytes, self._most_packets = most_bytes, most_packets
        self._chunks: deque[Chunk] = deque()
        self.bytes = 0
        self.packets = 0

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def put(self, chunk: Chunk) -> bool:
        """False when it does not fit: nothing was queued."""
        if self.bytes + len(chunk) > self._most_bytes or self.packets + chunk.packets > self._most_packets:
            return False
        self._chunks.append(chunk)
        self.bytes += len(chunk)
        self.packets += chunk.packets
        return True

    def first(self) -> Chunk:
        return self._chunks[0]

    def take(self) -> Chunk:
        chunk = self._chunks.popleft()
        self.bytes -= len(chunk)
        self.packets -= chunk.packets
        return chunk


class Waiting:
    """The waiting room of a peer without a session: a small queue, each chunk for a limited time.

    `want` is called when packets begin to wait: a session is wanted.
    """

    def __init__(
        self, queue: Queue, drops: dict[str, int], now: Callable[[], float], want: Callable[[], None]
    ) -> None:
        self.flows: set[Flow] = set()
        self.queue = queue
        self._drops, self._now, self._want = drops, now, want

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        if not self.queue:
            self._want()
        if not self.queue.put(Chunk(buffer, start, end, packets, self._now())):
            self._drops["no_session"] += packets

    def flush(self) -> None:
        pass

    def expire(self, before_s: float) -> None:
        """Drop what has waited since before `before_s`."""
        while self.queue and self.queue.first().since_s <= before_s:
            self._drops["no_session"] += self.queue.take().packets

    def empty_into(self, sink: Sink) -> None:
        """There is a session: everything goes on, in order."""
        while self.queue:
            chunk = self.queue.take()
            sink.submit(chunk.buffer, SCRATCH, len(chunk.buffer), chunk.packets)


class FlowTable:
    """All flow workers of a shard. `place` finds the sink for a destination. Owner: shard loop."""

    def __init__(
        self, most_flows: int, idle_timeout_s: float, place: Callable[[int, int], Sink], drops: dict[str, int]
    ) -> None:
        self.flows: dict[int, Flow] = {}
        self._most, self._idle_timeout_s, self._place = most_flows, idle_timeout_s, place
        self.created = self.reaped = 0

    def open(self, key: int, now_s: float) -> Flow:
        """The flow worker for a key that is not in `flows`, or whose sink has ended (None)."""
        flow = self.flows.get(key)
        sink = self._place(*destination_of(key))
        if flow is not None:
            flow.pin(sink)
            return flow
        if len(self.flows) >= self._most:
            self.reap(now_s)
        if len(self.flows) >= self._most:  # all alive: the one that has been there longest goes
            self._remove(next(iter(self.flows.values())))
        flow = self.flows[key] = Flow(key, sink)
        flow.last_s = now_s
        self.created += 1
        return flow

    def reap(self, now_s: float) -> None:
        """Forget the flows that were idle for worker.idle_timeout."""
        before_s = now_s - self._idle_timeout_s
        for flow in [flow for flow in self.flows.values() if flow.last_s < before_s]:
            self._remove(flow)

    def _remove(self, flow: Flow) -> None:
        del self.flows[flow.key]
        if flow.sink is not None:
            flow.sink.flows.discard(flow)
        self.reaped += 1


def unpin(sink: Sink) -> None:
    """A sink has ended, or may no longer be the right one: its flows look for a new one with their next packet."""
    for flow in sink.flows:
        flow.sink = None
    sink.flows.clear()


def new_drops() -> dict[str, int]:
    """A zero for every drop reason."""
    return dict.fromkeys(DROP_REASONS, 0)
