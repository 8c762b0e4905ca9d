"""A packet's life, in the shard, outbound: from the ring to the sessions.

    1. read from the TUN into a ring              (supervisor/pump.py)
    2. flow key → shard, publish                  (supervisor/pump.py)
    3. records → flow → span of a peer      *     per record
    4. seal, send                           *     per span: Link.submit; per batch: Link.flush

Consecutive records that go to the same sink are one span: sealed in one call, in place, without being
copied. A span is cut where it would no longer fit into one Noise message, so that a record lies in two
messages only if it must.
"""

from __future__ import annotations

from collections.abc import Callable

from shards.flows import FlowTable, Sink
from shards.stream.spec import MAX_FRAME_PAYLOAD_BYTES
from vpnd.packet.flow import key_of
from vpnd.packet.record import LENGTH, LENGTH_BYTES, MIN_PACKET_BYTES, PACKET_OFFSET, VNET_BYTES
from vpnd.packet.ring import Consumer, RingBroken


class Outbound:
    """Stage 3. Owner: shard loop."""

    def __init__(
        self, consumer: Consumer, flows: FlowTable, now: Callable[[], float], batch_bytes: int
    ) -> None:
        self._consumer, self._flows, self._now = consumer, flows, now
        self._batch_bytes = batch_bytes
        self.packets = self.bytes = 0

    def run(self) -> bool:
        """Everything in the ring, at most a batch. True when there may be more. Raises RingBroken."""
        consumer = self._consumer
        start, end = consumer.readable()
        if start == end:
            return False
        buffer, length_at = consumer.buffer, LENGTH.unpack_from
        find, reopen = self._flows.flows.get, self._flows.open
        now_s = self._now()
        stop = min(end, start + self._batch_bytes)
        position = span = start
        sink: Sink | None = None
        in_span = packets = 0
        touched: list[Sink] = []  # one or two, nearly always
        while position < stop:
            (count,) = length_at(buffer, position)
            following = position + LENGTH_BYTES + count
            if following > end or count < VNET_BYTES + MIN_PACKET_BYTES:
                raise RingBroken(f"a record of {count} bytes, {end - position - LENGTH_BYTES} are there")
            key = key_of(buffer, position + PACKET_OFFSET, count - VNET_BYTES)
            flow = find(key)
            if flow is None or flow.sink is None:
                flow = reopen(key, now_s)
            flow.packets += 1
            flow.last_s = now_s
            if flow.sink is not sink or following - span > MAX_FRAME_PAYLOAD_BYTES:
                if sink is not None and in_span:
                    sink.submit(buffer, span, position, in_span)
                    if sink not in touched:
                        touched.append(sink)
                sink, span, in_span = flow.sink, position, 0
            in_span += 1
            packets += 1
            position = following
        if sink is not None:
            sink.submit(buffer, span, position, in_span)
            if sink not in touched:
                touched.append(sink)
        consumer.release(position - start)
        for each in touched:
            each.flush()
        self.packets += packets
        self.bytes += position - start - packets * PACKET_OFFSET
        return position < end
