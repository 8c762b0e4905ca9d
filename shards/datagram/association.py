"""One association: datagrams between this shard and one of the peer's, beside a session and with keys made of its own.

    records ─ seal() ─▶ ┌─────────────┐ ─▶ Batch ─▶ socket          probes, answers ─ seal_probe() ─▶ Batch
                        │ Association │
    records ◀─ deliver ─└─────────────┘ ◀─ receive_untrusted() ─ socket

It knows no socket, loop or clock. Nothing is answered that does not authenticate, and nothing is remembered of it.
"""

from __future__ import annotations

from collections.abc import Callable

from shards.datagram import spec
from shards.datagram.path import Address, Path, Probe
from shards.datagram.sealing import Batch, Opener, Sealer
from vpnd.config.live import Live
from vpnd.errors import BadPacket, RemoteProtocolError
from vpnd.packet import ecn
from vpnd.packet.offload.slices import OFFSET_MASK, Joiner
from vpnd.packet.record import LENGTH
from vpnd.packet.ring import lazy_buffer
from vpnd.session import Established

_RECORDS, _SLICED = spec.RECORDS, spec.SLICED
_word_from = LENGTH.unpack_from


class Plain:
    """Where datagrams are opened and slices joined: one for all associations of a shard, which take turns."""

    def __init__(self, size: int) -> None:
        self.view = lazy_buffer(size)
        self.joiner = Joiner()
        self.joins: Association | None = None  # whose slices are in the joiner
        self.marked = False  # of congestion: all of them, or none

    def finish(self) -> None:
        """Deliver what is joined. Raises what `deliver` raises."""
        joins, self.joins = self.joins, None
        if joins is not None and len(record := self.joiner.finish()):
            joins.deliver(record)


class Association:
    """Owner: the session's link. `receiver`: the id that the peer has told. `candidates`, `draw`: see Path.

    `deliver(records)` gets whole records, which are a peer's word, borrowed until it returns; `bad(reason)` is told of
    a slice that is none. `used`: see `use`; the owner sets it to False when it calls Path.step. `alone`: the session
    has ended, and the peer is told so; `peer_alone`: the peer has said so. `seen_port`: from which it
    sees us come, 0: it has not said so.
    """

    def __init__(
        self,
        live: Live,
        established: Established,
        receiver: int,
        candidates: tuple[Address, ...],
        plain: Plain,
        deliver: Callable[[memoryview], None],
        bad: Callable[[str], None],
        draw: Callable[[], int],
        now_s: float,
    ) -> None:
        self.path = Path(live, candidates, draw, now_s, second=not established.initiator)
        self.deliver = deliver
        self.opener = Opener(established.cipher, established.receive_key)
        self.used = self.alone = self.peer_alone = False
        self.seen_port = 0
        self._sealer = Sealer(established.cipher, established.send_key, receiver)
        self._plain, self._bad = plain, bad

    @property
    def sent(self) -> int:
        """Datagrams, probes and answers among them."""
        return self._sealer.counter

    # --- out

    def seal(self, batch: Batch, ring: memoryview, start: int, end: int) -> tuple[int, int]:
        """As Sealer.seal_records, for the path as it is."""
        tail, counter = batch.tail, self._sealer.counter
        room = self.path.size - spec.OVERHEAD_BYTES
        position, records = self._sealer.seal_records(batch, ring, start, end, room)
        self.path.pace.spent(batch.tail - tail, self._sealer.counter - counter)
        return position, records

    def use(self, now_s: float) -> None:
        """Something is about to be sealed, and `used` is False: the path is looked at sooner, see Path.next_s."""
        self.used = True
        self.path.hurry(now_s)

    def fits(self, record_bytes: int) -> bool:
        """Whether a record that is no superpacket fits into a datagram."""
        return record_bytes <= self.path.size - spec.OVERHEAD_BYTES

    def seal_probe(self, batch: Batch, probe: Probe) -> None:
        """One of `path.probes`. The batch has room for it."""
        opener = self.opener
        word = spec.PROBE_WORD | (0 if probe.token else spec.ANSWER) | (spec.ALONE if self.alone else 0)
        highest = max(opener.top, 0)
        port = 0 if probe.token else probe.address[1]
        body = spec.PROBE.pack(word, probe.token or probe.answers, highest, opener.received, port)
        self._sealer.seal(batch, body + bytes(probe.size - spec.OVERHEAD_BYTES - len(body)))

    # --- in

    def receive_untrusted(
        self,
        view: memoryview,
        start: int,
        end: int,
        segment: int,
        address: Address,
        marked: bool,
        now_s: float,
    ) -> None:
        """Take the datagrams in view[start:end], each of `segment` bytes but for a smaller last one, from `address`.
        `marked`: their way is congested (vpnd/packet/ecn.py).

        What came is delivered when this returns, but for a superpacket whose next slice may be in the next call: see
        Plain.finish. Raises RemoteProtocolError: the peer, which has the keys, does not keep to the protocol.
        """
        plain, joiner = self._plain.view, self._plain.joiner
        if self._plain.joins is not self or self._plain.marked != marked:
            self._plain.finish()
        opener, path = self.opener, self.path
        open_untrusted = opener.open_untrusted
        top = opener.top
        into = 0  # whole records wait in plain[:into]
        while start < end:
            stop = min(start + segment, end)
            counter, size = open_untrusted(view, start, stop, plain, into)
            start = stop
            if size < 0:
                continue
            kind = plain[into]
            if kind == _RECORDS:
                if joiner.active:
                    self._plain.finish()
                into += size
                continue
            body = plain[into : into + size]
            if kind == _SLICED:
                if into:
                    self._deliver_untrusted(plain[:into], marked)
                    into = 0
                self._take_slice_untrusted(counter, body, marked)
            elif kind == spec.PROBED:
                self._take_probe_untrusted(body, address, now_s)
            else:
                raise RemoteProtocolError(f"a datagram of kind {kind}")
        if into:
            self._deliver_untrusted(plain[:into], marked)
        if opener.top > top and address != path.address:
            path.heard(address, now_s)

    def _deliver_untrusted(self, records: memoryview, marked: bool) -> None:
        if marked:
            ecn.mark_records_untrusted(records)
        self.deliver(records)

    def _take_slice_untrusted(self, counter: int, body: memoryview, marked: bool) -> None:
        joiner = self._plain.joiner
        offset = _word_from(body)[0] & OFFSET_MASK
        try:
            if joiner.continues(counter, offset):
                joiner.append_untrusted(body)
            else:
                self._plain.finish()
                if marked:
                    ecn.mark_records_untrusted(body)
                joiner.begin_untrusted(counter, offset, body)
                self._plain.joins, self._plain.marked = self, marked
        except BadPacket as bad:
            self._bad(bad.reason)

    def _take_probe_untrusted(self, body: memoryview, address: Address, now_s: float) -> None:
        if len(body) < spec.PROBE_BYTES:
            raise RemoteProtocolError(f"a probe of {len(body)} bytes")
        word, token, highest, received, port = spec.PROBE.unpack_from(body)
        path = self.path
        self.peer_alone = bool(word & spec.ALONE)
        if highest < self._sealer.counter:
            path.told(highest, received, now_s)
        if word & spec.ANSWER:
            self.seen_port = port
            path.answered(address, token, now_s)
        else:
            path.asked(address, token, now_s)
