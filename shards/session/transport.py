"""What the data plane asks of a session's TCP socket."""

from __future__ import annotations

import fcntl
import logging
import socket
import struct
import sys
from collections.abc import Callable

from vpnd.config.schema import Session as Settings

log = logging.getLogger(__name__)

#: Linux' TCP_NOTSENT_LOWAT (include/uapi/linux/tcp.h); the socket module has no name for it.
TCP_NOTSENT_LOWAT = 25
#: The same, since Linux 6.15.
TCP_RTO_MIN_US, TCP_DELACK_MAX_US = 45, 46
MICROSECONDS = 1_000_000
#: Linux' ioctls for the bytes in a socket's send queue (include/uapi/linux/sockios.h): not acknowledged, not
#: sent.
SIOCOUTQ = 0x5411
SIOCOUTQNSD = 0x894B
#: struct linger: wait for the send queue, but not at all.
_RESET = struct.pack("ii", 1, 0)


def tune(sock: socket.socket, settings: Settings) -> None:
    """Socket options of a data session. What the kernel may refuse is as the system has it then: a congestion control
    it does not know, or that is not in net.ipv4.tcp_allowed_congestion_control, and timers before Linux 6.15."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, settings.not_sent_lowat_bytes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(settings.user_timeout * 1000))
    if settings.congestion_control:
        _try(sock, socket.TCP_CONGESTION, settings.congestion_control.encode())
    # The system's 200 ms are a long time where one lost packet holds up all that are behind it. Right is what the peer
    # takes at most with an acknowledgment, as in QUIC (RFC 9002, 6.2.1), and some more. A peer with an older kernel
    # takes up to 40 ms, and is sent a lone packet twice.
    _try(sock, TCP_RTO_MIN_US, round(settings.retransmit_min * MICROSECONDS))
    _try(sock, TCP_DELACK_MAX_US, round(settings.ack_delay_max * MICROSECONDS))


def _try(sock: socket.socket, option: int, value: int | bytes) -> None:
    try:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    except OSError as error:
        log.debug("TCP option %d = %r: %s", option, value, error)


def discard(sock: socket.socket) -> None:
    """Let close() reset the connection: what the kernel has not sent yet, and would go on sending for as long as
    TCP_USER_TIMEOUT, must not arrive behind what went over another session by then."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def endpoints(sock: socket.socket) -> tuple[str, str]:
    """IP:port of both ends, ours first; empty for one the kernel does not know any more."""
    return _endpoint(sock.getsockname), _endpoint(sock.getpeername)


def _endpoint(ask: Callable[[], tuple[str, int]]) -> str:
    try:
        host, port = ask()[:2]
    except OSError:
        return ""
    host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def outstanding(sock: socket.socket, request: int) -> int:
    """Bytes in the socket's send queue: SIOCOUTQ, not acknowledged yet; SIOCOUTQNSD, not even sent."""
    return int.from_bytes(fcntl.ioctl(sock, request, bytes(4)), sys.byteorder)
