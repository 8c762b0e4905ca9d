"""A lane: one open stream of a link, as flows see it. What they are pinned to, and what the stream pool
keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shards.flow.flows import STAY, Chunk, Flow, FlowTable
from shards.inbound import Reassembly
from shards.stream.yamux import Stream
from vpnd.packet.capability import Capabilities
from vpnd.packet.flow import key_of
from vpnd.packet.record import LENGTH, LENGTH_BYTES, PACKET_OFFSET, VNET_BYTES

if TYPE_CHECKING:
    from shards.session.link import Link


class Lane:
    """Owner: its link. It is used both ways: both nodes pin flows to it, whoever opened the stream.

    `adapt_to`: what the peer's TUN takes, if less than ours gives. `leaving`: its flows are on their way to
    other lanes. `reassembly` is the other direction: what the peer sends on the stream. `active_s`: when the
    pool last saw traffic.
    """

    __slots__ = (
        "active_s",
        "adapt_to",
        "closed",
        "flows",
        "leaving",
        "link",
        "movable_before_s",
        "packets_sent",
        "reassembly",
        "seen_packets",
        "stream",
    )
    holding = False

    def __init__(self, link: Link, stream: Stream, adapt_to: Capabilities | None, now_s: float) -> None:
        self.link, self.stream, self.adapt_to = link, stream, adapt_to
        self.flows: set[Flow] = set()
        self.movable_before_s = STAY
        self.reassembly = Reassembly()
        self.closed = self.leaving = False
        self.packets_sent = self.seen_packets = 0
        self.active_s = now_s

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        """See Sink. A lane that has closed while a batch was on its way to it sends the batch back."""
        if self.closed:
            self.link.events.dispatch(Chunk(buffer, start, end, packets, self.link.now()))
        else:
            self.link.send(self, buffer, start, end, packets)

    def flush(self) -> None:
        """See Sink."""
        if not self.closed:
            self.link.flush()

    def queue_span(self, flows: FlowTable, buffer: memoryview, start: int, end: int, now_s: float) -> None:
        """Put the records of buffer[start:end] into the link's queue, cut by flow: from here on each waits for its
        turn."""
        put = self.link.queue.put
        position = begin = start
        last, packets = -1, 0
        while position < end:
            (count,) = LENGTH.unpack_from(buffer, position)
            key = key_of(buffer, position + PACKET_OFFSET, count - VNET_BYTES)
            if key != last and packets:
                put(self._worker(flows, last, now_s), Chunk(buffer, begin, position, packets, now_s))
                begin, packets = position, 0
            last = key
            packets += 1
            position += LENGTH_BYTES + count
        put(self._worker(flows, last, now_s), Chunk(buffer, begin, end, packets, now_s))

    def _worker(self, flows: FlowTable, key: int, now_s: float) -> Flow:
        """The flow's worker, which is pinned here unless it was forgotten within this very batch."""
        flow = flows.flows.get(key) or flows.open(key, now_s)
        if flow.sink is not self:
            flow.pin(self)
        return flow

    def idle_since(self, now_s: float) -> float:
        """Since when nothing has gone either way and no flow was here; asked for now and then by the pool."""
        packets = self.packets_sent + self.reassembly.packets
        if packets != self.seen_packets or self.flows:
            self.seen_packets, self.active_s = packets, now_s
        return self.active_s
