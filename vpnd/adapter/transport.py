"""TCP as vpnd wants it: sockets that notice a dead peer, and with segments that pass everywhere where asked for."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Callable
from typing import Any

import trio
from libp2p.abc import IRawConnection
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from vpnd.config import multiaddrs
from vpnd.endpoint import Endpoint

MILLISECONDS = 1000


class WatchfulTcp(TCP):
    """TCP whose sockets end by themselves when the peer has vanished.

    Without this a connection into a black hole lives for many minutes, and closing one that has data queued
    blocks. `user_timeout_s`: unacknowledged data ends the connection after so long; `keepalive_interval_s`
    (whole seconds are used): silence is probed that often. `permits`: which endpoints may be dialed at all.
    `segment`: the largest TCP segment of what is dialed, both ways; 0: as the kernel finds it.
    """

    def __init__(
        self,
        user_timeout_s: float,
        keepalive_interval_s: float,
        permits: Callable[[Endpoint], bool],
        segment: int = 0,
    ) -> None:
        super().__init__()
        self.permits, self.segment = permits, segment
        self._user_timeout_s = user_timeout_s
        self._keepalive_s = max(1, round(keepalive_interval_s))

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        """See TCP; no host names. Has no deadline of its own."""
        target = multiaddrs.parse(str(maddr))
        family = socket.AF_INET6 if target.kind == "ip6" else socket.AF_INET
        with contextlib.ExitStack() as unless_connected:
            try:
                sock = unless_connected.enter_context(trio.socket.socket(family, socket.SOCK_STREAM))
                limit_segments(sock, self.segment)
                await self._bind(sock)
                await sock.connect((target.host, target.port))
            except OSError as error:
                raise OpenConnectionError(f"{maddr}: {error.strerror}") from error
            unless_connected.pop_all()
        stream = trio.SocketStream(sock)
        self.watch(stream)
        return RawConnection(TrioTCPStream(stream), True)

    async def _bind(self, sock: trio.socket.SocketType) -> None:
        """Before a socket connects."""

    def watch(self, stream: Any) -> None:
        """Set the options on a trio.SocketStream."""
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, self._keepalive_s)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, self._keepalive_s)
        probes = max(1, math.ceil(self._user_timeout_s / self._keepalive_s))
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
        timeout_ms = round(self._user_timeout_s * MILLISECONDS)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def limit_segments(sock: socket.socket | trio.socket.SocketType, segment: int) -> None:
    """No TCP segment of a connection yet to be made is longer, either way; 0: as the kernel finds it."""
    if segment:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)


def share_port(sock: socket.socket | trio.socket.SocketType) -> None:
    """Others of ours may bind its port too, to connect from there."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def socket_of(raw: Any) -> Any:
    """The trio.SocketStream under a RawConnection of TCP."""
    return raw.stream.stream


def close_now(raw: Any) -> None:
    """Close a RawConnection's socket without a checkpoint, so that it works while being cancelled.

    A task reading from it wakes up with an end of file.
    """
    socket_of(raw).socket.close()


def raw_of(session: Any) -> Any:
    """The RawConnection under a SecureSession; see vpnd.adapter.handoff."""
    return session.conn.read_writer.read_write_closer
