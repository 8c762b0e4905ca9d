"""A packet's life, in the supervisor: from the TUN device to the shards.

    outbound                                        inbound
    1. read from the TUN into a ring      *         5. decrypt, take frames apart     (shards/session/link.py)
    2. flow key → shard, publish          *         6. check, write into the TUN      (shards/inbound.py)
    3. records → flow → span of a peer    (shards/outbound.py)
    4. seal, send                         (shards/session/link.py)

    stages marked * are here; 1 and 2 are per (super)packet, waking a shard is per batch

Inbound packets do not come back to the supervisor: each shard writes them into the TUN itself (see shards/inbound.py).

Reading straight into a ring needs the ring before the packet is seen: it is read into the ring of the shard
that had the last packet, and copied only when the flow turns out to be another shard's. Bulk traffic is one
flow, so this is rare where it would be dear.

A flow stays with its shard for as long as packets come, also when a shard is added or comes back: otherwise
packets of the old way and the new way could overtake each other.
"""

from __future__ import annotations

from io import FileIO

from vpnd.config.live import Live
from vpnd.metrics import Drops
from vpnd.packet import flow, ring
from vpnd.packet.offload import UdpCoalescer
from vpnd.packet.record import (
    LENGTH,
    LENGTH_BYTES,
    MAX_RECORD_BYTES,
    PACKET_OFFSET,
    VNET_BYTES,
)

_pack_length = LENGTH.pack_into


class ShardPort:
    """The supervisor's side of one shard process: the ring to it and what went in.

    Owner: supervisor loop.
    """

    def __init__(self, index: int, to_shard: ring.Descriptors) -> None:
        self.index = index
        self.to_shard = ring.Producer(to_shard)
        #: (super)packets given to this shard process
        self.packets_in = 0

    def close(self) -> None:
        """Unmap the ring."""
        self.to_shard.close()


class FlowTable:
    """Flow key → shard index, remembered while the flow is alive.

    Two generations instead of a time stamp per flow: `age` drops what was not looked up since the last but one call.
    A key is in one of them, so that counting them is no work.
    """

    def __init__(self, most_flows: int) -> None:
        #: of one generation; may be changed
        self.most = most_flows
        self.young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def look(self, key: int, shards: list[int]) -> int:
        """The shard a flow has, or would get; nothing is remembered. `shards` as in `find`."""
        index = self.young.get(key, self._old.get(key, -1))
        return index if index in shards else flow.shard_of(key, shards)

    def find(self, key: int, shards: list[int]) -> int:
        """The flow's shard, of those that are up (`shards`, not empty). `young` is looked up by the caller first."""
        index = self.look(key, shards)
        self._old.pop(key, None)
        if len(self.young) >= self.most:
            self.age()
        self.young[key] = index
        return index

    def age(self) -> None:
        """Forget what was idle for a whole generation."""
        self._old, self.young = self.young, {}

    def forget(self, shard: int) -> int:
        """A shard is gone: its flows, whose number is returned, are placed anew when their next packet comes."""
        before = len(self)
        self.young = {key: index for key, index in self.young.items() if index != shard}
        self._old = {key: index for key, index in self._old.items() if index != shard}
        return before - len(self)

    def __len__(self) -> int:
        return len(self.young) + len(self._old)


class Pump:
    """Owner: supervisor loop; everything is synchronous and bounded per call."""

    def __init__(self, tun_fd: int, live: Live, coalescer: UdpCoalescer | None) -> None:
        config = live.config
        self._tun = FileIO(tun_fd, "r", closefd=False)
        self._ports: dict[int, ShardPort] = {}
        self._up: list[int] = []
        self._last: ShardPort | None = None
        self._sparse = True  # the last call found one packet at most
        self._merging, self._coalescer = coalescer is not None, coalescer or UdpCoalescer()
        self._read_batch = config.network.read_batch
        self._publish_bytes = config.worker.publish_bytes
        self._scratch = ring.lazy_buffer(MAX_RECORD_BYTES)
        self.flows = FlowTable(config.worker.max_flows)
        self._live = live
        live.watch(lambda config: config.worker.max_flows, self._limit_flows)
        self.dropped = Drops()
        self.reads = self.merged = self.bytes_read = 0

    def _limit_flows(self) -> None:
        self.flows.most = self._live.config.worker.max_flows

    @property
    def packets_read(self) -> int:
        """(Super)packets that came from the TUN; datagrams merged into the one before them are part of it."""
        return self.reads - self.merged

    def attach(self, port: ShardPort) -> None:
        """A shard is there: new flows may be given to it."""
        self._ports[port.index] = port
        self._up = sorted(self._ports)

    def detach(self, port: ShardPort) -> int:
        """A shard is gone, or leaves: its flows, whose number is returned, move to those left. The port stays the
        caller's to close."""
        if self._ports.get(port.index) is not port:
            return 0
        del self._ports[port.index]
        self._up = sorted(self._ports)
        if self._last is port:
            self._last = None
        return self.flows.forget(port.index)

    def shard_of(self, key: int) -> int:
        """The shard that has a flow, or would get it; -1 while none is up. Not for the packet path."""
        return self.flows.look(key, self._up) if self._up else -1

    def read_tun(self) -> int:
        """Stages 1 and 2: up to `network.read_batch` packets from the TUN, how many. Call when it is readable.

        Where packets come one by one, the first is published before the next is looked for: its shard wakes up
        meanwhile. In a batch that would cost wake-ups, and datagrams that are not merged.

        Raises RingBroken when a shard wrote nonsense into its ring's header, OSError when the device is gone.
        """
        readinto, find, key_of = self._tun.readinto, self.flows.young.get, flow.key_of
        merge, read_on, merging = self._coalescer.merge, self._coalescer.read_on, self._merging
        port, alone = self._last, self._sparse
        previous = -1  # where in port's ring the last record begins, while it may still grow
        reads = merged = bytes_read = left = 0
        most, publish_bytes = self._read_batch, self._publish_bytes
        try:
            while reads < most:
                if port is not None and (offset := port.to_shard.reserve(MAX_RECORD_BYTES)) >= 0:
                    producer, in_ring = port.to_shard, port.index
                    buffer = producer.buffer
                else:
                    self._coalescer.finish()
                    in_ring, buffer, offset, previous = -1, self._scratch, 0, -1
                # what a run has read and not taken lies where this would be read to
                count = left or readinto(buffer[offset + LENGTH_BYTES : offset + MAX_RECORD_BYTES])
                if not count:
                    break
                left = 0
                reads += 1
                bytes_read += count
                # What continues the datagram before it is of the same flow, and is not looked up.
                if previous >= 0 and (grown := merge(buffer, previous, offset, count)):
                    producer.commit(grown)
                    merged += 1
                    if producer.reserve(2 * MAX_RECORD_BYTES) >= 0:
                        taken, last = read_on(readinto, most - reads)
                        producer.commit(taken * grown)
                        merged += taken
                        reads += taken
                        bytes_read += taken * count
                        if not last:
                            break
                        left = max(0, last)
                    continue
                key = key_of(buffer, offset + PACKET_OFFSET, count - VNET_BYTES)
                index = find(key)
                if index is None:
                    index = self._place(key)
                    find = self.flows.young.get  # a full table begins a new generation
                    if index < 0:
                        continue
                if port is not None and index == in_ring:
                    _pack_length(buffer, offset, count)
                else:
                    port = self._ports[index]
                    producer = port.to_shard
                    offset = self._copy(producer, buffer[offset : offset + LENGTH_BYTES + count], count)
                    if offset < 0:
                        port, previous = None, -1
                        continue
                port.packets_in += 1
                if producer.commit(LENGTH_BYTES + count) >= publish_bytes or alone:
                    producer.publish()
                    alone, previous = False, -1
                elif merging:
                    previous = offset
        finally:
            self._coalescer.finish()
            self.reads += reads
            self.merged += merged
            self.bytes_read += bytes_read - reads * VNET_BYTES
        self._last, self._sparse = port, reads <= 1
        for port in self._ports.values():
            if port.to_shard.unpublished:
                port.to_shard.publish()
        return reads

    def _place(self, key: int) -> int:
        """The shard of a flow seen for the first time, or -1: dropped and counted."""
        if key < 0:
            self.dropped.plain("malformed_local")
        elif not flow.is_unicast(key):
            self.dropped.plain("not_unicast")
        elif not self._up:
            self.dropped.plain("shard_down")
        else:
            return self.flows.find(key, self._up)
        return -1

    def _copy(self, producer: ring.Producer, record: memoryview, count: int) -> int:
        """A record that was read elsewhere, put into this ring: its offset, or -1: dropped and counted."""
        _pack_length(record, 0, count)
        offset = producer.reserve(MAX_RECORD_BYTES)
        if offset < 0:
            self.dropped.span("ring_full", record, 0, len(record), 1)
            return -1
        producer.buffer[offset : offset + len(record)] = record
        return offset
