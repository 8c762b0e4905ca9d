"""From the ring to the sinks: how much at a time."""

from __future__ import annotations

import math

import pytest
from queue_harness import live

from shards.flows import STAY, Flow, FlowTable
from shards.outbound import Outbound
from vpnd.packet import ring
from vpnd.packet.record import LENGTH, LENGTH_BYTES, VNET_BYTES

RING_BYTES = 1 << 19
PACKET = b"\x45" + bytes(15) + bytes((10, 86, 0, 2)) + bytes(980)
RECORD_BYTES = LENGTH_BYTES + VNET_BYTES + len(PACKET)
RECORDS = 300


class Counting:
    """A sink."""

    holding = False
    movable_before_s = STAY

    def __init__(self) -> None:
        self.flows: set[Flow] = set()
        self.packets = 0

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        self.packets += packets

    def flush(self) -> None:
        pass


def filled() -> tuple[ring.Producer, ring.Consumer]:
    descriptors = ring.Descriptors.create(RING_BYTES, "test")
    producer, consumer = ring.Producer(descriptors), ring.Consumer(descriptors)
    for _ in range(RECORDS):
        offset = producer.reserve(RECORD_BYTES)
        LENGTH.pack_into(producer.buffer, offset, VNET_BYTES + len(PACKET))
        start = offset + LENGTH_BYTES + VNET_BYTES
        producer.buffer[start : start + len(PACKET)] = PACKET
        producer.commit(RECORD_BYTES)
    producer.publish()
    descriptors.close()
    return producer, consumer


@pytest.mark.setting("worker.batch_bytes")
@pytest.mark.parametrize("batch_bytes", [1 << 16, 1 << 17, 1 << 20])
def test_a_batch_is_so_much_of_the_ring_and_the_rest_comes_next(batch_bytes: int) -> None:
    first = min(RECORDS, math.ceil(batch_bytes / RECORD_BYTES))
    producer, consumer = filled()
    sink, settings = Counting(), live(worker={"batch_bytes": batch_bytes})
    outbound = Outbound(FlowTable(settings, lambda version, address: sink), settings, lambda: 1.0)
    assert outbound.run(consumer) == (first < RECORDS)
    assert sink.packets == first
    while outbound.run(consumer):
        pass
    assert sink.packets == RECORDS == outbound.packets
    assert outbound.bytes == RECORDS * len(PACKET)
    producer.close()
    consumer.close()
