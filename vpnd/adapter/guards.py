"""Guards around py-libp2p's swarm: against what a remote could do to it, and what it does to itself.

`InboundGate` replaces the swarm's handling of accepted connections. Stock libp2p keeps a slot and a task per
inbound connection until the whole swarm ends, so a host refuses everybody after some hundred reconnects.
`contained` wraps stream handlers. Stock libp2p lets an exception in one end the host.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import INotifee

from vpnd.adapter.arrivals import Arrival, Pace, Places
from vpnd.adapter.dial import caused_by
from vpnd.adapter.noise import TooOften, UnknownPeer
from vpnd.adapter.transport import close_now
from vpnd.logs import Seldom

Count = Callable[[str], None]
StreamHandler = Callable[[Any], Awaitable[None]]


class HandedOver(Exception):
    """Raised by the session muxer to end libp2p's part: the connection has been dealt with."""


class InboundGate:
    """Accepts connections for a swarm: bounded handshakes, released slots, bounded connections per peer.

    `places`: whose handshakes go on when more are under way than may be. `pace` is told from where a member comes too
    often. Counts under names of vpnd.metrics.
    Owner: the swarm's trio loop.
    """

    def __init__(
        self,
        swarm: Any,
        *,
        places: Places,
        pace: Pace,
        max_connections_per_peer: int,
        count: Count,
        seldom: Seldom,
    ) -> None:
        self._swarm = swarm
        self._places, self._pace = places, pace
        self._max_per_peer = max_connections_per_peer
        self._count = count
        self._seldom = seldom

    def install(self) -> None:
        """Put the gate into its swarm. Before the swarm listens."""
        self._swarm._do_handle_inbound_connection = self.handle

    async def handle(self, stream: Any, maddr: Any, failure_event: Any) -> None:
        """The life of one connection: an Arrival at the door, or a stream that comes of a meeting. Returns when it has
        ended or has been handed over."""
        raw = stream if isinstance(stream, Arrival) else Arrival(stream)
        gone = self._places.enter(raw)
        if gone is not None:
            self._count("refused_handshake_limit")
            self._seldom.warn("handshakes", f"too many handshakes under way: closed one from {gone.source}")
            close_now(gone)
        try:
            muxed = await self._swarm.upgrade_inbound_raw_conn(raw, maddr)
        except HandedOver:
            close_now(raw)
            return
        except Exception as error:
            close_now(raw)
            if caused_by(error, (TooOften,)):
                if raw is stream:  # otherwise it is a relay that is there
                    self._pace.slow_down(raw.source)
            elif not caused_by(error, (UnknownPeer,)):
                self._count("handshake_failures")
            return
        finally:
            self._places.leave(raw)
        await self._live(raw, muxed)

    async def _live(self, raw: Arrival, muxed: Any) -> None:
        self._places.member_from(raw.source)
        try:
            # The swarm lists a connection for a while after its end.
            connections = self._swarm.get_connections(muxed.peer_id)
            if (
                sum(not each.muxed_conn.event_shutting_down.is_set() for each in connections)
                > self._max_per_peer
            ):
                self._count("refused_connection_limit")
                await muxed.close()
            await muxed.event_closed.wait()
        finally:
            close_now(raw)


def contained(
    handler: StreamHandler, *, deadline_s: float, reset_s: float, count: Count, seldom: Seldom
) -> StreamHandler:
    """`handler`, so that whatever happens in it ends its stream and nothing else.

    `deadline_s`: longest life of the stream, math.inf for none. `reset_s`: how long resetting it may take
    (a peer that reads nothing can block that). Only cancellation passes through.
    """

    async def run(stream: Any) -> None:
        try:
            with trio.fail_after(deadline_s):
                await handler(stream)
        except Exception as error:
            count("handler_errors")
            seldom.warn("handler", f"a stream handler failed: {type(error).__name__}: {error}")
            with trio.move_on_after(reset_s):
                try:
                    await stream.reset()
                except Exception:  # the connection has ended already: nothing is left to reset
                    return

    return run


class Notifee(INotifee):
    """Tells of connections, libp2p's, that came or went. Called inline by the swarm, so what it calls must not wait."""

    def __init__(
        self,
        connected: Callable[[Any], object] = lambda conn: None,
        disconnected: Callable[[Any], object] = lambda conn: None,
    ) -> None:
        self._connected, self._disconnected = connected, disconnected

    async def connected(self, network: Any, conn: Any) -> None:
        self._connected(conn)

    async def disconnected(self, network: Any, conn: Any) -> None:
        self._disconnected(conn)

    async def opened_stream(self, network: Any, stream: Any) -> None:
        return

    async def closed_stream(self, network: Any, stream: Any) -> None:
        return

    async def listen(self, network: Any, multiaddr: Any) -> None:
        return

    async def listen_close(self, network: Any, multiaddr: Any) -> None:
        return
