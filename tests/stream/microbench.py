"""Cost of the engine alone: `PYTHONPATH=.:tests python -m stream.microbench`. Prints; asserts nothing.

Each round is as a shard does it: spans out of a ring until the send buffer is full, then one copy where the
sockets would be, then all events. Sender and receiver are timed apart; the copy is not counted.
"""

from __future__ import annotations

import time

from shards.stream.events import Data
from stream.pair import Pair, cuts, drain, sendable

SPANS = {"64 KB (one message)": 65_507, "superpacket 65549 (two)": 65_549, "1.2 KB": 1_214, "64 B": 64}
ROUNDS_BYTES = 1 << 28
MOST_ROUNDS = 600


def run(size: int) -> tuple[float, float, int, int]:
    """Seconds of sender and of receiver, bytes and spans."""
    pair = Pair()
    a, b = pair.a, pair.b
    stream, _ = pair.open()
    ring = memoryview(bytearray(12 + size * 8))
    clock = time.perf_counter
    sending = receiving = 0.0
    total = spans = rounds = 0
    while total < ROUNDS_BYTES and rounds < MOST_ROUNDS:
        rounds += 1
        start = clock()
        at = 12
        while sendable(a, stream) >= size:
            a.send(stream, ring, at, cuts(at, at + size))
            at = at + size if at + 2 * size <= len(ring) else 12
            total += size
            spans += 1
        wire = a.data_to_send()
        sending += clock() - start
        while wire:
            room = b.receive_buffer()
            taken = min(len(room), len(wire))
            room[:taken] = wire[:taken]
            wire = wire[taken:]
            start = clock()
            b.received(taken)
            while (event := b.next_event(0.0)) is not None:
                if type(event) is Data:
                    b.consumed(event.stream, len(event.view))
            receiving += clock() - start
        start = clock()
        a.data_sent(len(a.data_to_send()))
        sending += clock() - start
        back = bytes(b.data_to_send())
        b.data_sent(len(back))
        a.receive_buffer()[: len(back)] = back
        a.received(len(back))
        drain(a)
    return sending, receiving, total, spans


def main() -> None:
    for name, size in SPANS.items():
        sending, receiving, total, spans = run(size)
        for side, seconds in (("send", sending), ("receive", receiving)):
            print(
                f"{name:26} {side:8} {total / seconds / 1e9:6.2f} GB/s {seconds / spans * 1e6:7.2f} us a span"
            )


if __name__ == "__main__":
    main()
