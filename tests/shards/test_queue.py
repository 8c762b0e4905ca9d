"""The bounded queue of a link and of the waiting room."""

from __future__ import annotations

import pytest

from shards.flows import Chunk, Queue
from vpnd.packet.ring import SCRATCH


def chunk(size: int, packets: int) -> Chunk:
    return Chunk(memoryview(bytes(SCRATCH + size)), SCRATCH, SCRATCH + size, packets, 0.0)


BOUNDS = [
    ("bytes are the bound", 100, 1000, [(60, 1), (40, 1), (1, 1)], [True, True, False]),
    ("packets are the bound", 1000, 3, [(10, 2), (10, 1), (10, 1)], [True, True, False]),
    (
        "what is smaller still fits",
        100,
        9,
        [(80, 1), (30, 1), (20, 1)],
        [True, False, True],
    ),
    ("nothing fits into no room", 0, 9, [(1, 1)], [False]),
]


@pytest.mark.parametrize(
    "sentence,most_bytes,most_packets,chunks,taken", BOUNDS, ids=[row[0] for row in BOUNDS]
)
def test_a_queue_refuses_what_is_over_its_bounds(sentence, most_bytes, most_packets, chunks, taken):
    queue = Queue(most_bytes, most_packets)
    assert [queue.put(chunk(*each)) for each in chunks] == taken
    held = [each for each, was in zip(chunks, taken, strict=True) if was]
    assert (queue.bytes, queue.packets) == (sum(size for size, _ in held), sum(count for _, count in held))
    for size, count in held:
        first = queue.take()
        assert (len(first), first.packets) == (size, count)
    assert not queue and queue.bytes == queue.packets == 0


def test_a_chunk_keeps_the_records_and_has_scratch_in_front():
    source = memoryview(bytes(range(64)))
    kept = Chunk(source, 20, 50, 1, 0.0)
    assert bytes(kept.buffer[SCRATCH:]) == bytes(range(20, 50))
    kept.buffer[:SCRATCH] = b"!" * SCRATCH
    assert bytes(kept.buffer[SCRATCH:]) == bytes(range(20, 50))
