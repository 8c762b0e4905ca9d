"""The fair queue in front of a session: what waits because the socket or the peer's window is full.

Flow queuing with controlled delay, after RFC 8290 (FQ-CoDel) and RFC 8289 (CoDel), with flows instead of hashed
buckets. Every waiting flow has its turn (deficit round robin, session.quantum_bytes a round), flows that have
just begun to wait before those that have waited through a round: a small flow passes a bulk one. In each flow
the oldest packet's waiting time is held near session.delay_target by dropping from the front, which makes a
TCP sender slow down early; or by marking, where the sender heeds that (ECN).

    new ──▶ first turn ──▶ old ──▶ turn ──▶ old … ──▶ empty: out

    bound            what is dropped                                           reason
    worker.buffer_size packets a flow  the packet that comes                    flow_full
    session.queue_bytes in all         from the front of a flow that has much   queue_full
    session.delay_target               from the front, at CoDel's pace          queue_delay

No clock and no socket in it: time is an argument, in seconds.
"""

from __future__ import annotations

import itertools
from collections import deque
from math import sqrt

from shards.counters import Dropping
from shards.flow.flows import SPAN_BYTES, Backlog, Chunk, Flow, FlowTable, Sink
from vpnd.config.live import Live
from vpnd.packet import ecn
from vpnd.packet.flow import key_of
from vpnd.packet.record import LENGTH, LENGTH_BYTES, PACKET_OFFSET, VNET_BYTES

#: RFC 8289, section 5.5: for so many intervals the pace of the last dropping is remembered.
_MEMORY_INTERVALS = 16
#: Flows looked at for a big one when all is full: more would make a flood dear, fewer would hit small flows.
_LOOKED_AT = 8


class FairQueue:
    """All waiting packets of one session. Owner: the link. `drops` counts packets by reason."""

    def __init__(self, live: Live, drops: Dropping) -> None:
        self._live, self._drops = live, drops
        self._new: deque[Flow] = deque()
        self._old: deque[Flow] = deque()
        self._blocked: deque[Flow] = deque()
        self.bytes = self.packets = 0
        #: how long the chunk that was sent last had waited, and the least of it since `least_delay_s` was asked
        self.delay_s = 0.0
        self._least_s: float | None = None

    def __bool__(self) -> bool:
        return self.packets > 0

    def put(self, flow: Flow, chunk: Chunk) -> None:
        """Queue records of one flow, behind what waits of it; or drop, and count, what there is no room for."""
        session = self._live.config.session
        backlog = flow.backlog
        if backlog is None:
            backlog = flow.backlog = Backlog()
        if backlog.packets + chunk.packets > self._live.config.worker.buffer_size:
            chunk.drop(self._drops, "flow_full")
            flow.dropped += chunk.packets
            return
        while self.bytes + len(chunk) > session.queue_bytes:
            if not self._shed():  # nothing left to take it from: the chunk alone is too large
                chunk.drop(self._drops, "queue_full")
                flow.dropped += chunk.packets
                return
        backlog.chunks.append(chunk)
        self._count(backlog, len(chunk), chunk.packets)
        if backlog.queue is not self:
            backlog.queue = self
            backlog.deficit = session.quantum_bytes
            self._new.append(flow)

    def put_span(
        self, flows: FlowTable, sink: Sink, buffer: memoryview, start: int, end: int, now_s: float
    ) -> None:
        """Queue the records of buffer[start:end], cut by flow, and into pieces of SPAN_BYTES: from here on each waits
        for its turn. The flows are pinned to `sink`, or were forgotten within this very batch."""
        position = begin = start
        last, packets = -1, 0
        while position < end:
            (count,) = LENGTH.unpack_from(buffer, position)
            key = key_of(buffer, position + PACKET_OFFSET, count - VNET_BYTES)
            following = position + LENGTH_BYTES + count
            if packets and (key != last or following - begin > SPAN_BYTES):
                self.put(flows.pinned(last, sink, now_s), Chunk(buffer, begin, position, packets, now_s))
                begin, packets = position, 0
            last = key
            packets += 1
            position = following
        self.put(flows.pinned(last, sink, now_s), Chunk(buffer, begin, end, packets, now_s))

    def first(self, now_s: float) -> Flow | None:
        """The flow whose turn it is; its next chunk is backlog.chunks[0]. None when nothing can be sent.

        Drops what CoDel wants dropped. Call `sent` or `block` before the next call.
        """
        quantum = self._live.config.session.quantum_bytes
        while True:
            line = self._new or self._old
            if not line:
                return None
            flow = line[0]
            backlog = flow.backlog
            assert backlog is not None  # it was queued by put
            if backlog.queue is not self:  # it has moved to another session since it was emptied
                line.popleft()
                continue
            if backlog.deficit <= 0:
                backlog.deficit += quantum
                line.popleft()
                self._old.append(flow)
                continue
            if backlog.chunks:
                self._control_delay(flow, backlog, now_s)
            if backlog.chunks:
                return flow
            line.popleft()
            if line is self._new and self._old:
                # RFC 8290, section 4.2: once through the old ones, or it would come back as new and starve
                # them.
                self._old.append(flow)
            else:
                backlog.queue = None

    def sent(self, flow: Flow, now_s: float) -> None:
        """The first chunk of `flow`, the one `first` gave, is on its way."""
        backlog = flow.backlog
        assert backlog is not None
        chunk = backlog.chunks.popleft()
        backlog.deficit -= len(chunk)
        self._count(backlog, -len(chunk), -chunk.packets)
        self.delay_s = now_s - chunk.since_s
        if self._least_s is None or self.delay_s < self._least_s:
            self._least_s = self.delay_s

    def block(self, flow: Flow) -> None:
        """The peer takes no more on the stream of `flow`, which `first` gave: others may go on until
        `unblock`."""
        (self._new or self._old).popleft()
        self._blocked.append(flow)

    def unblock(self) -> None:
        self._old.extendleft(reversed(self._blocked))
        self._blocked.clear()

    def take_all(self, flows: set[Flow] | None = None) -> list[Chunk]:
        """Take out everything, or everything of `flows`; a flow's chunks are in order."""
        taken: list[Chunk] = []
        for line in (self._new, self._old, self._blocked):
            kept = []
            for flow in line:
                backlog = flow.backlog
                if backlog is None or backlog.queue is not self:
                    continue
                if flows is not None and flow not in flows:
                    kept.append(flow)
                    continue
                taken += backlog.chunks
                backlog.chunks.clear()
                backlog.queue = None
                self._count(backlog, -backlog.bytes, -backlog.packets)
            line.clear()
            line.extend(kept)
        return taken

    def least_delay_s(self) -> float | None:
        """The least waiting time of what was sent since the last call; None when nothing had to wait."""
        least, self._least_s = self._least_s, None
        return least

    # --- within

    def _count(self, backlog: Backlog, size: int, packets: int) -> None:
        backlog.bytes += size
        backlog.packets += packets
        self.bytes += size
        self.packets += packets

    def _drop(self, flow: Flow, backlog: Backlog, reason: str) -> None:
        """Drop the oldest packet of a flow."""
        chunk = backlog.chunks[0]
        if chunk.packets > 1:
            self._count(backlog, -chunk.drop_first(self._drops, reason), -1)
        else:
            backlog.chunks.popleft()
            self._count(backlog, -len(chunk), -1)
            chunk.drop(self._drops, reason)
        flow.dropped += 1

    def _shed(self) -> bool:
        """Drop one packet of the largest of a few flows of each line. False when nothing of theirs waits."""
        largest: Backlog | None = None
        owner: Flow | None = None
        lines = (self._old, self._blocked, self._new)
        for flow in [flow for line in lines for flow in itertools.islice(line, _LOOKED_AT)]:
            backlog = flow.backlog
            if backlog is None or backlog.queue is not self or not backlog.chunks:
                continue
            if largest is None or backlog.bytes > largest.bytes:
                owner, largest = flow, backlog
        # The next look is at others: whoever is large gets its share of the losses.
        for line in lines:
            line.rotate(-1)
        if owner is None or largest is None:
            return False
        self._drop(owner, largest, "queue_full")
        return True

    def _control_delay(self, flow: Flow, backlog: Backlog, now_s: float) -> None:
        """RFC 8289, section 5: drop while the oldest packet has waited above the target for a whole
        interval."""
        session = self._live.config.session
        interval_s = session.delay_interval
        if not self._late(backlog, now_s):
            backlog.dropping = False
            return
        if backlog.dropping:
            while backlog.dropping and now_s >= backlog.drop_s:
                marked = self._mark_or_drop(flow, backlog)
                backlog.count += 1
                if marked or self._late(backlog, now_s):
                    backlog.drop_s += interval_s / sqrt(backlog.count)
                else:
                    backlog.dropping = False
                if marked:
                    break
        elif now_s >= backlog.above_s:
            self._mark_or_drop(flow, backlog)
            backlog.dropping = True
            # Dropping that ended a moment ago goes on near the pace it had: the RFC's memory of the last run.
            recent = now_s - backlog.drop_s < _MEMORY_INTERVALS * interval_s
            backlog.count = max(1, backlog.count - 2) if recent and backlog.count > 2 else 1
            backlog.drop_s = now_s + interval_s / sqrt(backlog.count)

    def _mark_or_drop(self, flow: Flow, backlog: Backlog) -> bool:
        """The oldest packet tells its sender of the queue. Whether it does so by a mark."""
        chunk = backlog.chunks[0]
        if ecn.mark_untrusted(chunk.buffer, chunk.start + PACKET_OFFSET):
            return True
        self._drop(flow, backlog, "queue_delay")
        return False

    def _late(self, backlog: Backlog, now_s: float) -> bool:
        """Whether the oldest packet waits above the target; notes since when that is so."""
        session = self._live.config.session
        if (
            not backlog.chunks
            or now_s - backlog.chunks[0].since_s < session.delay_target
            or backlog.bytes <= session.quantum_bytes  # one superpacket or so is no queue
        ):
            backlog.above_s = 0.0
            return False
        if not backlog.above_s:
            backlog.above_s = now_s + session.delay_interval
        return True
