"""A packet's life, in the shard, outbound: from the ring to the sessions.

    1. read from the TUN into a ring              (supervisor/pump.py)
    2. flow key → shard, publish                  (supervisor/pump.py)
    3. records → flow → span of a lane      *     per record
    4. seal, send                           *     per span: Lane.submit; per batch: Lane.flush

Consecutive records that go to the same sink are one span: sealed in one call, in place, without being
copied. A span is cut where it would no longer fit into one Noise message, so that a record lies in two
messages only if it must.
"""

from __future__ import annotations

from collections.abc import Callable

from shards.flow.flows import Chunk, Flow, FlowTable, Sink
from shards.stream.spec import MAX_FRAME_PAYLOAD_BYTES
from vpnd.packet.flow import key_of
from vpnd.packet.record import LENGTH, LENGTH_BYTES, MIN_PACKET_BYTES, PACKET_OFFSET, VNET_BYTES
from vpnd.packet.ring import Consumer, RingBroken


class Outbound:
    """Stage 3. Owner: shard loop. Raises RingBroken for what cannot be records."""

    def __init__(self, flows: FlowTable, now: Callable[[], float], batch_bytes: int) -> None:
        self._flows, self._now = flows, now
        self._batch_bytes = batch_bytes
        self.packets = self.bytes = 0

    def run(self, consumer: Consumer) -> bool:
        """Everything in the ring, at most a batch. True when there may be more."""
        start, end = consumer.readable()
        if start == end:
            return False
        stop = min(end, start + self._batch_bytes)
        position, packets = self._dispatch(consumer.buffer, start, stop, end)
        consumer.release(position - start)
        self.packets += packets
        self.bytes += position - start - packets * PACKET_OFFSET
        return position < end

    def dispatch(self, chunk: Chunk) -> None:
        """Records that had waited, to where their flows go now; not counted again."""
        self._dispatch(chunk.buffer, chunk.start, chunk.end, chunk.end)

    def _dispatch(self, buffer: memoryview, start: int, stop: int, end: int) -> tuple[int, int]:
        """The records that begin in buffer[start:stop], none of which may go beyond `end`: where they end,
        how many."""
        length_at = LENGTH.unpack_from
        find, reopen = self._flows.flows.get, self._flows.open
        now_s = self._now()
        position = span = start
        sink: Sink | None = None
        last: Flow | None = None
        in_span = packets = 0
        touched: list[Sink] = []  # one or two, nearly always
        while position < stop:
            (count,) = length_at(buffer, position)
            following = position + LENGTH_BYTES + count
            if following > end or count < VNET_BYTES + MIN_PACKET_BYTES:
                raise RingBroken(f"a record of {count} bytes, {end - position - LENGTH_BYTES} are there")
            key = key_of(buffer, position + PACKET_OFFSET, count - VNET_BYTES)
            flow = find(key)
            if flow is not last:
                if flow is None or flow.sink is None or flow.last_s < flow.sink.movable_before_s:
                    flow = reopen(key, now_s)
                last = flow
            elif flow is None or flow.sink is None:  # its sink has ended while a span was submitted
                flow = last = reopen(key, now_s)
            flow.packets += 1
            flow.last_s = now_s
            if flow.sink is not sink or following - span > MAX_FRAME_PAYLOAD_BYTES:
                if sink is not None and in_span:
                    sink.submit(buffer, span, position, in_span)
                    if sink not in touched:
                        touched.append(sink)
                    if flow.sink is None:  # the sink of both has ended with that
                        flow = last = reopen(key, now_s)
                sink, span, in_span = flow.sink, position, 0
            in_span += 1
            packets += 1
            position = following
        if sink is not None:
            sink.submit(buffer, span, position, in_span)
            if sink not in touched:
                touched.append(sink)
        for each in touched:
            each.flush()
        return position, packets
