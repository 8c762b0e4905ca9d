"""The pump between a descriptor that keeps packets apart, as a TUN does, and real rings."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packet.builder import V4, V6, udp, vnet

from supervisor.pump import FlowTable, Pump, ShardPort
from vpnd.config.live import Live
from vpnd.config.schema import Config, Network, Worker
from vpnd.packet import flow, ring
from vpnd.packet.offload import UdpCoalescer, finish_checksum, inspect_untrusted, segment
from vpnd.packet.record import LENGTH, LENGTH_BYTES, MAX_RECORD_BYTES, VNET_BYTES, Capabilities

RING = 1 << 19
PLAIN = Capabilities(offloads=0, max_record=MAX_RECORD_BYTES, mtu=1400)
CONFIG = Config(worker=Worker(ring_bytes=RING, max_flows=64), network=Network(read_batch=16))


def packet(port: int = 80, destination: int = 0x0A560002, size: int = 100) -> bytes:
    return struct.pack(
        ">BBHIBBHIIHHIII", 0x45, 0, size, 0, 64, 6, 0, 0x0A560001, destination, 5, port, 1, 2, 3
    ).ljust(size, b"\0")


class Rig:
    """A pump with `count` shards, the shards' side of the rings in our hands."""

    def __init__(self, count: int) -> None:
        ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        self.kernel.setblocking(False)
        for end in (ours, self.kernel):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self._ours = ours
        self.pump = Pump(ours.fileno(), Live(CONFIG), None)
        self.descriptors = [ring.Descriptors.create(RING, "t") for _ in range(count)]
        self.ports = [ShardPort(index, each) for index, each in enumerate(self.descriptors)]
        self.consumers = [ring.Consumer(each) for each in self.descriptors]
        for port in self.ports:
            self.pump.attach(port)

    def give(self, *packets: bytes) -> None:
        """The kernel has packets; the pump reads them all."""
        for each in packets:
            self.kernel.send(bytes(VNET_BYTES) + each)
        for _ in range(len(packets) // 16 + 1):
            self.pump.read_tun()

    def taken(self, index: int) -> list[bytes]:
        """The packets that shard `index` finds in its ring."""
        return [record[LENGTH_BYTES + VNET_BYTES :] for record in self.records(index)]

    def records(self, index: int) -> list[bytes]:
        """What shard `index` finds in its ring."""
        consumer = self.consumers[index]
        position, end = consumer.readable()
        found = []
        first = position
        while position < end:
            (count,) = LENGTH.unpack_from(consumer.buffer, position)
            found.append(bytes(consumer.buffer[position : position + LENGTH_BYTES + count]))
            position += LENGTH_BYTES + count
        consumer.release(end - first)
        return found

    def close(self) -> None:
        for each in (*self.ports, *self.consumers, *self.descriptors, self._ours, self.kernel):
            each.close()


@pytest.fixture
def rig(request: pytest.FixtureRequest):
    made = Rig(getattr(request, "param", 3))
    yield made
    made.close()


def home(packet_bytes: bytes, shards: list[int]) -> int:
    view = memoryview(packet_bytes + bytes(64))
    return flow.shard_of(flow.key_of(view, 0, len(packet_bytes)), shards)


def test_every_packet_comes_to_its_flows_shard_whole_and_in_order(rig: Rig):
    packets = [packet(port=80 + i % 7, size=40 + i) for i in range(300)]
    rig.give(*packets)
    for index in range(3):
        assert rig.taken(index) == [each for each in packets if home(each, [0, 1, 2]) == index]
    assert rig.pump.packets_read == 300 == sum(port.packets_in for port in rig.ports)
    assert rig.pump.bytes_read == sum(map(len, packets))


def test_a_lost_shards_flows_move_and_stay_where_they_went(rig: Rig):
    packets = [packet(port=port) for port in range(30)]
    rig.give(*packets)
    before = [rig.taken(index) for index in range(3)]
    rig.pump.detach(rig.ports[1])
    rig.give(*packets)
    after = {index: rig.taken(index) for index in (0, 2)}
    for index in (0, 2):
        assert [each for each in after[index] if each in before[index]] == before[index]
    assert sorted(after[0] + after[2]) == sorted(packets)
    rig.pump.attach(rig.ports[1])
    rig.give(*packets)
    assert {index: rig.taken(index) for index in (0, 2)} == after, "a living flow is not moved back"
    assert rig.taken(1) == []
    rig.pump.flows.age()
    rig.pump.flows.age()
    rig.give(*packets)
    assert rig.taken(1) == before[1], "a flow that was idle goes home"


def test_where_a_flow_is_or_would_be_is_told_and_not_remembered(rig: Rig):
    for port in range(30):
        key = flow.key_of(memoryview(packet(port=port) + bytes(64)), 0, 100)
        assert rig.pump.shard_of(key) == home(packet(port=port), [0, 1, 2])
        assert not len(rig.pump.flows)
    rig.pump.detach(rig.ports[1])
    rig.give(*(packet(port=port) for port in range(30)))
    rig.pump.attach(rig.ports[1])
    rig.taken(1)
    for port in range(30):
        key = flow.key_of(memoryview(packet(port=port) + bytes(64)), 0, 100)
        assert rig.pump.shard_of(key) == home(packet(port=port), [0, 2]), "a living flow is where it was"
    for port in rig.ports:
        rig.pump.detach(port)
    assert rig.pump.shard_of(key) == -1


DROPS = [
    ("IP version 7", b"\x75" + packet()[1:], "malformed_local"),
    ("shorter than a header", packet()[:19], "malformed_local"),
    ("nothing behind the virtio_net_hdr", b"", "malformed_local"),
    ("multicast", packet(destination=0xE00000FB), "not_unicast"),
    ("broadcast", packet(destination=0xFFFFFFFF), "not_unicast"),
]


@pytest.mark.parametrize("sentence,bad,reason", DROPS, ids=[row[0] for row in DROPS])
def test_what_is_not_carried_is_counted_and_leaves_no_trace(rig: Rig, sentence, bad, reason):
    rig.give(packet(), bad, packet())
    assert sum((rig.taken(index) for index in range(3)), []) == [packet(), packet()]
    assert rig.pump.dropped[reason] == 1
    assert rig.pump.packets_read == 3


def test_without_a_shard_packets_are_dropped_as_shard_down(rig: Rig):
    for port in rig.ports:
        rig.pump.detach(port)
    rig.give(packet(), packet())
    assert rig.pump.dropped["shard_down"] == 2


def test_a_full_ring_drops_its_own_flows_only(rig: Rig):
    big = packet(port=80, size=60_000)
    full = home(big, [0, 1, 2])
    other = next(packet(port=port) for port in range(100) if home(packet(port=port), [0, 1, 2]) != full)
    rig.give(*[big] * 12, other)
    fit = len(rig.taken(full))
    assert fit == (RING - ring.SCRATCH - MAX_RECORD_BYTES) // (60_000 + 14) + 1
    assert rig.pump.dropped["ring_full"] == 12 - fit
    assert rig.taken(home(other, [0, 1, 2])) == [other]
    rig.give(big)
    assert rig.taken(full) == [big], "it goes on when there is room"


def test_a_flood_of_destinations_does_not_fill_the_memory():
    table = FlowTable(64)
    for key in range(10_000):
        table.find(key, [0, 1])
    assert len(table) <= 128


def with_pump(config: Config) -> tuple[Rig, Pump]:
    """A rig of one shard whose pump has other settings."""
    rig = Rig(1)
    rig.pump = Pump(rig._ours.fileno(), Live(config), None)
    rig.pump.attach(rig.ports[0])
    return rig, rig.pump


@pytest.mark.setting("network.read_batch")
def test_so_many_packets_are_read_before_other_work():
    rig, pump = with_pump(Config(network=Network(read_batch=4)))
    for _ in range(6):
        rig.kernel.send(bytes(VNET_BYTES) + packet())
    assert pump.read_tun() == 4
    assert (pump.packets_read, len(rig.taken(0))) == (4, 4)
    assert pump.read_tun() == 2
    assert (pump.packets_read, len(rig.taken(0))) == (6, 2)
    rig.close()


@pytest.mark.setting("worker.publish_bytes")
@pytest.mark.parametrize(("publish_bytes", "told"), [(300, [3, 6, 7]), (1, [1, 2, 3, 4, 5, 6, 7])])
def test_a_shard_is_told_of_its_packets_while_more_are_read(publish_bytes: int, told: list[int], monkeypatch):
    """After each `publish_bytes`, and at the end of the batch; of the first alone after packets came one by one."""
    rig, pump = with_pump(Config(worker=Worker(publish_bytes=publish_bytes)))
    publish, seen = ring.Producer.publish, []
    monkeypatch.setattr(
        ring.Producer, "publish", lambda self: (seen.append(rig.ports[0].packets_in), publish(self))
    )

    def told_of(count: int) -> list[int]:
        seen.clear()
        before = rig.ports[0].packets_in
        for _ in range(count):
            rig.kernel.send(bytes(VNET_BYTES) + packet(size=100))
        assert pump.read_tun() == count
        return [packets_in - before for packets_in in seen]

    assert told_of(2)[0] == 1, "nothing had come before"
    assert told_of(7) == told
    assert told_of(1) == [1]
    assert told_of(2)[0] == 1
    assert told_of(7) == told
    rig.close()


SCRIPT = st.lists(
    st.tuples(
        st.sampled_from([(V4, 80), (V4, 81), (V6, 80)]), st.sampled_from([9, 500, 1200]), st.integers(1, 40)
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(SCRIPT, st.sampled_from([5, 16, 64]), st.integers(0, 120))
def test_merged_datagrams_are_cut_into_the_same_again_whatever_comes_between(
    script, read_batch: int, filled: int
):
    """Bursts of some flows to two shards, whose rings are nearly full at times: each shard's records, cut, are the
    datagrams that were not dropped, in their order."""
    rig = Rig(2)
    rig.pump = Pump(rig._ours.fileno(), Live(Config(network=Network(read_batch=read_batch))), UdpCoalescer())
    for port in rig.ports:
        rig.pump.attach(port)
    filling = packet(size=4000)
    rig.give(*[filling] * filled)
    sent: dict[int, list[bytes]] = {0: [], 1: []}
    for number, ((addresses, port), size, burst) in enumerate(script):
        for count in range(burst):
            data = vnet(udp(addresses, struct.pack(">HH", number, count).ljust(size, b"x"), ports=(5, port)))
            rig.kernel.send(data)
            sent[home(data[VNET_BYTES:], [0, 1])].append(whole(data))
    offered = sum(map(len, sent.values())) + filled
    while rig.pump.read_tun():
        pass
    assert rig.pump.reads == offered
    came = 0
    for shard in (0, 1):
        pieces = []
        for record in rig.records(shard):
            inspect_untrusted(memoryview(record), LENGTH_BYTES, len(record) - LENGTH_BYTES)
            if record[LENGTH_BYTES + VNET_BYTES :] != filling:
                pieces += [whole(piece[LENGTH_BYTES:]) for piece in segment(memoryview(record), PLAIN)]
        came += len(pieces)
        left = iter(sent[shard])
        assert all(piece in left for piece in pieces), "in order, and nothing but what was sent"
    assert came + rig.pump.dropped["ring_full"] >= offered - filled
    rig.close()


@pytest.mark.parametrize("at", [0, 4, 8, 14 + 2, 14 + 10, 14 + 24, 14 + 26])
def test_a_shard_that_writes_into_its_ring_while_it_is_filled_disturbs_nobody(at: int):
    """It is less trusted than the supervisor, and can write wherever records are being put together."""
    rig = Rig(1)
    pump = rig.pump = Pump(rig._ours.fileno(), Live(CONFIG), UdpCoalescer())
    pump.attach(rig.ports[0])
    rig.give(packet(), packet())  # else the next one is published alone
    assert rig.taken(0) == [packet()] * 2
    begun = rig.consumers[0].readable()[0]
    data, read, reads = vnet(udp(V4, bytes(100))), pump._tun.readinto, 0

    class Tun:
        def readinto(self, buffer: memoryview) -> int | None:
            nonlocal reads
            reads += 1
            if reads == 5:
                rig.consumers[0].buffer[begun + at : begun + at + 4] = b"\xff" * 4
            count: int | None = read(buffer)
            return count

    pump._tun = Tun()  # type: ignore[assignment]
    for _ in range(8):
        rig.kernel.send(data)
    assert pump.read_tun() == 8 and pump.reads == 10
    rig.close()


def whole(data: bytes) -> bytes:
    """A datagram behind its virtio_net_hdr as it is in the end; without IPv4's identification, which DF frees."""
    copy = bytearray(data)
    finish_checksum(memoryview(copy), 0, len(copy))
    ipv4 = copy[VNET_BYTES] >> 4 == 4
    return (
        bytes(copy[VNET_BYTES:][:4] + copy[VNET_BYTES + 6 :][:4] + copy[VNET_BYTES + 12 :])
        if ipv4
        else bytes(copy)
    )
