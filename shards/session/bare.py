"""Sessions with nodes of the system vpnd is rebuilt from, which speak bare packets: for moving a network over.

    stream of the sender   multistream-select for /vpn/1.0.0, then frames until FIN
    frame                  length u32, big-endian | IP packet of so many bytes, 20 to 1,400

A stream is used one way, by who opened it. So a link to such a peer has two kinds: lanes, which this node opened and
whose records lose their virtio_net_hdr on the way out, after superpackets have been cut; and streams of the peer, whose
packets get an empty one. A frame of another length ends its stream, since nothing behind it can be read.

Slower than records: each packet is copied once more each way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from shards.budget import Budget
from shards.counters import Dropping
from shards.flow.prefixes import Prefixes
from shards.inbound import Inbound, Reassembly
from shards.session.link import Link, LinkEvents
from shards.session.surroundings import Remote, Surroundings
from shards.session.transport import Transport
from shards.stream.events import StreamClosed, StreamReady
from shards.stream.negotiate import SUBNET_NODE
from shards.stream.session import Session
from shards.stream.spec import SUBNET_NODE_MTU
from shards.stream.yamux import Stream
from vpnd.nat.paths import Path
from vpnd.packet.offload import fit_span
from vpnd.packet.record import LENGTH, LENGTH_BYTES, MIN_PACKET_BYTES, PACKET_OFFSET, VNET_BYTES
from vpnd.packet.ring import SCRATCH

_NO_OFFLOAD = bytes(VNET_BYTES)


class BareFrames:
    """What came on one stream of the peer. `records`: what was delivered. `rest`: the beginning of a frame that is not
    whole yet. `refuse` ends the stream, once. `broken`: it did."""

    __slots__ = ("broken", "records", "refuse", "rest")

    def __init__(self, budget: Budget, drops: Dropping, refuse: Callable[[], None]) -> None:
        self.records, self.rest = Reassembly(budget, drops), Reassembly(budget, drops)
        self.refuse = refuse
        self.broken = False

    def records_untrusted(self, view: memoryview, most: int) -> tuple[bytearray, int]:
        """The packets that are whole now, at most so many, as records; and how far that has got in `view`, of which all
        is taken when there are fewer. borrowed: `view`, until this returns. An impossible length makes it `broken`.
        Raises FloodError: the peer leaves too many unfinished."""
        records = bytearray()
        kept = self.rest.take() if self.rest.partial else b""
        data = memoryview(kept + view) if kept else view
        position, end = 0, len(data)
        while position + LENGTH_BYTES <= end:
            (count,) = LENGTH.unpack_from(data, position)
            if not MIN_PACKET_BYTES <= count <= SUBNET_NODE_MTU:
                self.broken, position = True, end
                break
            following = position + LENGTH_BYTES + count
            if following > end:
                break
            records += LENGTH.pack(VNET_BYTES + count)
            records += _NO_OFFLOAD
            records += data[position + LENGTH_BYTES : following]
            position = following
            most -= 1
            if not most:
                return records, position - len(kept)
        self.rest.keep(data[position:])
        return records, len(view)


class BareInbound:
    """Stage 6 behind bare frames."""

    def __init__(self, inbound: Inbound) -> None:
        self._inbound = inbound

    def deliver_untrusted(
        self, sources: Prefixes[bool], frames: BareFrames, view: memoryview, most: int
    ) -> tuple[int, int]:
        """See Inbound.deliver_untrusted; raises FloodError alone."""
        if frames.broken:
            return len(view), 0
        if most <= 0:
            return 0, 0
        records, reached = frames.records_untrusted(view, most)
        packets = 0
        if records:
            with memoryview(records) as whole:
                _, packets = self._inbound.deliver_untrusted(sources, frames.records, whole, most)
        if frames.broken:
            frames.refuse()
        return reached, packets


def strip(buffer: memoryview, start: int, end: int) -> tuple[memoryview, int, int, int]:
    """The records of buffer[start:end] as frames: (buffer, start, end, records left out), as of fit_span."""
    assert SUBNET_NODE.assumed is not None
    buffer, start, end, unfit = fit_span(buffer, start, end, SUBNET_NODE.assumed)
    frames = bytearray(SCRATCH)
    while start < end:
        (count,) = LENGTH.unpack_from(buffer, start)
        frames += LENGTH.pack(count - VNET_BYTES)
        frames += buffer[start + PACKET_OFFSET : start + LENGTH_BYTES + count]
        start += LENGTH_BYTES + count
    return memoryview(frames), SCRATCH, len(frames), unfit


class BareLink(Link):
    """A session with such a node. Either side opens the streams it sends on, whoever dialed: as a carrier it is always
    this side's."""

    def __init__(
        self,
        transport: Transport,
        session: Session,
        session_id: int,
        peer: Remote,
        events: LinkEvents,
        common: Surroundings,
        path: Path,
    ) -> None:
        super().__init__(transport, session, session_id, True, peer, events, common, path)
        self._inbound = BareInbound(common.inbound)
        self._theirs: dict[Stream, BareFrames] = {}

    def _on_event(self, event: object) -> None:
        match event:
            case StreamReady(stream=stream):
                stream.context = frames = BareFrames(
                    self.peer.budget, self.peer.drops, functools.partial(self._session.reset_stream, stream)
                )
                if stream.ours:
                    frames.broken = True  # the other way is not used
                    self._add_lane(stream, strip)
                else:
                    self._theirs[stream] = frames
            case StreamClosed(stream=stream) if not stream.ours:
                if stream in self._theirs:  # it was agreed on
                    frames = self._theirs.pop(stream)
                    frames.rest.take()
                    self._no_more_of(frames.records)
            case _:
                super()._on_event(event)

    def _receiving(self) -> list[Reassembly]:
        return [frames.records for frames in self._theirs.values()]
