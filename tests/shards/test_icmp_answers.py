"""ICMP unreachable into the TUN: as many a second as permitted, and nothing for what must not be answered."""

from __future__ import annotations

import pytest
from packet.builder import V4, record, tcp, udp, vnet

from shards.counters import Counts
from shards.unreachable import Unreachable
from vpnd.config.live import Live
from vpnd.config.schema import Config, Network
from vpnd.packet.record import VNET_BYTES

UDP, TCP = record(vnet(udp(V4, b"x"))), record(vnet(tcp(V4, bytes(3000)), gso_size=1000))
FRAGMENT = record(bytes(VNET_BYTES) + udp(V4, b"x", fragment=1))


class Machine:
    """A shard's answers, and the TUN that gets them."""

    def __init__(self, rate: int) -> None:
        self.told: list[bytes] = []
        self.now_s, self.broken = 5.0, False
        self.counts = Counts()
        live = Live(Config(network=Network(unreachable_rate=rate)))
        self._unreachable = Unreachable(live, self._write, lambda: self.now_s, self.counts)

    def _write(self, view: memoryview) -> None:
        if self.broken:
            raise OSError
        self.told.append(bytes(view))

    def tell(self, *records: bytes) -> int:
        """How many answers came of it."""
        before, data = len(self.told), b"".join((b"elsewhere", *records, b"elsewhere"))
        self._unreachable.tell(memoryview(data), 9, len(data) - 9)
        return len(self.told) - before


@pytest.mark.setting("network.unreachable_rate")
def test_so_many_a_second_are_answered_and_what_must_not_be_costs_nothing() -> None:
    machine = Machine(3)
    assert machine.tell(UDP, FRAGMENT, FRAGMENT, TCP) == 2
    assert machine.tell(*[UDP] * 10) == 1
    machine.now_s += 0.5
    assert machine.tell(*[UDP] * 10) == 1
    machine.now_s += 1000.0
    assert machine.tell(*[UDP] * 10) == 3
    assert machine.counts.unreachables_told == 7
    assert all(answer[:VNET_BYTES] == bytes(VNET_BYTES) for answer in machine.told)
    assert Machine(0).tell(UDP) == 0


def test_a_device_that_goes_down_is_nothing_to_stumble_over() -> None:
    machine = Machine(100)
    machine.broken = True
    assert machine.tell(UDP, UDP) == 0 and machine.counts.unreachables_told == 0
