"""TCP connections that two machines behind NATs open to each other at the same time.

Each NAT lets in what answers to something that went out. So both connect from the port of their leg, whose outside
address the relay has seen, to where the other was seen: the SYNs cross, which makes one connection (RFC 9293, 3.5). A
NAT that answers the early one with a reset ends that try; the next one follows. The port listens as well, for a peer
whose NAT takes another port for each destination.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.io.trio import TrioTCPStream

from vpnd.adapter.transport import WatchfulTcp, limit_segments, share_port
from vpnd.endpoint import Endpoint
from vpnd.nat.paths import Path

#: Gets a connection, which it owns; whether it is content with it.
Use = Callable[[socket.socket], Awaitable[bool]]

#: Connections that wait to be accepted while punching: one is the peer's.
BACKLOG = 4


class WayStream(TrioTCPStream):
    """A stream that came about by a meeting. `path`: how; `peer_id`: who has to be at the other end; `taken`: whether a
    session was made of it."""

    def __init__(self, stream: trio.SocketStream, path: Path, peer_id: str) -> None:
        super().__init__(stream)
        self.path, self.taken = path, False
        self._peer_id = peer_id

    def take(self, peer_id: str) -> bool:
        """A session with `peer_id` is made of it; False when it is for another one."""
        self.taken = peer_id == self._peer_id
        return self.taken


def way(sock: socket.socket, path: Path, peer_id: str) -> WayStream:
    """The stream on a connected socket, which it owns."""
    sock.setblocking(False)
    return WayStream(trio.SocketStream(trio.socket.from_stdlib_socket(sock)), path, peer_id)


class FreshTcp(WatchfulTcp):
    """Dials from a port that nothing else has, and that may be connected from again meanwhile; from `source_port` where
    that is not 0."""

    source_port = 0

    def from_port(self, port: int) -> FreshTcp:
        """The same from one port."""
        other = copy.copy(self)
        other.source_port = port
        return other

    async def _bind(self, sock: trio.socket.SocketType) -> None:
        # A fresh port is reusable only when it is bound: the kernel would choose one that another leg has.
        if self.source_port:
            share_port(sock)
        await sock.bind(("", self.source_port))
        share_port(sock)


async def punch(
    places: Sequence[Endpoint],
    targets: Sequence[Endpoint],
    interval_s: float,
    use: Use,
    segment: int,
    beside: Callable[[Use], Awaitable[None]] | None = None,
) -> bool:
    """Connect to all of `targets` from `places`, which are a leg's own end and that port at other addresses, and listen
    there, until `use` is content with a connection. Its TCP segments are no longer than `segment`. `beside`: another
    way to get at connections, tried meanwhile. Has no deadline of its own."""
    done = False

    async def use_one(sock: socket.socket) -> bool:
        nonlocal done
        content = await use(sock)
        if content:
            done = True
            nursery.cancel_scope.cancel()
        return content

    async def connect(target: Endpoint) -> None:
        while True:
            # From where the other one was told that we are: its firewall lets in nothing else.
            here = next((each for each in places if each.family == target.family), None)
            if here is None:
                return
            try:
                sock = reserve(here, segment)
            except OSError:  # the address has gone meanwhile
                return
            try:
                connection = await connected(sock, target)
            except OSError as error:
                if error.errno in _HOPELESS:
                    return
                await trio.sleep(interval_s)
                continue
            await use_one(connection)
            return

    async def listen(place: Endpoint) -> None:
        try:
            listening = reserve(place, segment)
        except OSError:  # the address has gone meanwhile
            return
        with listening, contextlib.suppress(OSError):
            listening.listen(BACKLOG)
            while True:
                accepted, _ = await listening.accept()
                nursery.start_soon(use_one, _stdlib(accepted))

    async with trio.open_nursery() as nursery:
        for place in places:
            nursery.start_soon(listen, place)
        for target in targets:
            nursery.start_soon(connect, target)
        if beside is not None:
            nursery.start_soon(beside, use_one)
    return done


async def connected(sock: trio.socket.SocketType, target: Endpoint) -> socket.socket:
    """The connection of a reserved socket with `target`. Raises OSError; the socket is closed then."""
    try:
        await sock.connect((str(target.ip), target.port))
    except BaseException:
        sock.close()
        raise
    return _stdlib(sock)


#: No try from here will reach there.
_HOPELESS = {errno.EAFNOSUPPORT, errno.EACCES, errno.EPERM, errno.EINVAL}


def reserve(local: Endpoint, segment: int) -> trio.socket.SocketType:
    """A socket on the leg's port, which others share; port 0: on a fresh one, alone. Raises OSError."""
    sock = socket.socket(local.family, socket.SOCK_STREAM)
    try:
        if local.port:
            share_port(sock)
        limit_segments(sock, segment)
        sock.bind((str(local.ip), local.port))
    except BaseException:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)


def _stdlib(sock: trio.socket.SocketType) -> socket.socket:
    """The same connection as a socket of the standard library, the only owner."""
    plain = socket.socket(fileno=sock.detach())
    with contextlib.suppress(OSError):
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plain
