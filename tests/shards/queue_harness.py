"""Chunks, flows and a fair queue as tests need them: time and settings are the test's."""

from __future__ import annotations

from typing import Any

from simulation.packets import LEAST_BYTES, number_of, record

from shards.counters import Counts
from shards.flow.fair import FairQueue
from shards.flow.flows import Chunk, Flow
from vpnd.config.live import Live
from vpnd.config.schema import Config, Session, Worker
from vpnd.packet.record import PACKET_OFFSET

SOURCE, DESTINATION = number_of("10.86.0.1"), number_of("10.86.0.2")
#: A record of the smallest packet.
LEAST_RECORD = PACKET_OFFSET + LEAST_BYTES
#: The smallest queue there is.
QUEUE_BYTES = 1 << 17


def live(*, worker: dict[str, Any] | None = None, **session: Any) -> Live:
    """Settings: of [session], and of [worker]."""
    values = {"queue_bytes": QUEUE_BYTES, "delay_target": 10.0} | session
    return Live(Config(session=Session(**values), worker=Worker(**(worker or {}))))


def chunk(port: int, numbers: range, since_s: float = 0.0, size: int = LEAST_BYTES) -> Chunk:
    """Packets of one flow that wait together."""
    data = b"".join(record(SOURCE, DESTINATION, port, number, size) for number in numbers)
    return Chunk(memoryview(data), 0, len(data), len(numbers), since_s)


def numbers(chunk: Chunk) -> list[tuple[int, int]]:
    """(port, number) of each packet."""
    found, position = [], chunk.start
    while position < chunk.end:
        size = 4 + int.from_bytes(chunk.buffer[position : position + 4], "big")
        packet = position + PACKET_OFFSET
        port = int.from_bytes(chunk.buffer[packet + 22 : packet + 24], "big")
        found.append((port, int.from_bytes(chunk.buffer[packet + 28 : packet + 32], "big")))
        position += size
    return found


class Fair:
    """A fair queue with flows by port; `sent` is what left it, in order."""

    def __init__(self, settings: Live) -> None:
        self.live = settings
        self.drops = Counts().drops
        self.queue = FairQueue(settings, self.drops)
        self.flows: dict[int, Flow] = {}
        self.sent: list[tuple[int, int]] = []
        self.put_packets = 0
        self._next: dict[int, int] = {}

    def flow(self, port: int) -> Flow:
        return self.flows.setdefault(port, Flow(port))

    def put(self, port: int, packets: int = 1, now_s: float = 0.0, size: int = LEAST_BYTES) -> None:
        begin = self._next.get(port, 0)
        self._next[port] = begin + packets
        self.put_packets += packets
        self.queue.put(self.flow(port), chunk(port, range(begin, begin + packets), now_s, size))

    def send(self, now_s: float = 0.0) -> bool:
        """One chunk; False when none can go."""
        flow = self.queue.first(now_s)
        if flow is None:
            return False
        assert flow.backlog is not None
        self.sent += numbers(flow.backlog.chunks[0])
        self.queue.sent(flow, now_s)
        return True

    def dropped(self) -> dict[str, int]:
        return {reason: count for reason, count in self.drops.items() if count}

    def check(self) -> None:
        """The books, and the sums."""
        queue = self.queue
        backlogs = [flow.backlog for flow in self.flows.values() if flow.backlog is not None]
        mine = [backlog for backlog in backlogs if backlog.queue is queue or backlog.chunks]
        assert queue.packets == sum(each.packets for each in mine) >= 0
        assert queue.bytes == sum(each.bytes for each in mine) >= 0
        for each in backlogs:
            assert each.packets == sum(chunk.packets for chunk in each.chunks)
            assert each.bytes == sum(len(chunk) for chunk in each.chunks)
        assert self.put_packets == len(self.sent) + sum(self.drops.values()) + queue.packets
