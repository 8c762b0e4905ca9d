"""Where connections come in: all that wait are accepted in one turn, and a flood's closed before anything is made of
them.

libp2p accepts one in each turn of the loop and makes stream and task for it first, which costs half a millisecond: a
flood that is faster fills the kernel's queue, and the kernel drops a member's SYN as readily as the flood's.

TCP_DEFER_ACCEPT would keep who says nothing from being accepted; but one word is cheap for a flood, and what has not
been accepted fills the queue of half-open connections instead.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import trio
from libp2p.abc import IListener
from libp2p.custom_types import THandler
from libp2p.io.trio import TrioTCPStream
from multiaddr import Multiaddr

from vpnd.adapter.addresses import parse_endpoint
from vpnd.adapter.arrivals import Arrival, source_of
from vpnd.adapter.transport import WatchfulTcp, close_now, share_port
from vpnd.config.live import Live
from vpnd.endpoint import Endpoint, of_socket_address

#: As many as the kernel lets wait (net.core.somaxconn): closing one of a flood costs less than the SYN of a member does
#: that finds no room, which is sent again after one second, and after three.
BACKLOG = 1 << 16


class Door(IListener):
    """One listening socket. `handler` gets an Arrival for each connection that `admits`, in a task of its own.

    Owner: the swarm's trio loop."""

    def __init__(
        self, handler: THandler, live: Live, watch: Callable[[Any], None], admits: Callable[[str], bool]
    ) -> None:
        self._handler, self._live, self._watch, self._admits = handler, live, watch, admits
        self.sockets: list[socket.socket] = []
        self._scope = trio.CancelScope()
        self._over: trio.Event | None = None

    async def listen(self, maddr: Multiaddr) -> None:
        """See IListener; once. Raises OSError."""
        place = parse_endpoint(str(maddr))
        listening = socket.socket(place.family, socket.SOCK_STREAM)
        try:
            listening.setblocking(False)
            share_port(listening)
            listening.bind((str(place.ip), place.port))
            listening.listen(BACKLOG)
        except BaseException:
            listening.close()
            raise
        self.sockets, self._over = [listening], trio.Event()
        trio.lowlevel.spawn_system_task(self._serve, listening, self._over)

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """See IListener."""
        names = (each.getsockname()[:2] for each in self.sockets)
        kinds = {socket.AF_INET: "ip4", socket.AF_INET6: "ip6"}
        return tuple(
            Multiaddr(f"/{kinds[each.family]}/{ip}/tcp/{port}")
            for each, (ip, port) in zip(self.sockets, names, strict=True)
        )

    async def close(self) -> None:
        """See IListener: with what came in here. Idempotent."""
        self._scope.cancel()
        if self._over is not None:
            await self._over.wait()

    async def _serve(self, listening: socket.socket, over: trio.Event) -> None:
        try:
            with self._scope, listening:
                async with trio.open_nursery() as nursery:
                    while True:
                        await trio.lowlevel.wait_readable(listening.fileno())
                        try:
                            self._accept_all(listening, nursery)
                        except BlockingIOError:
                            continue
                        except OSError:  # no descriptor is left, or no memory
                            await trio.sleep(self._live.config.retry.initial_interval)
        finally:
            self.sockets = []
            over.set()

    def _accept_all(self, listening: socket.socket, nursery: trio.Nursery) -> None:
        """As many as may be shaking hands, and then it is others' turn. Raises OSError."""
        admits = self._admits
        for _ in range(self._live.config.p2p.max_inbound_handshakes):
            try:
                sock, address = listening.accept()
            except ConnectionError:  # it has ended already
                continue
            if not admits(source_of(address[0])):
                sock.close()
                continue
            stream = TrioTCPStream(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
            remote = of_socket_address(address)
            stream._cached_remote_address = str(remote.ip), remote.port  # which libp2p cannot read of IPv6
            nursery.start_soon(self._run, Arrival(stream))

    async def _run(self, arrival: Arrival) -> None:
        try:
            self._watch(arrival.stream.stream)  # type: ignore[attr-defined]
            await self._handler(arrival)
        except Exception:  # of libp2p, in great variety: it ends this connection and nothing else
            return
        finally:
            close_now(arrival)


class OpenTcp(WatchfulTcp):
    """WatchfulTcp that also listens, with segments of session.small_segment. `permits`: see there; `admits`: sources
    from which one more connection may come in."""

    def __init__(
        self, live: Live, permits: Callable[[Endpoint], bool], admits: Callable[[str], bool]
    ) -> None:
        config = live.config
        session = config.session
        super().__init__(session.user_timeout, config.p2p.keepalive_interval, permits, session.small_segment)
        self._live, self._admits = live, admits

    def create_listener(self, handler_function: THandler) -> Door:  # type: ignore[override]
        """See TCP."""
        return Door(handler_function, self._live, self.watch, self._admits)
