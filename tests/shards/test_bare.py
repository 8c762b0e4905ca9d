"""Bare frames of the subnet node: to records and back, in any cuts, and what a wrong length does."""

from __future__ import annotations

import asyncio
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packet.builder import V4, ip, record, tcp, udp, verify, vnet

from shards.budget import Budget
from shards.counters import Counts
from shards.flow.prefixes import set_of
from shards.inbound import Inbound
from shards.session.bare import BareFrames, BareInbound, strip
from shards.stream.spec import SUBNET_NODE_MTU
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.packet.record import VNET_BYTES
from vpnd.packet.ring import SCRATCH

PACKETS = [ip(V4, 1, bytes(size)) for size in (0, 1, 100, SUBNET_NODE_MTU - 20)]
BODY = bytes(range(256)) * 20


def frame(packet: bytes) -> bytes:
    return struct.pack(">I", len(packet)) + packet


async def make_budget() -> Budget:
    return Budget(Live(Config()), time.monotonic, lambda: None)


class Arrivals:
    """Stage 6 that keeps what the TUN would get."""

    def __init__(self) -> None:
        self.packets: list[bytes] = []
        self.counts = Counts()
        self.ended = 0
        self.budget = asyncio.run(make_budget())
        self._sources = set_of((f"{V4[0]}/32",))
        inbound = Inbound(self._write, set_of((f"{V4[1]}/32",)), self.counts)
        self._inbound, self._frames = (
            BareInbound(inbound),
            BareFrames(self.budget, self.counts.drops, self._end),
        )

    def _write(self, packet: memoryview) -> None:
        assert bytes(packet[:VNET_BYTES]) == bytes(VNET_BYTES)
        self.packets.append(bytes(packet[VNET_BYTES:]))

    def _end(self) -> None:
        self.ended += 1

    def feed(self, *parts: bytes, most: int = 1) -> None:
        """In turns of so many packets."""
        for part in parts:
            view = memoryview(part)
            while view:
                reached, packets = self._inbound.deliver_untrusted(self._sources, self._frames, view, most)
                assert packets <= most and (packets == most or reached == len(view))
                view = view[reached:]


def frames_of(records: bytes) -> tuple[list[bytes], int]:
    """The packets that `strip` makes of records, and how many it left out."""
    buffer = memoryview(bytearray(SCRATCH) + records)
    view, start, end, unfit = strip(buffer, SCRATCH, len(buffer))
    assert start >= SCRATCH
    packets = []
    while start < end:
        (count,) = struct.unpack_from(">I", view, start)
        packets.append(bytes(view[start + 4 : start + 4 + count]))
        start += 4 + count
    assert start == end
    return packets, unfit


@given(st.lists(st.integers(0, sum(len(frame(packet)) for packet in PACKETS)), max_size=8), st.integers(1, 5))
def test_frames_come_in_any_cuts_and_turns(cuts: list[int], most: int) -> None:
    data = b"".join(map(frame, PACKETS))
    edges = [0, *sorted(cuts), len(data)]
    arrivals = Arrivals()
    arrivals.feed(*(data[begin:end] for begin, end in zip(edges, edges[1:], strict=False)), most=most)
    assert arrivals.packets == PACKETS and not arrivals.ended
    assert arrivals.counts.packets_received == arrivals.counts.packets_to_tun == len(PACKETS)


def test_when_the_turn_is_over_nothing_is_taken() -> None:
    arrivals = Arrivals()
    view = memoryview(frame(PACKETS[2]))
    assert arrivals._inbound.deliver_untrusted(arrivals._sources, arrivals._frames, view, 0) == (0, 0)
    arrivals.feed(bytes(view))
    assert arrivals.packets == [PACKETS[2]]


@pytest.mark.parametrize("length", [0, 19, SUBNET_NODE_MTU + 1, 2**32 - 1])
def test_an_impossible_length_ends_the_stream_once_and_nothing_behind_it_is_read(length: int) -> None:
    arrivals = Arrivals()
    arrivals.feed(frame(PACKETS[2]) + struct.pack(">I", length) + frame(PACKETS[1]), frame(PACKETS[1]))
    assert arrivals.packets == [PACKETS[2]] and arrivals.ended == 1


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_bytes_raise_nothing(parts: list[bytes]) -> None:
    arrivals = Arrivals()
    arrivals.feed(*parts)
    assert arrivals.ended <= 1 and arrivals.budget.partial_bytes <= SUBNET_NODE_MTU + 4


def test_foreign_sources_and_destinations_are_counted() -> None:
    arrivals = Arrivals()
    arrivals.feed(frame(ip(("10.86.0.9", V4[1]), 1, b"x")), frame(ip((V4[0], "10.86.0.9"), 1, b"x")))
    assert not arrivals.packets and not arrivals.ended
    assert arrivals.counts.drops["source_not_allowed"] == arrivals.counts.drops["destination_not_ours"] == 1


def test_a_superpacket_leaves_as_packets_with_finished_checksums() -> None:
    packets, unfit = frames_of(record(vnet(tcp(V4, BODY), gso_size=1000)) + record(vnet(udp(V4, b"x"))))
    assert not unfit and len(packets) == 7 and all(len(packet) <= SUBNET_NODE_MTU for packet in packets)
    for packet in packets:
        verify(packet)


def test_what_is_larger_than_its_mtu_is_left_out() -> None:
    packets, unfit = frames_of(
        record(bytes(VNET_BYTES) + ip(V4, 1, bytes(SUBNET_NODE_MTU))) + record(vnet(udp(V4, b"x")))
    )
    assert unfit == 1 and len(packets) == 1
