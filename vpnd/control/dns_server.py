"""Serving the names of members over UDP and TCP (RFC 1035 section 4.2, RFC 7766), on sockets made by others.

Port 53 takes root to bind, so the supervisor binds and control gets descriptors. Everything a client can take is
bounded by the `dns` settings: the size of a query, the time to send it and to take its answer, connections in all and
per address. Over UDP an answer that the socket does not take at once is dropped; the resolver asks again. One client's
failure ends its own connection and nothing else.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import trio

from vpnd.config.schema import Dns

#: RFC 1035 section 4.2.2: the length before each message over TCP.
LENGTH_BYTES = 2

log = logging.getLogger(__name__)


class Answerer(Protocol):
    """`vpnd.names.zone.Zone`, or anything that answers like it: never raises, None for no answer."""

    def answer_untrusted(self, wire: bytes, *, tcp: bool) -> bytes | None:
        """The answer to one message."""
        ...


class NameServer:
    """Serves one zone on any number of sockets. Owner: control; `run` once."""

    def __init__(self, zone: Answerer, settings: Dns, count: Callable[[str], None]) -> None:
        """`count` is called with the names of counters: dns_queries, dns_ignored, dns_connections_refused."""
        self._zone = zone
        self._settings = settings
        self._count = count
        self._connections: dict[trio.CancelScope, str] = {}  # oldest first, with the client's address
        self._per_client: Counter[str] = Counter()

    async def run(self, udp: Sequence[socket.socket], tcp: Sequence[socket.socket]) -> None:
        """Serve until cancelled; closes the sockets then. They are bound; `tcp` need not listen yet.

        Raises OSError only when a socket of `tcp` cannot listen.
        """
        try:
            listeners = []
            for bound in tcp:
                bound.listen(self._settings.max_connections)
                listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(bound)))
            async with trio.open_nursery() as nursery:
                for bound in udp:
                    bound.setblocking(False)
                    nursery.start_soon(self._serve_datagrams, bound)
                if listeners:
                    # goes on where descriptors run out for a moment
                    nursery.start_soon(partial(trio.serve_listeners, self._serve_connection, listeners))
        finally:
            for bound in udp:
                bound.close()

    def _answer_untrusted(self, query: bytes, tcp: bool) -> bytes | None:
        if len(query) > self._settings.max_query_bytes:
            self._count("dns_ignored")
            return None
        try:
            answer = self._zone.answer_untrusted(query, tcp=tcp)
        except Exception:
            # a bug, and one that strangers can reach: the others' names go on
            log.exception("a DNS query of %d bytes could not be answered", len(query))
            answer = None
        self._count("dns_ignored" if answer is None else "dns_queries")
        return answer

    async def _serve_datagrams(self, bound: socket.socket) -> None:
        # one more than is allowed, to tell a longer datagram from one that was cut
        most = self._settings.max_query_bytes + 1
        while True:
            await trio.lowlevel.wait_readable(bound.fileno())
            try:
                query, client = bound.recvfrom(most)
            except OSError:
                continue  # readable no more, or an error of an earlier answer; reading took it off the socket
            answer = self._answer_untrusted(query, tcp=False)
            if answer is not None:
                try:
                    bound.sendto(answer, client)
                except OSError:
                    self._count("dns_ignored")

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                client = stream.socket.getpeername()[0]
            except OSError:
                return
            if self._per_client[client] >= self._settings.max_connections_per_client:
                self._count("dns_connections_refused")
                return
            with trio.CancelScope() as scope:
                self._admit(scope, client)
                try:
                    await self._converse_untrusted(stream)
                except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                    pass
                finally:
                    self._forget(scope)

    def _admit(self, scope: trio.CancelScope, client: str) -> None:
        """The newest gets in: a client that holds idle connections must not keep the others out."""
        if len(self._connections) >= self._settings.max_connections:
            oldest = next(iter(self._connections))
            oldest.cancel()
            self._forget(oldest)
            self._count("dns_connections_refused")
        self._connections[scope] = client
        self._per_client[client] += 1

    def _forget(self, scope: trio.CancelScope) -> None:
        client = self._connections.pop(scope, None)
        if client is not None:
            self._per_client[client] -= 1
            if not self._per_client[client]:
                del self._per_client[client]

    async def _converse_untrusted(self, stream: trio.SocketStream) -> None:
        """Query after query, until the client goes, idles, dawdles or sends what is no query."""
        settings = self._settings
        received = bytearray()
        while True:
            if not received:
                with trio.move_on_after(settings.idle_timeout):
                    received += await stream.receive_some(LENGTH_BYTES + settings.max_query_bytes)
                if not received:
                    return
            query = None
            with trio.move_on_after(settings.query_timeout):
                query = await self._query_untrusted(stream, received)
            answer = None if query is None else self._answer_untrusted(query, tcp=True)
            if answer is None:
                return
            sent = False
            with trio.move_on_after(settings.query_timeout):
                await stream.send_all(len(answer).to_bytes(LENGTH_BYTES, "big") + answer)
                sent = True
            if not sent:
                return

    async def _query_untrusted(self, stream: trio.SocketStream, received: bytearray) -> bytes | None:
        """Takes one message out of `received`, reading more as it needs; None when it is not for us to read."""
        while len(received) < LENGTH_BYTES:
            if not await self._more(stream, received):
                return None
        end = LENGTH_BYTES + int.from_bytes(received[:LENGTH_BYTES], "big")
        if end > LENGTH_BYTES + self._settings.max_query_bytes:
            self._count("dns_ignored")
            return None
        while len(received) < end:
            if not await self._more(stream, received):
                return None
        query = bytes(received[LENGTH_BYTES:end])
        del received[:end]
        return query

    async def _more(self, stream: trio.SocketStream, received: bytearray) -> bool:
        data = await stream.receive_some(LENGTH_BYTES + self._settings.max_query_bytes)
        received += data
        return bool(data)
