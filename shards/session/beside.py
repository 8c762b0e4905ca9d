"""What goes beside a session: a lane of datagrams, on the asyncio loop.

It has the session's life, its keys come from the session's, and its peer's address and id come by the session's streams
(HELLO). While its path is silent nothing is sent on it but probes; flows are on streams then.

    4. seal, send         *    per span: `submit`; per batch: `flush`, many datagrams in a system call
    5. open, join              `take`, `taken`

What the path's pace or the socket does not take waits in a fair queue, as in front of a session.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from shards.budget import Budget
from shards.counters import Traffic, sent
from shards.datagram.association import Association
from shards.datagram.path import Address
from shards.flow.fair import FairQueue
from shards.flow.flows import SPAN_BYTES, STAY, Chunk, Flow, Sink
from shards.inbound import Reassembly, received
from shards.session.courtesy import Courtesy
from shards.session.health import Stall, StallWatch
from shards.session.surroundings import Fit, Remote, Surroundings
from shards.session.transport import TcpState, Transport
from shards.session.udp import DatagramSocket
from shards.stream.negotiate import Beside
from vpnd.api.reports import DatagramReport
from vpnd.errors import RemoteProtocolError
from vpnd.packet.flow import key_of
from vpnd.packet.record import LENGTH, PACKET_OFFSET, VNET_BYTES, segments
from vpnd.session import Established

#: So often within carrier.stall_timeout a session in doubt is looked at.
_LOOKS = 10
#: What an Opener counts.
_COUNTS = ("received", "missed", "late", "replayed", "forged")


class StreamLane(Sink, Protocol):
    """A stream of the session."""

    leaving: bool


class Session(Protocol):
    """The session that a lane of datagrams is beside: its link."""

    peer: Remote
    packets_sent: int

    @property
    def lanes(self) -> Sequence[StreamLane]: ...

    def fail(self, error: RemoteProtocolError) -> None:
        """The peer has broken the protocol."""

    def datagrams_changed(self) -> None:
        """See DatagramLane.usable: it has changed. Never within a batch."""

    def hold(self, held: bool) -> None:
        """Seal nothing more in streams for now, or go on."""

    def outlive(self, why: str) -> None:
        """The session is to end, and its datagrams live on."""


Carrier = TypeVar("Carrier", bound=Session)


class DatagramLane(Generic[Carrier]):
    """A Lane of datagrams. Owner: its link, which is its `carrier`. Order is not kept, and what is lost is lost.

    `usable`: flows that would rather lose a packet than wait for it may be pinned here. `fit`: see StreamLane.
    `instead`: datagrams reach the peer, and nothing that is sent in the session is acknowledged. `receiver`: the id
    that the peer was told.
    """

    ours = True

    def __init__(
        self,
        carrier: Carrier,
        established: Established,
        ours: int,
        theirs: Beside,
        hosts: Sequence[tuple[str, int]],
        fit: Fit | None,
        socket: DatagramSocket,
        common: Surroundings,
        draw: Callable[[], int],
    ) -> None:
        """`ours`: see `receiver`. `hosts`: where the peer may be."""
        self.carrier = carrier
        self.flows: set[Flow] = set()
        self.movable_before_s, self.most_bytes = STAY, SPAN_BYTES
        self.closed = self.leaving = self.holding = self.usable = self.instead = False
        self.packets_sent = self.segments_sent = self.bytes_sent = 0
        self.reassembly = Reassembly(carrier.peer.budget, carrier.peer.drops)
        self.queue = FairQueue(common.live, carrier.peer.drops)
        self._fit, self._socket, self.receiver = fit, socket, ours
        self._now, self._counts, self._inbound = common.now, common.counts, common.inbound
        self._outbound, self._live = common.outbound, common.live
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = 0.0
        # what waits for the peer's next turn: opened, and as it came
        self._rest: deque[bytes] = deque()
        self._unopened: deque[tuple[bytes, int, Address, bool]] = deque()
        self._too_large: list[Flow] = []  # flows that are to be on a stream when the batch is over
        self._sent = 0  # datagrams in the shard's counts already
        self._paced: asyncio.TimerHandle | None = None
        self._transport: Transport | None = None  # the session's, once it was looked at
        self._again: asyncio.TimerHandle | None = None  # when it is looked at again
        self._doubted = False  # something happened that it may not have survived
        self._seen_packets = 0  # sent in streams, by `look_for_stall`
        self._counted = dict.fromkeys(_COUNTS, 0)  # of the association, in the shard's counts already
        self.association = Association(
            common.live, established, theirs.receiver, self._addresses(hosts), socket.plain,
            self._deliver, carrier.peer.drops.plain, draw, common.now(),
        )  # fmt: skip
        self._path = self.association.path
        self._stall, self._courtesy = StallWatch(common.now()), Courtesy(common.live)
        self._seen_in_streams = self._seen_here = 0  # bytes sent, by `give_way`
        socket.enter(ours, self)
        self._arm()

    def _addresses(self, hosts: Sequence[tuple[str, int]]) -> tuple[Address, ...]:
        socket = self._socket
        return tuple(dict.fromkeys(socket.address(*host) for host in hosts if socket.reaches(host[0])))

    def learn(self, hosts: Sequence[tuple[str, int]]) -> None:
        """Where the peer may be, as it says now."""
        self._path.consider(self._addresses(hosts), self._now())
        self._look()

    # --- out: stage 4

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        """See Sink; what cannot go out now waits by flow, what this lane no longer takes goes back."""
        if self.closed or self._too_large or not self._path.alive:
            self._outbound.dispatch(Chunk(buffer, start, end, packets, self._now()))
        elif self.queue.packets or self._paces() or not self._socket.room(self):
            self.queue.put_span(self._outbound.flows, self, buffer, start, end, self._now())
        else:
            self._seal(buffer, start, end, packets)

    def _seal(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        """Seal the records of a span, for which the socket has room, up to one that is too large for the path."""
        association = self.association
        if not association.used:
            association.use(self._now())
            self._arm()
        whole = segments(buffer, start, end, packets)
        if self._fit is not None:
            # What is cut for the peer may be as large as its device takes.
            if not association.fits(self._live.config.network.mtu + PACKET_OFFSET):
                self._pass_on(buffer, start, end, packets)
                return
            size = end - start
            buffer, start, end, unfit = self._fit(buffer, start, end)
            if unfit:
                self.carrier.peer.drops.plain("too_big", unfit)
            association.seal(self._socket.batch, buffer, start, end)
            self._count(packets - unfit, whole - unfit, size)
            return
        reached, records = association.seal(self._socket.batch, buffer, start, end)
        self._count(records, whole - segments(buffer, reached, end, packets - records), reached - start)
        if reached < end:
            self._pass_on(buffer, reached, end, packets - records)

    def _pass_on(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        """The first of these records is too large for the path: its flow is to be on a stream. Until it is, nothing is
        sealed here, so that what follows does not overtake it."""
        if all(lane.leaving for lane in self.carrier.lanes):
            self.carrier.peer.drops.span("too_big", buffer, start, end, packets)
            return
        outbound = self._outbound
        (count,) = LENGTH.unpack_from(buffer, start)
        key = key_of(buffer, start + PACKET_OFFSET, count - VNET_BYTES)
        flow = outbound.flows.pinned(key, self, self._now())
        outbound.dispatch(Chunk(buffer, start, end, packets, self._now()))
        for waiting in self.queue.take_all({flow}):
            outbound.dispatch(waiting)
        if not self._too_large:
            outbound.after_batch(self._leave_to_streams)
        self._too_large.append(flow)

    def _leave_to_streams(self) -> None:
        flows, self._too_large = self._too_large, []
        for lane in self.carrier.lanes:
            if not lane.leaving:
                for flow in flows:
                    if flow.sink is self:
                        flow.pin(lane)
                break
        self.socket_free()

    def _count(self, packets: int, whole: int, size: int) -> None:
        counts = self._counts
        size -= packets * PACKET_OFFSET
        self.packets_sent += packets
        self.segments_sent += whole
        self.bytes_sent += size
        counts.packets_sent += packets
        counts.segments_sent += whole
        counts.bytes_sent += size

    def flush(self) -> None:
        """The end of a batch: what is sealed goes out."""
        self._socket.flush()
        self._count_sent()

    def _count_sent(self) -> None:
        sent = self.association.sent
        self._counts.datagrams_sent += sent - self._sent
        self._sent = sent

    def _paces(self) -> bool:
        """Whether the path's pace holds back what comes now; it is looked at again when it does not."""
        wait_s = self._path.pace.wait_s(self._now()) if self._path.pace.rate is not None else 0.0
        if wait_s and self._paced is None:
            self._paced = self._loop.call_later(wait_s, self._on_paced)
        return wait_s > 0.0

    def _on_paced(self) -> None:
        self._paced = None
        self.socket_free()

    def socket_free(self) -> None:
        """Send what waits, as far as pace and socket take it."""
        queue = self.queue
        if self.closed or not queue.packets or not self._path.alive:
            return
        now_s = self._now()
        while not (self._too_large or self._paces()) and self._socket.room(self):
            if (flow := queue.first(now_s)) is None:
                break
            backlog = flow.backlog
            assert backlog is not None  # it was queued
            chunk = backlog.chunks[0]
            queue.sent(flow, now_s)
            flow.last_s = now_s
            self._seal(chunk.buffer, chunk.start, chunk.end, chunk.packets)
        self.flush()

    # --- in: stage 5

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
        """See udp.Taker."""
        budget = self.budget
        budget.begin_datagrams(self._socket.turns)
        if budget.datagrams_left > 0 and not self.behind:
            start = self._open(view, start, end, segment, address, marked, now_s)
        if start == end:
            return True
        if not self.closed and budget.keep_datagrams(end - start):
            self._unopened.append((bytes(view[start:end]), segment, address, marked))
        else:
            self._counts.datagrams_over += -(-(end - start) // segment)
        return False

    def _open(
        self,
        view: memoryview,
        start: int,
        end: int,
        segment: int,
        address: Address,
        marked: bool,
        now_s: float,
    ) -> int:
        """As many as there is budget for: where they end. A datagram costs as much as a record, and more if it has more
        of them."""
        budget = self.budget
        end = min(end, start + budget.datagrams_left * segment)
        most = budget.datagrams_left - -(-(end - start) // segment)
        try:
            self.association.receive_untrusted(view, start, end, segment, address, marked, now_s)
        except RemoteProtocolError as error:
            self.carrier.fail(error)
        budget.datagrams_left = min(budget.datagrams_left, most)
        return end

    def _deliver(self, records: memoryview) -> None:
        """Stage 6 for what was opened, as far as the turn goes. An impossible record ends the session, as it does in a
        stream."""
        if self._rest:
            self._rest.append(bytes(records))
            return
        budget, sources = self.budget, self.carrier.peer.sources
        try:
            reached, count = self._inbound.deliver_untrusted(
                sources, self.reassembly, records, budget.datagrams_left
            )
            budget.datagrams_left -= count
            if reached < len(records):
                self._rest.append(bytes(records[reached:]))
            if self.reassembly.partial:
                self.reassembly.take()
                raise RemoteProtocolError("a record goes beyond its datagram")
        except RemoteProtocolError as error:
            self.carrier.fail(error)

    @property
    def budget(self) -> Budget:
        """See udp.Taker."""
        return self.carrier.peer.budget

    @property
    def behind(self) -> bool:
        """See udp.Taker."""
        return bool(self._rest or self._unopened) and not self.closed

    def go_on(self, now_s: float) -> None:
        """See udp.Taker."""
        budget = self.budget
        budget.begin_datagrams(self._socket.turns)
        rest, self._rest = self._rest, deque()
        for records in rest:
            self._deliver(memoryview(records))
        while self._unopened and not self._rest and budget.datagrams_left > 0:
            data, segment, address, marked = self._unopened.popleft()
            reached = self._open(memoryview(data), 0, len(data), segment, address, marked, now_s)
            left = data[reached:] if not self.closed else b""
            budget.waiting_bytes -= len(data) - len(left)
            if left:
                self._unopened.appendleft((left, segment, address, marked))

    def taken(self, now_s: float) -> None:
        if self.closed:
            return
        opener, counts, counted = self.association.opener, self._counts, self._counted
        for name in _COUNTS:
            count = getattr(opener, name)
            if count != counted[name]:
                name_of_all = f"datagrams_{name}"
                setattr(counts, name_of_all, getattr(counts, name_of_all) + count - counted[name])
                counted[name] = count
        if self.association.peer_alone:
            self.carrier.outlive("the peer has ended it, datagrams beside it go on")
        self._look()
        if self.stalled and not self.instead:
            self._on_again()

    def refused(self, size: int) -> None:
        self._path.refused(size)

    # --- the path

    def _on_timer(self) -> None:
        self._timer = None
        used, self.association.used = self.association.used, False
        self._path.step(self._now(), used)
        self._look()

    def _look(self) -> None:
        """Send what the path has to ask and to answer, and tell if it is another one for flows now."""
        if self._path.probes:
            self._socket.send_probes(self.association)
            self._count_sent()
        usable = self._is_good() and self._is_worth_it()
        if usable != self.usable:
            self.usable = usable
            self._outbound.after_batch(self.carrier.datagrams_changed)
        self._arm()

    def _is_good(self) -> bool:
        """Whether the path carries what there is to carry, or it is known how much less: flows do not go there only to
        be sent back."""
        whole = self.association.fits(self._live.config.network.mtu + PACKET_OFFSET)
        return self._path.alive and (whole or self.usable or self._path.settled)

    def _is_worth_it(self) -> bool:
        """Where a round trip is short, a lost segment of a stream is sent again before anybody notices."""
        carrier = self._live.config.carrier
        if carrier.choice == "datagrams" or not self.carrier.lanes:
            return True
        return self._path.least_rtt_s >= carrier.least_rtt

    # --- the streams

    def look(self, tcp: TcpState | None, transport: Transport, in_streams: int, more: bool) -> None:
        """From time to time, at the session's connection, so that neither of the two gets all of the way; `tcp` None:
        nothing was sent in it. `in_streams`: bytes sent in streams so far; `more`: others wait."""
        self._transport = transport
        self._path.pace.beside = tcp.rate if tcp is not None and more else None
        if tcp is not None:
            self._give_way(tcp, transport, in_streams)

    def look_for_stall(self) -> bool:
        """More often: whether the session carries anything. False: there is nothing that it should carry."""
        sent, transport = self.carrier.packets_sent, self._transport
        busy, self._seen_packets = sent != self._seen_packets, sent
        # Else there is nothing that could not be acknowledged, and there may be thousands of them.
        busy = busy or self._stall.in_flight or self._doubted
        self._look_for_stall(transport.tcp_state() if busy and transport is not None else None)
        return busy

    def doubt(self) -> None:
        """Something happened that sessions do not always survive, and there is a ping under way in this one: end it as
        soon as it carries nothing."""
        self.hurry()
        self._doubted = True
        if not self._stall.in_flight:  # nobody may have looked for long
            self._stall.look(None, self._now())
        self._look_again()

    def _look_for_stall(self, tcp: TcpState | None) -> None:
        """End a session that has carried nothing for too long while datagrams reach the peer. In doubt look again soon;
        when the peer has answered in datagrams, nothing more is sealed in streams until then."""
        now_s = self._now()
        stall = self._stall.look(tcp, now_s)
        self._doubted = self._doubted and self._stall.since_s != now_s
        if stall is not None and stall.noticed_s == now_s:
            self._ask()
        instead = stall is not None and self._answers_since(stall)
        if instead != self.instead:
            self.instead = instead
            self.carrier.hold(instead)
        least_s = max(self._live.config.carrier.stall_timeout, 4 * (self._path.rtt_s or 0.0))
        if stall is not None and instead and (self._doubted or now_s - stall.since_s >= least_s):
            self.carrier.outlive("it carries nothing, datagrams beside it do")
        elif instead or self._doubted:
            self._look_again()

    def _answers_since(self, stall: Stall) -> bool:
        path = self._path
        return path.alive and path.since_s < stall.since_s and path.confirmed_s >= stall.noticed_s

    def _look_again(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._again = self._loop.call_later(self._live.config.carrier.stall_timeout / _LOOKS, self._on_again)

    def _on_again(self) -> None:
        if self._transport is not None:
            self._look_for_stall(self._transport.tcp_state())

    def _give_way(self, tcp: TcpState, transport: Transport, in_streams: int) -> None:
        streams, here = in_streams - self._seen_in_streams, self.bytes_sent - self._seen_here
        self._seen_in_streams, self._seen_here = in_streams, self.bytes_sent
        if self._courtesy.look(tcp, self._path.jitter_s, streams, here if self.usable else 0):
            transport.limit(self._courtesy.rate)

    @property
    def stalled(self) -> bool:
        """What the last look found."""
        return self._stall.stall is not None

    def session_ends(self, lasts: bool) -> None:
        """See Link.close: then the lane lives on, if it has lived, and may get another carrier."""
        self._transport = None
        if not lasts or not self._path.alive:
            self.end()
            return
        if not self.stalled and not self.association.peer_alone:  # who has ended it may be gone
            self._path.doubt(self._now())

    def adopt(self, carrier: Carrier) -> None:
        """From now on it is beside `carrier`, and the peer is told. After `session_ends`."""
        self.carrier = carrier
        self.association.alone = True
        self._ask()
        if not self.usable:  # it was not told to the link, which had ended
            self._outbound.after_batch(carrier.datagrams_changed)

    def _ask(self) -> None:
        """Probe at once."""
        self.hurry()
        self._path.next_s = self._now()
        self._look()

    def hurry(self) -> None:
        """Something happened that paths do not always survive, or that lets them live again."""
        if not self.closed:
            self.association.use(self._now())
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            if self._timer_due_s <= self._path.next_s:
                return
            self._timer.cancel()
        self._timer_due_s = self._path.next_s
        self._timer = self._loop.call_later(max(0.0, self._timer_due_s - self._now()), self._on_timer)

    # --- as a lane

    def traffic(self) -> Traffic:
        return sent(self).plus(received(self.reassembly))

    def silent_s(self, now_s: float) -> float:
        """See DatagramLane."""
        return 0.0 if self._path.alive else now_s - self._path.since_s

    def report(self) -> DatagramReport:
        path, opener = self._path, self.association.opener
        lost, expected = opener.missed - opener.late, opener.top + 1
        return DatagramReport(
            state=self._state(),
            rtt_ms=None if path.rtt_s is None else path.rtt_s * 1000,
            jitter_ms=path.jitter_s * 1000,
            loss_out=path.loss,
            loss_in=lost / expected if expected else None,
            size=path.size,
        )

    def _state(self) -> str:
        if not self._path.alive:
            return "silent"
        return "unused" if not self.usable else "used" if self.carrier.lanes else "alone"

    def idle_since(self, now_s: float) -> float:
        """See Lane: it is not closed for being idle."""
        return now_s

    def close(self) -> None:
        """See Lane: what the peer sends is taken for as long as the session lives."""

    def end(self) -> None:
        """The session has ended. What is submitted until its flows have found another place goes back."""
        self.closed = self.leaving = self.holding = True
        self.usable = False
        for timer in (self._timer, self._paced, self._again):
            if timer is not None:
                timer.cancel()
        self._socket.leave(self.receiver)
        self.budget.waiting_bytes -= sum(len(data) for data, *_ in self._unopened)
        self._unopened.clear()
