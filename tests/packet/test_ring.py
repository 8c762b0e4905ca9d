"""The ring against a deque, its edges, and two real processes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import zlib
from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vpnd.packet import ring

SIZE = 1 << 13


class RingAgainstDeque(RuleBasedStateMachine):
    """Whatever is committed, published and released, the consumer sees what a deque of bytes would give."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptors = ring.Descriptors.create(SIZE, "test")
        self.producer = ring.Producer(self.descriptors)
        self.consumer = ring.Consumer(self.descriptors)
        self.committed: deque[int] = deque()
        self.published: deque[int] = deque()
        self.next = 0

    def teardown(self) -> None:
        self.producer.close()
        self.consumer.close()
        self.descriptors.close()

    @rule(count=st.integers(1, SIZE // 2))
    def produce(self, count: int) -> None:
        full = len(self.committed) + len(self.published) + count > SIZE - ring.SCRATCH
        offset = self.producer.reserve(count)
        assert (offset < 0) == full
        if offset >= 0:
            data = bytes((self.next + i) & 255 for i in range(count))
            self.next += count
            self.producer.buffer[offset : offset + count] = data
            self.producer.commit(count)
            self.committed.extend(data)

    @rule()
    def publish(self) -> None:
        self.producer.publish()
        self.published.extend(self.committed)
        self.committed.clear()

    @rule()
    def rest(self) -> None:
        self.producer.rest()

    @rule(part=st.floats(0, 1), scribble=st.booleans())
    def consume(self, part: float, scribble: bool) -> None:
        start, end = self.consumer.readable()
        if scribble:
            self.consumer.buffer[start - ring.SCRATCH : start] = b"\xee" * ring.SCRATCH
        count = int((end - start) * part)
        assert bytes(self.consumer.buffer[start : start + count]) == bytes(
            self.published.popleft() for _ in range(count)
        )
        self.consumer.release(count)

    @invariant()
    def the_consumer_sees_what_was_published(self) -> None:
        start, end = self.consumer.readable()
        assert bytes(self.consumer.buffer[start:end]) == bytes(self.published)


RingAgainstDeque.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRingAgainstDeque = RingAgainstDeque.TestCase


@pytest.fixture
def sides():
    descriptors = ring.Descriptors.create(SIZE, "test")
    producer, consumer = ring.Producer(descriptors), ring.Consumer(descriptors)
    yield producer, consumer
    producer.close()
    consumer.close()
    descriptors.close()


def signalled(fd: int) -> bool:
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


def test_a_sleeping_consumer_is_woken_once(sides):
    producer, consumer = sides
    assert consumer.sleep()
    producer.commit(1)
    producer.publish()
    producer.publish()
    assert os.eventfd_read(consumer.wake_fd) == 1


def test_an_awake_consumer_costs_no_signal(sides):
    producer, consumer = sides
    producer.commit(1)
    producer.publish()
    assert not signalled(consumer.wake_fd)
    assert not consumer.sleep(), "there is something to read"


@pytest.mark.parametrize("word,value", [(ring.HEAD, 1 << 40), (ring.HEAD, 5)])
def test_an_impossible_head_is_refused(sides, word, value):
    producer, _ = sides
    producer._words[word] = value
    producer.commit(SIZE - ring.SCRATCH)
    with pytest.raises(ring.RingBroken):
        producer.reserve(1)


@pytest.mark.parametrize("tail", [SIZE + 1, 1 << 63])
def test_an_impossible_tail_is_refused(sides, tail):
    _, consumer = sides
    consumer._words[ring.TAIL] = tail
    with pytest.raises(ring.RingBroken):
        consumer.readable()


@pytest.mark.parametrize("size", [1000, 3 << 12, 1 << 11])
def test_a_size_that_cannot_be_mapped_twice_is_refused(size):
    with pytest.raises(ValueError):
        ring.Descriptors.create(size, "test")


def test_two_processes_move_records_with_checksums_and_sleep_in_between():
    """200 MB in records of random lengths through a small ring: the consumer sleeps and is woken all the time."""
    total, seed = 200_000_000, 7
    descriptors = ring.Descriptors.create(1 << 18, "stress")
    child = subprocess.Popen(
        [sys.executable, __file__, *map(str, descriptors.all()), str(total), str(seed)],
        pass_fds=descriptors.all(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        consumer = ring.Consumer(descriptors)
        checksum = received = 0
        while received < total:
            start, end = consumer.readable()
            if start == end:
                if consumer.sleep():
                    wait_for(consumer.wake_fd)
                continue
            checksum = zlib.crc32(consumer.buffer[start:end], checksum)
            received += end - start
            consumer.release(end - start)
        output, _ = child.communicate(timeout=30)
        assert received == total
        assert int(output) == checksum
        consumer.close()
    finally:
        child.kill()
        child.wait()
        descriptors.close()


def wait_for(fd: int) -> None:
    import select

    ready, _, _ = select.select([fd], [], [], 10)
    assert ready, "the wake-up was lost"
    ring.drain(fd)


def produce(descriptors: ring.Descriptors, total: int, seed: int) -> None:
    """The other process of the test above."""
    producer = ring.Producer(descriptors)
    rng = random.Random(seed)
    pattern = memoryview(rng.randbytes(1 << 17))
    checksum = sent = 0
    while sent < total:
        count = min(rng.randrange(1, 1 << 16), total - sent)
        offset = producer.reserve(count)
        if offset < 0:
            producer.publish()
            os.sched_yield()
            continue
        begin = rng.randrange(1 << 16)
        producer.buffer[offset : offset + count] = pattern[begin : begin + count]
        checksum = zlib.crc32(pattern[begin : begin + count], checksum)
        producer.commit(count)
        sent += count
        if rng.random() < 0.5:
            producer.publish()
    producer.publish()
    print(checksum)


if __name__ == "__main__":
    numbers = list(map(int, sys.argv[1:]))
    produce(ring.Descriptors(*numbers[:2]), numbers[2], numbers[3])


def test_a_ring_that_was_busy_gives_its_memory_back() -> None:
    descriptors = ring.Descriptors.create(1 << 20, "test")
    producer, consumer = ring.Producer(descriptors), ring.Consumer(descriptors)

    def pass_on(count: int) -> None:
        offset = producer.reserve(count)
        producer.buffer[offset : offset + count] = b"x" * count
        producer.commit(count)
        producer.publish()

    def held() -> int:
        return os.fstat(descriptors.memory).st_blocks * 512

    pass_on(1 << 19)
    producer.rest()
    producer.rest()
    assert held() > 1 << 19, "not while the consumer has it"
    consumer.release(1 << 19)
    pass_on(1 << 17)
    consumer.release(1 << 17)
    producer.rest()
    assert held() > 1 << 19, "not while it is in use"
    producer.rest()
    assert held() <= ring.HEADER_BYTES
    pass_on(100)
    start, end = consumer.readable()
    assert bytes(consumer.buffer[start:end]) == b"x" * 100
    for side in (producer, consumer, descriptors):
        side.close()
