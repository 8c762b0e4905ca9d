"""A packet's life, in the shard, inbound: from a session to the TUN.

    5. decrypt, take frames apart                 (shards/session/link.py, shards/stream)
    6. check, write into the TUN            *     per record

Each record is checked for itself (virtio_net_hdr against packet, source against what the peer may use, but for ICMP
errors of routers behind it, destination against what is ours), so a superpacket pays once; then it goes into the TUN
straight from where it was decrypted to, without a copy and without waking another process: some quarter more datagrams
a second and less round trip than through a ring back to the supervisor (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable

from shards.budget import Budget
from shards.counters import Counts, Dropping, Traffic
from shards.flow.prefixes import Prefixes
from vpnd.errors import BadPacket, RemoteProtocolError
from vpnd.packet import icmp
from vpnd.packet.offload import inspect_untrusted
from vpnd.packet.record import (
    LENGTH,
    LENGTH_BYTES,
    MAX_RECORD_BYTES,
    MIN_PACKET_BYTES,
    PACKET_OFFSET,
    VNET_BYTES,
)

_length_at = LENGTH.unpack_from
_LEAST = VNET_BYTES + MIN_PACKET_BYTES
_MOST = MAX_RECORD_BYTES - LENGTH_BYTES


class Reassembly:
    """The beginning of a record whose rest has not come yet, and what came before; one for each stream of a
    session. `budget` and `drops`: the peer's."""

    __slots__ = ("_budget", "bytes", "drops", "packets", "partial", "segments")

    def __init__(self, budget: Budget, drops: Dropping) -> None:
        self.partial = bytearray()
        self.packets = self.segments = self.bytes = 0
        self._budget, self.drops = budget, drops

    def keep(self, part: memoryview) -> None:
        """More of a record that is not whole yet. Raises FloodError: the peer leaves too many unfinished."""
        self._budget.hold(len(part))
        self.partial += part

    def take(self) -> bytearray:
        """What was kept, which is not kept any more."""
        partial, self.partial = self.partial, bytearray()
        self._budget.hold(-len(partial))
        return partial


def received(reassembly: Reassembly) -> Traffic:
    """What it has taken."""
    return Traffic(
        bytes_received=reassembly.bytes,
        packets_received=reassembly.packets,
        segments_received=reassembly.segments,
    )


class Inbound:
    """Stage 6, for all sessions of a shard. Owner: shard loop.

    `write(record)` gets the virtio_net_hdr and the packet behind it, borrowed until it returns; OSError is a
    packet that the kernel refused. `local`: what packets may be addressed to; may be replaced at any time.
    """

    def __init__(self, write: Callable[[memoryview], object], local: Prefixes[bool], counts: Counts) -> None:
        self._write, self.local, self._counts = write, local, counts

    def deliver_untrusted(
        self, sources: Prefixes[bool], reassembly: Reassembly, view: memoryview, most: int
    ) -> tuple[int, int]:
        """Take payload bytes of a stream: whole records go into the TUN, the rest is kept for the
        next call. After `most` records it stops, or one more: how far it has got, and how many records there were.

        `sources` are what the peer may use. borrowed: `view`, until this returns.
        Raises RemoteProtocolError when a record's length is impossible: nothing behind it can be read.
        """
        end = len(view)
        position = 0
        if reassembly.partial:
            position = self._complete_untrusted(sources, reassembly, view)
        write, local, allowed = self._write, self.local.find, sources.find
        begun = position
        packets = refused = refused_bytes = segments = 0
        while position + LENGTH_BYTES <= end and packets < most:
            (count,) = _length_at(view, position)
            if not _LEAST <= count <= _MOST:
                raise RemoteProtocolError(f"a record of {count} bytes")
            start = position + LENGTH_BYTES
            following = start + count
            if following > end:
                break
            position = following
            packets += 1
            try:
                version, source, destination, whole = inspect_untrusted(view, start, count)
                segments += whole
                if not allowed(version, source) and not self._of_router_untrusted(
                    sources, destination, view[start + VNET_BYTES : following]
                ):
                    reason = "source_not_allowed"
                elif not local(version, destination):
                    reason = "destination_not_ours"
                else:
                    write(view[start:following])
                    continue
                reassembly.drops.span(reason, view, start - LENGTH_BYTES, following, 1)
            except BadPacket as bad:
                segments += 1
                reassembly.drops.plain(bad.reason)
            except OSError:  # the device is going down, or an offload this kernel does not know
                reassembly.drops.span("tun_write_failed", view, start - LENGTH_BYTES, following, 1)
            refused += 1
            refused_bytes += count - VNET_BYTES
        size = position - begun - packets * PACKET_OFFSET
        counts = self._counts
        counts.packets_received += packets
        counts.bytes_received += size
        counts.segments_received += segments
        if refused:
            counts.refused += refused
            counts.refused_bytes += refused_bytes
        reassembly.packets += packets
        reassembly.segments += segments
        reassembly.bytes += size
        if position < end and packets < most:
            reassembly.keep(view[position:end])
            position = end
        return position, packets

    def _of_router_untrusted(self, sources: Prefixes[bool], destination: int, packet: memoryview) -> bool:
        """Whether it is what a router behind the peer may send, from whatever address it has: an ICMP error about a
        packet from the very address it goes to, ours, to one that is the peer's."""
        try:
            version, sender, target = icmp.quoted_untrusted(packet)
        except BadPacket:
            return False
        return sender == destination and bool(sources.find(version, target))

    def _complete_untrusted(self, sources: Prefixes[bool], reassembly: Reassembly, view: memoryview) -> int:
        """Finish the record begun earlier: how many bytes of `view` that took, all when it is still not whole."""
        used = min(max(LENGTH_BYTES - len(reassembly.partial), 0), len(view))
        reassembly.keep(view[:used])
        if len(reassembly.partial) < LENGTH_BYTES:
            return used
        (count,) = LENGTH.unpack_from(reassembly.partial)
        if not _LEAST <= count <= _MOST:
            raise RemoteProtocolError(f"a record of {count} bytes")
        wanted = LENGTH_BYTES + count - len(reassembly.partial)
        reassembly.keep(view[used : used + wanted])
        if len(view) - used >= wanted:
            with memoryview(reassembly.take()) as whole:
                self.deliver_untrusted(sources, reassembly, whole, 1)
        return min(used + wanted, len(view))
