"""A packet's life, in the shard, inbound: from a session to the TUN.

    5. decrypt, take frames apart                 (shards/session/link.py, shards/stream)
    6. check, write into the TUN            *     per record

Each record is checked for itself (virtio_net_hdr against packet, source against what the peer may use,
destination against what is ours), so a superpacket pays once; then it goes into the TUN straight from where it
was decrypted to, without a copy and without waking another process: some quarter more datagrams a second and
less round trip than through a ring back to the supervisor (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable

from shards.counters import Counts
from shards.flow.prefixes import Prefixes
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

_LEAST = VNET_BYTES + MIN_PACKET_BYTES
_MOST = MAX_RECORD_BYTES - LENGTH_BYTES


class Reassembly:
    """The beginning of a record whose rest has not come yet, and what came before; one for each stream of a
    session."""

    __slots__ = ("bytes", "packets", "partial")

    def __init__(self) -> None:
        self.partial = bytearray()
        self.packets = self.bytes = 0


class Inbound:
    """Stage 6, for all sessions of a shard. Owner: shard loop.

    `write(record)` gets the virtio_net_hdr and the packet behind it, borrowed until it returns; OSError is a
    packet that the kernel refused. `local`: what packets may be addressed to; may be replaced at any time.
    """

    def __init__(self, write: Callable[[memoryview], object], local: Prefixes[bool], counts: Counts) -> None:
        self._write, self.local, self._counts = write, local, counts

    def deliver_untrusted(self, sources: Prefixes[bool], reassembly: Reassembly, view: memoryview) -> None:
        """Take payload bytes of a stream: whole records go into the TUN, the rest is kept for the next call.

        `sources` are what the peer may use. borrowed: `view`, until this returns.
        Raises RemoteProtocolError when a record's length is impossible: nothing behind it can be read.
        """
        end = len(view)
        position = 0
        if reassembly.partial:
            position = self._complete_untrusted(sources, reassembly, view)
            if position < 0:
                return
        length_at, write, inspect = LENGTH.unpack_from, self._write, inspect_untrusted
        counts, local = self._counts, self.local.find
        drops = counts.drops
        allowed = sources.find
        begun = position
        packets = good = good_bytes = 0
        while position + LENGTH_BYTES <= end:
            (count,) = length_at(view, position)
            if not _LEAST <= count <= _MOST:
                raise RemoteProtocolError(f"a record of {count} bytes")
            start = position + LENGTH_BYTES
            following = start + count
            if following > end:
                break
            position = following
            packets += 1
            try:
                version, source, destination = inspect(view, start, count)
            except BadPacket as bad:
                drops[bad.reason] += 1
                continue
            if not allowed(version, source):
                drops["source_not_allowed"] += 1
                continue
            if not local(version, destination):
                drops["destination_not_ours"] += 1
                continue
            try:
                write(view[start:following])
            except OSError:  # the device is going down, or an offload this kernel does not know
                drops["tun_write_failed"] += 1
                continue
            good += 1
            good_bytes += count
        size = position - begun - packets * PACKET_OFFSET
        counts.packets_received += packets
        counts.bytes_received += size
        counts.packets_to_tun += good
        counts.bytes_to_tun += good_bytes - good * VNET_BYTES
        reassembly.packets += packets
        reassembly.bytes += size
        if position < end:
            reassembly.partial += view[position:end]

    def _complete_untrusted(self, sources: Prefixes[bool], reassembly: Reassembly, view: memoryview) -> int:
        """Finish the record begun earlier: how many bytes of `view` that took, -1 when it is still not
        whole."""
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
