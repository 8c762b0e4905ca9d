"""Moves records through vpnd.packet.ring between two real processes and checks every byte of every record.

The producer is this process, the consumer a fresh interpreter. Records have random lengths, from the least
packet to superpackets, and both sides pause at random, so that the ring runs full and empty and both kinds of
sleep and wake-up happen all the time. Three habits aim at the mistakes a ring can have: a ring found full is
filled to its last byte, where the consumer's scratch begins; the consumer overwrites its scratch; and between
batches single records go across, each only when the one before was released, so that the next one comes just
when the consumer is about to sleep. A wake-up not there within LOST_AFTER_S is reported as lost.

    length u32 | sequence number u64 | CRC-32 of the rest u32 | the rest       all big-endian, no padding
"""

from __future__ import annotations

import json
import os
import random
import select
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass

from vpnd.packet.record import MAX_PACKET_BYTES, MIN_PACKET_BYTES
from vpnd.packet.ring import SCRATCH, Consumer, Descriptors, Producer, drain

from .node import ROOT

HEADER = struct.Struct(">IQI")
#: In the place of a length: no more records.
END = 0
LOST_AFTER_S = 5.0
TEMPLATES = 4096
#: A batch ends after at most so many records, as a pump's does.
MOST_BATCH = 64
#: One batch in so many is followed by a pause.
PAUSE_EVERY = 400
PAUSE_S = 0.0005
#: At most so many records cross singly after a batch.
MOST_SINGLE = 16


@dataclass(frozen=True)
class Result:
    """What one side saw. `wakeups`: how often it waited: the consumer asleep, the producer for room."""

    records: int
    payload_bytes: int
    seconds: float
    wakeups: int
    fault: str = ""


def stress(total_bytes: int, ring_bytes: int = 1 << 20, seed: int = 1) -> tuple[Result, Result]:
    """Move at least `total_bytes` of payload; what the producer and what the consumer saw.

    A fault (lost wake-up, wrong sequence, wrong checksum, dead consumer) is in the results, not raised.
    """
    descriptors = Descriptors.create(ring_bytes, "ring-stress")
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    words = [
        sys.executable,
        "-m",
        "lab.ring_stress",
        *map(str, descriptors.all()),
        str(total_bytes),
        str(seed),
    ]
    consumer = subprocess.Popen(
        words, pass_fds=descriptors.all(), stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    producer = Producer(descriptors)
    try:
        sent = _produce(producer, total_bytes, random.Random(seed), consumer)
        try:
            output, _ = consumer.communicate(timeout=2 * LOST_AFTER_S)
            received = Result(**json.loads(output))
        except (subprocess.TimeoutExpired, ValueError):
            received = Result(0, 0, 0.0, 0, "the consumer process gave no result")
        return sent, received
    finally:
        consumer.kill()
        consumer.wait()
        producer.close()
        descriptors.close()


def _templates(rng: random.Random) -> list[tuple[bytes, int]]:
    """Payloads and their checksums: packets of ordinary size and superpackets."""
    pool = rng.randbytes(1 << 20)
    found = []
    for _ in range(TEMPLATES):
        most = rng.choice((1500, MAX_PACKET_BYTES, MAX_PACKET_BYTES))
        size = rng.randint(MIN_PACKET_BYTES, most)
        start = rng.randint(0, len(pool) - size)
        payload = pool[start : start + size]
        found.append((payload, zlib.crc32(payload)))
    return found


class _Fault(Exception):
    """What went wrong, for the result."""


class _Source:
    """The producer's side: puts numbered records into the ring. `close` before the ring is closed."""

    def __init__(self, ring: Producer, rng: random.Random, consumer: subprocess.Popen[bytes]) -> None:
        self._ring, self._rng, self._consumer = ring, rng, consumer
        self._templates = _templates(rng)
        self._buffer = ring.buffer
        self.records = self.payload_bytes = self.wakeups = 0

    def put(self) -> None:
        """One record of random length; a shorter one that fills the ring, before the consumer is let go first."""
        payload, checksum = self._templates[self._rng.randrange(TEMPLATES)]
        size = HEADER.size + len(payload)
        while self._ring.reserve(size) < 0:
            fitting = self._largest_fitting(size)
            if fitting > HEADER.size:
                brim = payload[: fitting - HEADER.size]
                self._write(brim, zlib.crc32(brim))
            self._ring.publish()
            self.wakeups += 1
            self.wait_until_released()
        self._write(payload, checksum)

    def wait_until_released(self) -> None:
        """Spin until the consumer has released everything published."""
        deadline = time.monotonic() + LOST_AFTER_S
        while self._ring.used():
            if time.monotonic() > deadline:
                raise _Fault("published records are not taken: lost wake-up, or the consumer ended")
            os.sched_yield()

    def finish(self) -> None:
        """Tell the consumer that this was all."""
        self.wait_until_released()
        HEADER.pack_into(self._buffer, self._ring.reserve(HEADER.size), END, 0, 0)
        self._ring.commit(HEADER.size)
        self._ring.publish()

    def close(self) -> None:
        """Let go of the ring's memory."""
        del self._buffer

    def _write(self, payload: bytes, checksum: int) -> None:
        size = HEADER.size + len(payload)
        place = self._ring.reserve(size)
        HEADER.pack_into(self._buffer, place, size - 4, self.records, checksum)
        self._buffer[place + HEADER.size : place + size] = payload
        self._ring.commit(size)
        self.records += 1
        self.payload_bytes += len(payload)

    def _largest_fitting(self, too_much: int) -> int:
        """The most bytes the ring has room for, found by asking it; less than `too_much`."""
        fits = 0
        while too_much - fits > 1:
            middle = (fits + too_much) // 2
            fits, too_much = (middle, too_much) if self._ring.reserve(middle) >= 0 else (fits, middle)
        return fits


def _produce(
    ring: Producer, total_bytes: int, rng: random.Random, consumer: subprocess.Popen[bytes]
) -> Result:
    source = _Source(ring, rng, consumer)
    begin = time.monotonic()
    fault = ""
    try:
        while source.payload_bytes < total_bytes:
            for _ in range(rng.randint(1, MOST_BATCH)):
                source.put()
            ring.publish()
            if rng.randrange(PAUSE_EVERY) == 0:
                time.sleep(PAUSE_S)
            for _ in range(rng.randint(0, MOST_SINGLE)):
                source.wait_until_released()
                source.put()
                ring.publish()
        source.finish()
    except _Fault as error:
        fault = str(error)
    finally:
        source.close()
    return Result(source.records, source.payload_bytes, time.monotonic() - begin, source.wakeups, fault)


def _consume(ring: Consumer, rng: random.Random) -> Result:
    buffer = ring.buffer
    begin = time.monotonic()
    sequence = moved = wakeups = 0

    def result(fault: str = "") -> Result:
        return Result(sequence, moved, time.monotonic() - begin, wakeups, fault)

    while True:
        start, end = ring.readable()
        if start == end:
            if ring.sleep():
                wakeups += 1
                if not _signalled(ring.wake_fd):
                    return result("lost wake-up: data")
            continue
        # As a shard does, which puts its frame header there.
        buffer[start - SCRATCH : start] = b"\xff" * SCRATCH
        place = start
        while place < end:
            length, number, checksum = HEADER.unpack_from(buffer, place)
            if length == END:
                ring.release(end - start)
                return result()
            payload = buffer[place + HEADER.size : place + 4 + length]
            if number != sequence:
                return result(f"record {number} where {sequence} was due")
            if zlib.crc32(payload) != checksum:
                return result(f"record {number} is damaged")
            place += 4 + length
            sequence += 1
            moved += len(payload)
        payload.release()
        ring.release(end - start)
        if rng.randrange(PAUSE_EVERY) == 0:
            time.sleep(PAUSE_S)


def _signalled(fd: int) -> bool:
    """Wait for an eventfd and clear it; False when nothing came."""
    ready = select.select([fd], [], [], LOST_AFTER_S)[0]
    if ready:
        drain(fd)
    return bool(ready)


def report(total_bytes: int) -> int:
    """Run it, print a line for each side and the verdict; the exit code."""
    sent, received = stress(total_bytes)
    for name, side in (("producer", sent), ("consumer", received)):
        rate = side.payload_bytes / side.seconds / 1e9 if side.seconds else 0.0
        print(
            f"ring {name}: {side.payload_bytes / 1e9:.2f} GB, {side.records} records, {side.seconds:.1f} s, "
            f"{rate:.2f} GB/s, waited {side.wakeups} times{': ' + side.fault if side.fault else ''}"
        )
    same = (sent.records, sent.payload_bytes) == (received.records, received.payload_bytes)
    passed = same and not sent.fault and not received.fault
    print(f"{'ok  ' if passed else 'FAIL'} every record arrived once, in order, undamaged")
    return 0 if passed else 1


def _consumer_main(words: list[str]) -> None:
    descriptors = Descriptors(*map(int, words[:2]))
    ring = Consumer(descriptors)
    print(json.dumps(asdict(_consume(ring, random.Random(int(words[2]))))))


if __name__ == "__main__":
    _consumer_main(sys.argv[1:])
