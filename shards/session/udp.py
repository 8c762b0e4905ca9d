"""The UDP socket of a shard, on its loop: datagrams of all its associations, in and out, many in a system call.

Where the kernel has them, UDP_SEGMENT sends a run of equal datagrams in one call, and UDP_GRO gives several that came
together. What a full socket does not take stays sealed, and all associations wait until it is out.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

from shards.budget import Budget
from shards.counters import Counts
from shards.datagram import spec
from shards.datagram.association import Association, Plain
from shards.datagram.path import Address, Probe
from shards.datagram.sealing import Batch
from vpnd.api.aio import Descriptors
from vpnd.config.live import Live
from vpnd.packet import ecn
from vpnd.packet.record import MAX_RECORD_BYTES
from vpnd.packet.ring import lazy_buffer

#: Linux, include/uapi/linux/udp.h.
_UDP_SEGMENT, _UDP_GRO = 103, 104
#: With a read come the size of what was merged, and the ECN bits, for which the supervisor asked.
_ANCILLARY_BYTES = 2 * socket.CMSG_SPACE(4)
#: A read gives one datagram, or several merged to at most this; so many reads before other work, and with those of
#: which nothing is taken: they cost little, and as long as they lie in the kernel, what others sent lies behind them.
_READ_BYTES = 1 << 16
_READS, _MOST_READS = 4, 64
#: Of a batch, what a span of records takes at most when it is sealed, in datagrams of the smallest size.
_SPAN_BYTES = MAX_RECORD_BYTES * 5 // 4
_BATCH_BYTES = 3 * _SPAN_BYTES
#: No session's receiver id.
_NOBODY = 0


class Taker(Protocol):
    """Who has an association with this socket. `budget`: its peer's."""

    association: Association

    @property
    def budget(self) -> Budget: ...

    def take(
        self,
        view: memoryview,
        start: int,
        end: int,
        segment: int,
        address: Address,
        marked: bool,
        now_s: float,
    ) -> bool:
        """See Association.receive_untrusted; it raises nothing. False: the peer has had its turn, so they wait for the
        next one, or there were too many."""

    @property
    def behind(self) -> bool:
        """Whether more came than its turn was long."""

    def go_on(self, now_s: float) -> None:
        """Another turn has begun: take what was too much for the last one."""

    def taken(self, now_s: float) -> None:
        """All that came in this turn was given to `take`."""

    def socket_free(self) -> None:
        """It was full, and takes more."""

    def refused(self, size: int) -> None:
        """Datagrams of this size are too large for this machine's link."""


class DatagramSocket:
    """Owner: the shard. `sock` is bound and non-blocking; `number` is its place among those of the port, `port` what
    peers are told; `outside`: what a NAT has made of that, 0 until it is known. `full`: nothing may be sealed for now.
    `turns`: how many there were. `between_turns` is called when there is more, here or in the kernel: see Rest."""

    def __init__(
        self,
        sock: socket.socket,
        descriptors: Descriptors,
        number: int,
        port: int,
        live: Live,
        counts: Counts,
        now: Callable[[], float],
        batch_done: Callable[[], None],
        draw: Callable[[int], int],
        between_turns: Callable[[], None],
    ) -> None:
        self.port, self.outside = port, 0
        self.batch = Batch(_BATCH_BYTES)
        self.plain = Plain(_READ_BYTES + MAX_RECORD_BYTES)
        self.full = False
        self.turns = 0
        self._again: asyncio.Handle | None = None
        self._sock, self._number, self._live, self._counts = sock, number, live, counts
        self._now, self._batch_done, self._draw, self._between_turns = now, batch_done, draw, between_turns
        self._loop, self._descriptors = asyncio.get_running_loop(), descriptors
        self._takers: dict[int, Taker] = {}
        self._buffer = lazy_buffer(_READ_BYTES)
        self._probes = Batch(_READ_BYTES)
        self._batch_of: Taker | None = None
        self._behind: list[Taker] = []
        self._last: Budget | None = None  # of the peer that was heard last
        self._several_until_s = 0.0  # so long more than one is taken to send
        self._segments = True
        try:
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
        except OSError:
            pass  # before Linux 5.0: one datagram a read
        descriptors.add_reader(sock.fileno(), self._read)

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._descriptors.remove_reader(self._sock.fileno())
        self._descriptors.remove_writer(self._sock.fileno())
        self._sock.close()

    # --- associations

    def receiver(self) -> int:
        """An id for an association that nobody has."""
        while True:
            session = self._draw(spec.MAX_SESSION) + 1
            receiver = self._number << spec.SOCKET_SHIFT | session
            if receiver not in self._takers:
                return receiver

    def enter(self, receiver: int, taker: Taker) -> None:
        """From now on `taker` has what comes for `receiver`."""
        self._takers[receiver] = taker

    def leave(self, receiver: int) -> None:
        """Nobody has it any more; harmless if nobody had."""
        taker = self._takers.pop(receiver, None)
        if taker is not None and taker is self._batch_of:
            self._batch_of = None
        if taker is not None and self.plain.joins is taker.association:
            self.plain.joins = None
            self.plain.joiner.finish()

    def address(self, host: str, port: int) -> Address:
        """As this socket takes it and gives it."""
        if self._sock.family == socket.AF_INET:
            return host, port
        return (host if ":" in host else f"::ffff:{host}"), port, 0, 0

    def reaches(self, host: str) -> bool:
        """Whether the socket is of a family that can send there."""
        return ":" not in host or self._sock.family == socket.AF_INET6

    # --- in

    def _read(self) -> None:
        if not self._behind:
            self._turn()

    def _turn(self) -> None:
        """Each peer has the part of it that its sessions have of one; what more came of it waits, or is lost. Where
        others send too it is in their way in the kernel as well, and read nevertheless."""
        now_s, recv, buffer = self._now(), self._sock.recvmsg_into, [self._buffer]
        takers: dict[Taker, None] = {}
        self.turns += 1
        alone = now_s >= self._several_until_s
        for taker in self._behind:
            takers[taker] = None
            taker.go_on(now_s)
        more, taken = True, 0
        for _ in range(_MOST_READS):
            if taken == _READS:
                break
            try:
                count, ancillary, _, address = recv(buffer, _ANCILLARY_BYTES)
            except BlockingIOError:
                more = False
                break
            except OSError:  # told of an earlier datagram of ours, not of what comes
                self._descriptors.again(self._sock.fileno())
                continue
            if not count:
                self._counts.datagrams_unknown += 1
                continue
            segment, marked = count, False
            for level, kind, data in ancillary:
                if kind == _UDP_GRO and level == socket.IPPROTO_UDP:
                    segment = int.from_bytes(data[:4], sys.byteorder)
                else:
                    marked = int.from_bytes(data, sys.byteorder) & ecn.MARKED == ecn.MARKED
            if marked:
                self._counts.datagrams_marked += -(-count // segment)
            any_taken = any_waits = False
            for taker, start, end in self._sorted(count, segment):
                takers[taker] = None
                took = taker.take(self._buffer, start, end, segment, address, marked, now_s)
                any_taken |= took
                any_waits |= not took
            taken += any_taken
            if alone and any_waits:
                break
        self.plain.finish()
        for taker in takers:
            taker.taken(now_s)
            if taker.budget is not self._last:
                self._last, self._several_until_s = taker.budget, now_s + self._live.config.carrier.keepalive
            # Who sees our own port is on our side of a NAT.
            if taker.association.seen_port not in (0, self.port):
                self.outside = taker.association.seen_port
        self._behind = [taker for taker in takers if taker.behind]
        if self._behind:
            self._again = self._loop.call_soon(self._turn)
        self._batch_done()
        if more or self._behind:
            self._between_turns()

    def _sorted(self, count: int, segment: int) -> Iterator[tuple[Taker, int, int]]:
        """What was read, as runs of datagrams for one taker each."""
        view, find, receiver_at = self._buffer, self._takers.get, spec.RECEIVER.unpack_from
        start = 0
        while start < count:
            stop = start + segment
            receiver = _NOBODY
            if count - start >= spec.OVERHEAD_BYTES:
                (receiver,) = receiver_at(view, start)
                while count - stop >= spec.RECEIVER_BYTES and receiver_at(view, stop)[0] == receiver:
                    stop += segment
            stop = min(stop, count)
            taker = find(receiver)
            if taker is None:
                self._counts.datagrams_unknown += -(-(stop - start) // segment)
            else:
                yield taker, start, stop
            start = stop

    # --- out

    def room(self, taker: Taker) -> bool:
        """Whether `taker` may seal a span of records into `batch` now. Others' datagrams go out first."""
        if self.full:
            return False
        if self._batch_of is not taker or self.batch.bytes - self.batch.tail < _SPAN_BYTES:
            self.flush()
            if self.full:
                return False
            self._batch_of = taker
        return True

    def flush(self) -> None:
        """Send what is sealed; the rest when the socket takes more."""
        batch, taker = self.batch, self._batch_of
        if self.full or not batch.tail or taker is None or taker.association.path.address is None:
            if not self.full:
                batch.clear()
            return
        address = taker.association.path.address
        batch.end_run()
        runs = batch.runs
        for place, (begin, end, size, bits) in enumerate(runs):
            try:
                self._send(batch.view[begin:end], size, address, bits)
            except BlockingIOError:
                del runs[:place]
                self.full = True
                self._descriptors.add_writer(self._sock.fileno(), self._on_writable)
                return
            except OSError as error:
                self._counts.datagrams_unsent += -(-(end - begin) // size)
                if error.errno == errno.EMSGSIZE:
                    taker.refused(size)
        batch.clear()

    def _send(self, view: memoryview, size: int, address: Address, bits: int) -> None:
        ancillary = (with_ecn(address, bits),) if bits else ()
        if len(view) > size and self._segments:
            segment = (socket.IPPROTO_UDP, _UDP_SEGMENT, size.to_bytes(2, sys.byteorder))
            try:
                self._sock.sendmsg((view,), (segment, *ancillary), 0, address)
                return
            except OSError as error:
                # Before Linux 4.18, and before 6.11 on devices without checksum offload.
                if error.errno not in (errno.EIO, errno.EINVAL, errno.ENOPROTOOPT):
                    raise
                self._segments = error.errno == errno.EINVAL
        for start in range(0, len(view), size):
            part = view[start : start + size]
            if ancillary:
                self._sock.sendmsg((part,), ancillary, 0, address)
            else:
                self._sock.sendto(part, address)

    def send_probes(self, association: Association) -> None:
        """Send what its path has to ask and to answer. One that cannot be sent is as one that is lost."""
        probes, association.path.probes = association.path.probes, []
        for probe in probes:
            self._send_probe(association, probe)

    def _send_probe(self, association: Association, probe: Probe) -> None:
        association.seal_probe(self._probes, probe)
        try:
            self._sock.sendto(self._probes.view[: self._probes.tail], probe.address)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                association.path.refused(probe.size)
        self._probes.clear()

    def _on_writable(self) -> None:
        self._descriptors.remove_writer(self._sock.fileno())
        self.full = False
        self.flush()
        for taker in list(self._takers.values()):
            if self.full:
                return
            taker.socket_free()


def with_ecn(address: Address, bits: int) -> tuple[int, int, bytes]:
    """What to send with a datagram so that it has these bits; IPv4 of a socket for both versions has IPv4's."""
    host = address[0]
    if ":" in host and not host.startswith("::ffff:"):
        return socket.IPPROTO_IPV6, socket.IPV6_TCLASS, bits.to_bytes(4, sys.byteorder)
    return socket.IPPROTO_IP, socket.IP_TOS, bits.to_bytes(4, sys.byteorder)
