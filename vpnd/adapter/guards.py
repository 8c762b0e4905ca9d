"""Guards around py-libp2p's swarm: against what a remote could do to it, and what it does to itself.

`InboundGate` replaces the swarm's handling of accepted connections. Stock libp2p keeps a slot and a task per
inbound connection until the whole swarm ends, so a host refuses everybody after some hundred reconnects.
`contained` wraps stream handlers. Stock libp2p lets an exception in one end the host.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.network.connection.raw_connection import RawConnection

from vpnd.adapter.logs import Seldom
from vpnd.adapter.noise import UnknownPeer
from vpnd.adapter.transport import close_now

Count = Callable[[str], None]
StreamHandler = Callable[[Any], Awaitable[None]]


class HandedOver(Exception):
    """Raised by the session muxer to end libp2p's part: the connection has been dealt with."""


class InboundGate:
    """Accepts connections for a swarm: bounded handshakes, released slots, bounded connections per peer.

    When more than `max_handshakes` are under way the oldest is closed: an honest one takes milliseconds, so
    a flood of silent connections cannot keep a member out. Counts under names of vpnd.metrics.
    Owner: the swarm's trio loop.
    """

    def __init__(
        self,
        swarm: Any,
        *,
        max_handshakes: int,
        max_connections_per_peer: int,
        count: Count,
        seldom: Seldom,
    ) -> None:
        self._swarm = swarm
        self._max_handshakes = max_handshakes
        self._max_per_peer = max_connections_per_peer
        self._count = count
        self._seldom = seldom
        #: Under way, oldest first.
        self._handshakes: dict[RawConnection, None] = {}

    def install(self) -> None:
        """Put the gate into its swarm. Before the swarm listens."""
        self._swarm._do_handle_inbound_connection = self.handle

    async def handle(self, stream: Any, maddr: Any, failure_event: Any) -> None:
        """The life of one accepted connection. Returns when it has ended or has been handed over."""
        raw = RawConnection(stream, False)
        if len(self._handshakes) >= self._max_handshakes:
            self._count("refused_handshake_limit")
            self._seldom.warn(
                "handshakes", f"more than {self._max_handshakes} handshakes under way: closed the oldest"
            )
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            close_now(oldest)
        self._handshakes[raw] = None
        try:
            muxed = await self._swarm.upgrade_inbound_raw_conn(raw, maddr)
        except HandedOver:
            close_now(raw)
            return
        except Exception as error:
            close_now(raw)
            if not _caused_by(error, UnknownPeer):
                self._count("handshake_failures")
            return
        finally:
            self._handshakes.pop(raw, None)
        await self._live(raw, muxed)

    async def _live(self, raw: RawConnection, muxed: Any) -> None:
        try:
            if len(self._swarm.get_connections(muxed.peer_id)) > self._max_per_peer:
                self._count("refused_connection_limit")
                await muxed.close()
            await muxed.event_closed.wait()
        finally:
            close_now(raw)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__
    return False


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
