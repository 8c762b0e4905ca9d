"""What a session's bytes go over: a Transport, and the one there is, a stream socket.

TCP is the rule. A socket of another family (AF_UNIX: somebody between who carries the bytes on) has none of TCP's
options, cannot be reset, and tells only how much its other end has not read yet.
"""

from __future__ import annotations

import fcntl
import logging
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from vpnd.api.aio import Descriptors
from vpnd.config.schema import Session as Settings

log = logging.getLogger(__name__)

#: Linux' TCP_NOTSENT_LOWAT (include/uapi/linux/tcp.h); the socket module has no name for it.
TCP_NOTSENT_LOWAT = 25
#: The same, since Linux 6.15.
TCP_RTO_MIN_US, TCP_DELACK_MAX_US = 45, 46
MICROSECONDS = 1_000_000
#: Linux' ioctls for the bytes in a socket's send queue (include/uapi/linux/sockios.h): not acknowledged, not
#: sent.
_SIOCOUTQ = 0x5411
_SIOCOUTQNSD = 0x894B
#: struct linger: wait for the send queue, but not at all.
_RESET = struct.pack("ii", 1, 0)


#: Begin of Linux' struct tcp_info (include/uapi/linux/tcp.h): retransmissions in a row, snd_mss, unacked segments,
#: rtt, bytes_acked, min_rtt, delivery_rate.
_TCP_INFO = struct.Struct("=2xB5x8xI4xI40xI48xQ20xI8xQ")
#: Linux' include/uapi/asm-generic/socket.h; and what takes it back.
_SO_MAX_PACING_RATE, _NO_RATE = 47, (1 << 64) - 1


class TcpState(NamedTuple):
    """Of a TCP connection: the largest segment it sends; how often in a row the oldest unacknowledged one was sent
    again; how many segments are not acknowledged; how many bytes are. `rate`: bytes a second that arrived lately."""

    segment_bytes: int
    retransmissions: int
    unacknowledged: int
    acknowledged_bytes: int = 0
    rtt_s: float = 0.0
    least_rtt_s: float = 0.0
    rate: int = 0


class Transport(Protocol):
    """An ordered, reliable way for bytes to the peer and back, that never blocks. Owner: its link.

    `recv_into(buffer)` returns how many bytes came, 0 at the end; `send(view)` how many were taken. Both raise
    BlockingIOError when it is not the time for it, and OSError when it has ended.
    """

    recv_into: Callable[[memoryview], int]
    send: Callable[[Any], int]

    def watch(self, readable: Callable[[], None]) -> None:
        """Call `readable` whenever there is something to receive, until `close`."""

    def wait_writable(self, writable: Callable[[], None]) -> None:
        """Call `writable` once, when more can be sent. Not to be asked for twice at a time."""

    def unsent(self) -> int:
        """Bytes it has taken and would still have to send first."""

    def outstanding(self) -> int:
        """Bytes it has taken and of which it is not known that they have arrived."""

    def tcp_state(self) -> TcpState | None:
        """How the TCP below does; None where there is none."""

    def limit(self, rate: float | None) -> None:
        """Send no more bytes a second than that."""

    def local_address(self) -> str:
        """The IP address of this end; empty if it has none, or the kernel does not know any more."""

    def remote(self) -> tuple[str, int]:
        """IP address and port of the other end; "" and 0 as above."""

    def endpoints(self) -> tuple[str, str]:
        """IP:port of both ends, ours first; empty as above."""

    def close(self, *, discard: bool) -> None:
        """The end. `discard`: what was taken and not sent yet must not arrive, as far as that can be had."""


class SocketTransport:
    """A stream socket, non-blocking and ours."""

    def __init__(self, sock: socket.socket, settings: Settings, descriptors: Descriptors) -> None:
        # Nothing between link and kernel.
        self.recv_into: Callable[[memoryview], int] = sock.recv_into
        self.send: Callable[[Any], int] = sock.send
        self._sock, self._fd, self._descriptors = sock, sock.fileno(), descriptors
        self._writable: Callable[[], None] | None = None
        self._tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        self._unsent_request = _SIOCOUTQNSD if self._tcp else _SIOCOUTQ
        if self._tcp:
            tune(sock, settings)
        else:
            # Such a socket is writable below a quarter of its buffer, of which Linux makes twice what it is told:
            # here too the kernel holds no more than the setting says.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.not_sent_lowat_bytes * 2)

    def watch(self, readable: Callable[[], None]) -> None:
        self._descriptors.add_reader(self._fd, readable)

    def wait_writable(self, writable: Callable[[], None]) -> None:
        self._writable = writable
        self._descriptors.add_writer(self._fd, self._on_writable)

    def _on_writable(self) -> None:
        writable, self._writable = self._writable, None
        self._descriptors.remove_writer(self._fd)
        if writable is not None:
            writable()

    def unsent(self) -> int:
        return self._queued(self._unsent_request)

    def outstanding(self) -> int:
        return self._queued(_SIOCOUTQ)

    def _queued(self, request: int) -> int:
        return int.from_bytes(fcntl.ioctl(self._sock, request, bytes(4)), sys.byteorder)

    def tcp_state(self) -> TcpState | None:
        if not self._tcp:
            return None
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        repeated, segment, unacknowledged, rtt_us, acknowledged, least_us, rate = _TCP_INFO.unpack(info)
        times = rtt_us / MICROSECONDS, least_us / MICROSECONDS
        return TcpState(segment, repeated, unacknowledged, acknowledged, *times, rate)

    def limit(self, rate: float | None) -> None:
        most = _NO_RATE if rate is None else round(rate)
        _try(self._sock, _SO_MAX_PACING_RATE, most.to_bytes(8, sys.byteorder), socket.SOL_SOCKET)

    def local_address(self) -> str:
        address = self._ask(self._sock.getsockname)
        return address[0] if address else ""

    def remote(self) -> tuple[str, int]:
        return self._ask(self._sock.getpeername) or ("", 0)

    def endpoints(self) -> tuple[str, str]:
        ends = (self._ask(self._sock.getsockname), self._ask(self._sock.getpeername))
        local, remote = (
            "" if end is None else f"[{end[0]}]:{end[1]}" if ":" in end[0] else f"{end[0]}:{end[1]}"
            for end in ends
        )
        return local, remote

    def _ask(self, name: Callable[[], Any]) -> tuple[str, int] | None:
        try:
            return (str(name()[0]).removeprefix("::ffff:"), name()[1]) if self._tcp else None
        except OSError:
            return None

    def close(self, *, discard: bool) -> None:
        self._descriptors.remove_reader(self._fd)
        if self._writable is not None:
            self._descriptors.remove_writer(self._fd)
        if discard:
            # TCP: reset. What is not sent yet would go on being sent for as long as TCP_USER_TIMEOUT, and arrive
            # behind what went over another session by then.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._sock.close()


def tune(sock: socket.socket, settings: Settings) -> None:
    """TCP's options for a data session. What the kernel may refuse is as the system has it then: a congestion control
    it does not know, or that is not in net.ipv4.tcp_allowed_congestion_control, and timers before Linux 6.15."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Sessions have probes of their own, and there may be thousands of them.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, settings.not_sent_lowat_bytes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.user_timeout * 1000))
    if settings.congestion_control:
        _try(sock, socket.TCP_CONGESTION, settings.congestion_control.encode())
    # The system's 200 ms are a long time where one lost packet holds up all that are behind it. Right is what the peer
    # takes at most with an acknowledgment, as in QUIC (RFC 9002, 6.2.1), and some more. A peer with an older kernel
    # takes up to 40 ms, and is sent a lone packet twice.
    _try(sock, TCP_RTO_MIN_US, round(settings.retransmit_min * MICROSECONDS))
    _try(sock, TCP_DELACK_MAX_US, round(settings.ack_delay_max * MICROSECONDS))


def _try(sock: socket.socket, option: int, value: int | bytes, level: int = socket.IPPROTO_TCP) -> None:
    try:
        sock.setsockopt(level, option, value)
    except OSError as error:
        log.debug("socket option %d = %r: %s", option, value, error)
