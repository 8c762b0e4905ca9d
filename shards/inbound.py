"""A packet's life, in the shard, inbound: from a session to the ring.

    5. decrypt, take frames apart                 (shards/link.py, shards/stream)
    6. check, put into the ring             *     per record: check; per run of good records: one copy
    7. ring → TUN                                 (supervisor/pump.py)

Each record is checked for itself (virtio_net_hdr against packet, source against what the peer may use,
destination against what is ours): a superpacket pays once. What was between two bad records is copied in one piece.
"""

from __future__ import annotations

from shards.prefixes import Prefixes
from vpnd.errors import BadPacket, RemoteProtocolError
from vpnd.packet.offload import inspect_untrusted
from vpnd.packet.record import (
    LENGTH,
    LENGTH_BYTES,
    MAX_RECORD_BYTES,
    MIN_PACKET_BYTES,
    PACKET_OFFSET,
    VNET_BYTES,
)
from vpnd.packet.ring import Producer

_LEAST = VNET_BYTES + MIN_PACKET_BYTES
_MOST = MAX_RECORD_BYTES - LENGTH_BYTES


class Reassembly:
    """The beginning of a record whose rest has not come yet; one for each stream of a session."""

    __slots__ = ("bytes", "packets", "partial")

    def __init__(self) -> None:
        self.partial = bytearray()
        self.packets = self.bytes = 0


class Inbound:
    """Stage 6, for all sessions of a shard. Owner: shard loop."""

    def __init__(
        self, producer: Producer, own: Prefixes[bool], drops: dict[str, int], publish_bytes: int
    ) -> None:
        self.producer = producer
        self._own, self._drops = own, drops
        self._publish_bytes = publish_bytes
        self.packets_received = self.bytes_received = 0
        self.packets_to_tun = self.bytes_to_tun = 0

    def room_for(self, reassembly: Reassembly, view: memoryview) -> bool:
        """Whether `deliver` of this would find room in the ring."""
        return self.producer.reserve(len(view) + len(reassembly.partial)) >= 0

    def deliver_untrusted(self, sources: Prefixes[bool], reassembly: Reassembly, view: memoryview) -> None:
        """Take payload bytes of a stream: whole records go into the ring, the rest is kept for the next call.

        `sources` are what the peer may use. borrowed: `view`, until this returns. Call only when `room_for` says so.
        Raises RemoteProtocolError when a record's length is impossible: nothing behind it can be read.
        """
        end = len(view)
        position = 0
        if reassembly.partial:
            position = self._complete_untrusted(sources, reassembly, view)
            if position < 0:
                return
        length_at = LENGTH.unpack_from
        own, drops = self._own, self._drops
        run = position  # beginning of the run of good records
        good = packets = 0
        begun = position
        while position + LENGTH_BYTES <= end:
            (count,) = length_at(view, position)
            if not _LEAST <= count <= _MOST:
                self._copy(view, run, position, good)
                raise RemoteProtocolError(f"a record of {count} bytes")
            following = position + LENGTH_BYTES + count
            if following > end:
                break
            packets += 1
            reason = ""
            try:
                version, source, destination = inspect_untrusted(view, position + LENGTH_BYTES, count)
                if not sources.find(version, source):
                    reason = "source_not_allowed"
                elif not own.find(version, destination):
                    reason = "destination_not_ours"
            except BadPacket as bad:
                reason = bad.reason
            if reason:
                drops[reason] += 1
                self._copy(view, run, position, good)
                run, good = following, 0
            else:
                good += 1
            position = following
        self._copy(view, run, position, good)
        size = position - begun - packets * PACKET_OFFSET
        self.packets_received += packets
        self.bytes_received += size
        reassembly.packets += packets
        reassembly.bytes += size
        if position < end:
            reassembly.partial += view[position:end]
        if self.producer.unpublished >= self._publish_bytes:
            self.producer.publish()

    def _complete_untrusted(self, sources: Prefixes[bool], reassembly: Reassembly, view: memoryview) -> int:
        """Finish the record begun earlier: how many bytes of `view` that took, -1 when it is still not whole."""
        partial = reassembly.partial
        used = 0
        if len(partial) < LENGTH_BYTES:
            used = min(LENGTH_BYTES - len(partial), len(view))
            partial += view[:used]
            if len(partial) < LENGTH_BYTES:
                return -1
        (count,) = LENGTH.unpack_from(partial)
        if not _LEAST <= count <= _MOST:
            raise RemoteProtocolError(f"a record of {count} bytes")
        wanted = LENGTH_BYTES + count - len(partial)
        partial += view[used : used + wanted]
        if len(view) - used < wanted:
            return -1
        reassembly.partial = bytearray()
        with memoryview(partial) as whole:
            self.deliver_untrusted(sources, reassembly, whole)
        return used + wanted

    def _copy(self, view: memoryview, start: int, end: int, packets: int) -> None:
        if not packets:
            return
        producer = self.producer
        size = end - start
        offset = producer.reserve(size)
        producer.buffer[offset : offset + size] = view[start:end]
        producer.commit(size)
        self.packets_to_tun += packets
        self.bytes_to_tun += size - packets * PACKET_OFFSET

    def publish(self) -> None:
        """The end of a batch: let the supervisor see it."""
        if self.producer.unpublished:
            self.producer.publish()
