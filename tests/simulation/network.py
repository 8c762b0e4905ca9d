"""Made-up TCP between the nodes of a simulation: segments that take their time, and everything that goes wrong.

    delay, bandwidth   per network; a segment is of a random size, and reads and writes are cut anywhere
    cut                a pair of nodes hears nothing of each other; what was sent comes after it is healed
    reset              both ends get ECONNRESET, what is on its way is lost
    vanish             half-open: nothing moves any more, nobody is told, until TCP_USER_TIMEOUT
    pause              one end is not read for a while

As in Linux: a socket closed with unread bytes, or sent to after it was closed, answers with RST; what had
arrived before a RST is read first.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from shards.session.transport import TcpState
from simulation.clock import VirtualLoop, Watched
from vpnd.config.schema import Session

#: After an outage: until the sender tries again.
RETRANSMIT_S = 0.2
LEAST_SEGMENT_BYTES, MOST_SEGMENT_BYTES = 40, 9000
#: What TCP_INFO has: small enough for any way.
SEGMENT_BYTES = 1220


class Network:
    """What all connections share. `delay_s` one way, `rate` in bytes a second for each direction of each."""

    def __init__(
        self, loop: VirtualLoop, random: Random, *, delay_s: float, rate: float, buffer: int
    ) -> None:
        self.loop, self.random, self.delay_s, self.rate, self.buffer = loop, random, delay_s, rate, buffer
        self.cut: set[frozenset[str]] = set()
        #: pairs of nodes between which TCP does not pass, and datagrams do
        self.without_tcp: set[frozenset[str]] = set()
        #: sockets for datagrams by where they are; and what becomes of datagrams, see simulation.datagrams
        self.udp: dict[str, Any] = {}
        self.udp_loss = self.udp_doubled = self.udp_jitter = 0.0
        self.connections: list[Connection] = []
        #: what TCP below says of new ones
        self.tcp: TcpState | None = None

    def connect(self, dialer: str, addresses: tuple[str, str], acceptor: str) -> Connection:
        """An established connection from one node to another."""
        connection = Connection(self, (dialer, acceptor), addresses)
        self.connections.append(connection)
        return connection

    def passes(self, one: str, other: str) -> bool:
        """Whether two nodes hear of each other."""
        return frozenset((one, other)) not in self.cut

    def connects(self, one: str, other: str) -> bool:
        """Whether TCP passes between two nodes."""
        pair = frozenset((one, other))
        return pair not in self.cut and pair not in self.without_tcp

    def set_cut(self, one: str, other: str, cut: bool, *, tcp_alone: bool = False) -> None:
        """Begin or end an outage between two nodes."""
        pair, of = frozenset((one, other)), self.without_tcp if tcp_alone else self.cut
        if cut == (pair in of):
            return
        (of.add if cut else of.discard)(pair)
        for connection in self.connections:
            if connection.pair == pair:
                connection.faulted = True
                if not cut:
                    for end in connection.ends:
                        self.loop.call_later(RETRANSMIT_S, end.pump)


class Connection:
    """Two sockets. `faulted`: something was done to it, so packets in it may be lost or late."""

    def __init__(self, network: Network, nodes: tuple[str, str], addresses: tuple[str, str]) -> None:
        self.network, self.nodes = network, nodes
        self.pair = frozenset(nodes)
        self.vanished = False
        self.faulted = not network.connects(*nodes)
        self.ends = (FakeTransport(self, addresses[0]), FakeTransport(self, addresses[1]))
        self.ends[0].other, self.ends[1].other = self.ends[1], self.ends[0]

    def passes(self) -> bool:
        return not self.vanished and self.network.connects(*self.nodes)

    def open(self) -> bool:
        return any(not end.closed for end in self.ends)

    def reset(self) -> None:
        """A RST for both, from somewhere between."""
        self.faulted = True
        for end in self.ends:
            end.take_reset()

    def vanish(self) -> None:
        """The way between them is gone for good, without a sign."""
        self.faulted = self.vanished = True

    def pause(self, end: int, seconds: float) -> None:
        """The process behind one end does not read for a while."""
        self.faulted = True
        self.ends[end].pause(seconds)


class FakeTransport(Watched):
    """One end of a connection: a Transport."""

    other: FakeTransport

    def __init__(self, connection: Connection, address: str) -> None:
        super().__init__()
        self._connection, self._network, self._address = connection, connection.network, address
        self._loop = connection.network.loop
        self.closed = False
        self.tcp = connection.network.tcp  # what it is said to be, if anything
        self._acknowledged = 0
        self._error = 0
        self._unsent = bytearray()
        self._on_way: deque[bytes] = deque()
        self._on_way_bytes = 0
        self._free_s = 0.0  # when the line is free again
        self._received = bytearray()
        self._end_sent = self._ended = False
        self._paused = self._pump_due = False
        self._lowat = 1 << 31
        self._user_timeout_s = 0.0
        self._waits_since_s: float | None = None

    # --- as a transport

    def tune(self, settings: Session) -> None:
        self._lowat, self._user_timeout_s = settings.not_sent_lowat_bytes, settings.user_timeout

    def watch(self, readable: Callable[[], None]) -> None:
        self._loop.add_reader(self, readable)

    def wait_writable(self, writable: Callable[[], None]) -> None:
        def once() -> None:
            self._loop.remove_writer(self)
            writable()

        self._loop.add_writer(self, once)

    def local_address(self) -> str:
        return self._address

    def remote(self) -> tuple[str, int]:
        return self.other._address, 4001

    def endpoints(self) -> tuple[str, str]:
        return f"{self._address}:4001", f"{self.other._address}:4001"

    def unsent(self) -> int:
        return len(self._unsent)

    def tcp_state(self) -> TcpState | None:
        if self.tcp is not None:
            return self.tcp
        lost = not self._connection.passes()
        under_way = len(self._on_way) or int(lost and bool(self._unsent))
        return TcpState(SEGMENT_BYTES, 5 if lost and under_way else 0, under_way, self._acknowledged)

    def limit(self, rate: float | None) -> None:
        """It knows no round trip, so nobody asks for it."""
        assert rate is None

    def outstanding(self) -> int:
        return len(self._unsent) + self._on_way_bytes

    def send(self, view: memoryview) -> int:
        assert not self.closed
        if self._error:
            raise OSError(self._error, "reset")
        room = self._network.buffer - len(self._unsent) - self._on_way_bytes
        if room <= 0 or not len(view):
            raise BlockingIOError
        count = min(room, len(view))
        self._unsent += view[:count]
        self._watch_for_silence()
        self.pump()
        return count

    def recv_into(self, buffer: memoryview) -> int:
        assert not self.closed and len(buffer)
        if self._received:
            count = min(len(buffer), len(self._received), self._network.random.randint(1, 1 << 17))
            buffer[:count] = self._received[:count]
            del self._received[:count]
            self.other.pump()
            return count
        if self._error:
            raise OSError(self._error, "reset")
        if self._ended:
            return 0
        raise BlockingIOError

    def close(self, *, discard: bool) -> None:
        assert not self.closed
        self.closed = True
        self._loop.remove_reader(self)
        self._loop.remove_writer(self)
        if self._received:  # unread bytes: the peer is told that they were not taken
            self._unsent.clear()
            self._loop.call_later(self._network.delay_s, self._reset_other)
        else:
            self.pump()

    # --- as the loop sees it

    def readable(self) -> bool:
        return not self._paused and bool(self._received or self._error or self._ended)

    def writable(self) -> bool:
        used = len(self._unsent) + self._on_way_bytes
        return bool(self._error) or (len(self._unsent) < self._lowat and used * 3 <= self._network.buffer * 2)

    def pause(self, seconds: float) -> None:
        self._paused = True
        self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._paused = False
        self._loop.look(self)

    # --- the way of the bytes

    def pump(self) -> None:
        """Send what the line and the other end's buffer take."""
        if self._error or not self._connection.passes():
            return
        network, now_s = self._network, self._loop.now_s
        while self._unsent:
            room = network.buffer - len(self.other._received) - self._on_way_bytes
            size = min(
                room, len(self._unsent), network.random.randint(LEAST_SEGMENT_BYTES, MOST_SEGMENT_BYTES)
            )
            if size <= 0:
                return
            if self._free_s > now_s + network.delay_s:
                if not self._pump_due:
                    self._pump_due = True
                    self._loop.call_at(self._free_s - network.delay_s / 2, self._pump_again)
                return
            segment = bytes(self._unsent[:size])
            del self._unsent[:size]
            self._on_way.append(segment)
            self._on_way_bytes += size
            self._free_s = max(self._free_s, now_s) + size / network.rate
            self._loop.call_at(self._free_s + network.delay_s, self._arrive)
        if self.closed and not self._end_sent:
            self._end_sent = True
            self._loop.call_at(max(self._free_s, now_s) + network.delay_s, self._arrive_end)
        self._loop.look(self)

    def _pump_again(self) -> None:
        self._pump_due = False
        self.pump()

    def _arrive(self) -> None:
        if not self._on_way:
            return
        if not self._connection.passes():  # it is sent again when that is over
            self._loop.call_later(RETRANSMIT_S, self._arrive)
            return
        segment = self._on_way.popleft()
        self._on_way_bytes -= len(segment)
        self._acknowledged += len(segment)
        self._waits_since_s = self._loop.now_s if self._on_way or self._unsent else None
        other = self.other
        if other.closed:
            self._loop.call_later(self._network.delay_s, self.take_reset)
        elif not other._error:
            other._received += segment
            self._loop.look(other)
        self.pump()
        self._loop.look(self)

    def _arrive_end(self) -> None:
        if self._on_way or not self._connection.passes():
            self._loop.call_later(RETRANSMIT_S, self._arrive_end)
            return
        self.other._ended = True
        self._loop.look(self.other)

    def _reset_other(self) -> None:
        if self._connection.passes():
            self.other.take_reset()
        else:
            self._loop.call_later(RETRANSMIT_S, self._reset_other)

    def take_reset(self, error: int = errno.ECONNRESET) -> None:
        """A RST has come, or the kernel has given up."""
        self._error = self._error or error
        self._unsent.clear()
        self._on_way.clear()
        self._on_way_bytes = 0
        self._loop.look(self)

    def _watch_for_silence(self) -> None:
        if self._waits_since_s is None:
            self._waits_since_s = self._loop.now_s
            self._loop.call_later(self._user_timeout_s, self._check_silence)

    def _check_silence(self) -> None:
        since_s = self._waits_since_s
        if since_s is None or self._error or self.closed:
            return
        if self._loop.now_s - since_s >= self._user_timeout_s and not self._connection.passes():
            self.take_reset(errno.ETIMEDOUT)
        else:
            self._loop.call_later(self._user_timeout_s, self._check_silence)
