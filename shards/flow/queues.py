"""Sinks where packets wait that cannot be sent at all for now, in the order they came, whatever flows they are of.

    sink           until                                      bounds
    Pending        the peer has a session                     worker.pending_bytes, buffer_size, pending_timeout
    ReorderBuffer  what was sent on the old lane has arrived  session.hold_bytes, session.drain_timeout

Both give their chunks to `dispatch` when the time has come, which finds each flow's new sink.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from shards.counters import Dropping
from shards.flow.flows import SPAN_BYTES, STAY, Chunk, Flow
from vpnd.config.live import Live


class Queue:
    """Chunks in order. The owner bounds it, and decides what a refused chunk counts as."""

    def __init__(self) -> None:
        self._chunks: deque[Chunk] = deque()
        self.bytes = 0
        self.packets = 0

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def fits(self, size: int, packets: int, most_bytes: int, most_packets: int) -> bool:
        """Whether so much more stays within the bounds."""
        return self.bytes + size <= most_bytes and self.packets + packets <= most_packets

    def put(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self.bytes += len(chunk)
        self.packets += chunk.packets

    def first(self) -> Chunk:
        return self._chunks[0]

    def take(self) -> Chunk:
        chunk = self._chunks.popleft()
        self.bytes -= len(chunk)
        self.packets -= chunk.packets
        return chunk


class Pending:
    """Packets for a peer without a session: a small queue, each chunk for a limited time.

    `want` is called when packets begin to wait: a session is wanted.
    """

    movable_before_s = STAY
    most_bytes = SPAN_BYTES
    holding = False

    def __init__(
        self, live: Live, drops: Dropping, now: Callable[[], float], want: Callable[[], None]
    ) -> None:
        self.flows: set[Flow] = set()
        self.queue = Queue()
        self._live, self._drops, self._now, self._want = live, drops, now, want

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        worker = self._live.config.worker
        if not self.queue:
            self._want()
        if self.queue.fits(end - start, packets, worker.pending_bytes, worker.buffer_size):
            self.queue.put(Chunk(buffer, start, end, packets, self._now()))
        else:
            self._drops.span("no_session", buffer, start, end, packets)

    def flush(self) -> None:
        pass

    def expire(self, now_s: float) -> float | None:
        """Drop what has waited for too long; when to look again, None when nothing waits."""
        timeout_s = self._live.config.worker.pending_timeout
        while self.queue and self.queue.first().since_s + timeout_s <= now_s:
            self.queue.take().drop(self._drops, "no_session")
        return self.queue.first().since_s + timeout_s if self.queue else None

    def drop_all(self, reason: str) -> None:
        """Nobody will come for them."""
        while self.queue:
            self.queue.take().drop(self._drops, reason)

    def empty(self, dispatch: Callable[[Chunk], None]) -> None:
        """There is a session: everything goes on, in order."""
        # Only what is there now: what finds no way after all comes back behind it.
        for _ in range(len(self.queue._chunks)):
            dispatch(self.queue.take())


class ReorderBuffer:
    """Packets of flows that change their lane, held until what they sent before has arrived: order is kept."""

    movable_before_s = STAY
    most_bytes = SPAN_BYTES
    holding = True

    def __init__(self, live: Live, drops: Dropping, now: Callable[[], float]) -> None:
        self.flows: set[Flow] = set()
        self.queue = Queue()
        self._live, self._drops, self._now = live, drops, now

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        if self.queue.bytes + end - start <= self._live.config.session.hold_bytes:
            self.queue.put(Chunk(buffer, start, end, packets, self._now()))
        else:
            self._drops.span("queue_full", buffer, start, end, packets)

    def hold(self, chunk: Chunk) -> None:
        """Take over what waited elsewhere, before anything is submitted: it was within other bounds."""
        self.queue.put(chunk)

    def flush(self) -> None:
        pass

    def empty(self, dispatch: Callable[[Chunk], None]) -> None:
        """Everything has arrived: it goes on, in order."""
        while self.queue:
            dispatch(self.queue.take())
