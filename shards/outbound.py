"""A packet's life, in the shard, outbound: from the ring to the sessions.

    1. read from the TUN into a ring              (supervisor/pump.py)
    2. flow key → shard, publish                  (supervisor/pump.py)
    3. records → flow → span of a lane      *     per record
    4. seal, send                           *     per span: Lane.submit; per batch: Lane.flush

Consecutive records that go to the same sink are one span, as far as the sink takes it at once: sealed in place, without
being copied. Where it does not fit into one Noise message it is cut between records, so that a record lies in two
messages only if it must (`survey`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from shards.counters import Counts
from shards.flow.flows import Chunk, Flow, FlowTable, Sink
from vpnd.packet.flow import key_of
from vpnd.packet.record import LENGTH, LENGTH_BYTES, MIN_PACKET_BYTES, PACKET_OFFSET, VNET_BYTES
from vpnd.packet.ring import Consumer, RingBroken


class Outbound:
    """Stage 3. Owner: shard loop. Raises RingBroken for what cannot be records.

    A batch is never begun within another. What a batch finds out on its way, that a session has ended, or that
    its sink takes a span no more, is left for its end (`after_batch`, `dispatch`), or for the next turn of the loop
    where there is no batch. No packet comes in between: `run` sees to what is left before it begins.
    """

    def __init__(self, flows: FlowTable, counts: Counts, now: Callable[[], float], batch_bytes: int) -> None:
        self.flows, self._counts, self._now = flows, counts, now
        self._batch_bytes = batch_bytes
        self._loop = asyncio.get_running_loop()
        self._steps: list[Callable[[], None]] = []
        self._chunks: list[Chunk] = []
        self._unsettled = False
        #: `when_due` is called before packets are sent, once it is `due_s`; it sets another time
        self.due_s, self.when_due = math.inf, lambda: None

    def run(self, consumer: Consumer) -> bool:
        """Everything in the ring, at most a batch. True when there may be more."""
        start, end = consumer.readable()
        if start == end:
            return False
        if self._unsettled:
            self.settle()
        stop = min(end, start + self._batch_bytes)
        position, packets = self._send(consumer.buffer, start, stop, end)
        consumer.release(position - start)
        counts = self._counts
        counts.batches += 1
        counts.packets_from_tun += packets
        counts.bytes_from_tun += position - start - packets * PACKET_OFFSET
        if self._unsettled:
            self.settle()
        return position < end

    def dispatch(self, chunk: Chunk) -> None:
        """Records that had waited, to where their flows go by the end of the batch: in the order they were given here,
        and before anything newer. They are not counted again."""
        self._chunks.append(chunk)
        self._settle_soon()

    def after_batch(self, step: Callable[[], None]) -> None:
        """Call `step` at the end of the batch: what it dispatches goes before all that was dispatched until then."""
        self._steps.append(step)
        self._settle_soon()

    def waiting(self) -> int:
        """Packets that were dispatched and not yet sent to their sinks."""
        return sum(chunk.packets for chunk in self._chunks)

    def _settle_soon(self) -> None:
        if not self._unsettled:
            self._unsettled = True
            self._loop.call_soon(self.settle)

    def settle(self) -> None:
        """The end of a batch. Each round may end sessions, and so bring about another one: there are as many at
        most."""
        while self._steps or self._chunks:
            # What a session that has ended still held is older than what it could not take any more.
            steps, self._steps = self._steps, []
            newer, self._chunks = self._chunks, []
            for step in steps:
                step()
            chunks, self._chunks = self._chunks + newer, []
            for chunk in chunks:
                self._send(chunk.buffer, chunk.start, chunk.end, chunk.end)
        self._unsettled = False

    def _send(self, buffer: memoryview, start: int, stop: int, end: int) -> tuple[int, int]:
        """The records that begin in buffer[start:stop], none of which may go beyond `end`: where they end,
        how many."""
        now_s = self._now()
        if now_s >= self.due_s:
            self.when_due()
        length_at = LENGTH.unpack_from
        find, reopen = self.flows.flows.get, self.flows.open
        position = span = start
        sink: Sink | None = None
        last: Flow | None = None
        packets = before_flow = before_span = most = 0
        touched: list[Sink] = []  # one or two, nearly always
        while position < stop:
            (count,) = length_at(buffer, position)
            following = position + LENGTH_BYTES + count
            if following > end or count < VNET_BYTES + MIN_PACKET_BYTES:
                raise RingBroken(f"a record of {count} bytes, {end - position - LENGTH_BYTES} are there")
            key = key_of(buffer, position + PACKET_OFFSET, count - VNET_BYTES)
            flow = find(key)
            if flow is not last or flow is None:
                if last is not None:
                    last.packets += packets - before_flow
                if flow is None or flow.sink is None or flow.last_s < flow.sink.movable_before_s:
                    flow = reopen(key, now_s)
                flow.last_s = now_s
                last, before_flow = flow, packets
            if flow.sink is not sink or following - span > most:
                if sink is not None:
                    sink.submit(buffer, span, position, packets - before_span)
                    if sink not in touched:
                        touched.append(sink)
                sink, span, before_span = flow.sink, position, packets
                most = sink.most_bytes if sink is not None else 0
            packets += 1
            position = following
        if last is not None:
            last.packets += packets - before_flow
        if sink is not None:
            sink.submit(buffer, span, position, packets - before_span)
            if sink not in touched:
                touched.append(sink)
        for each in touched:
            each.flush()
        return position, packets
