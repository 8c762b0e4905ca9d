"""The names of members, as control serves them: a zone that follows the members, on sockets the supervisor binds.

The zone's table is made again with the first query after members have changed, not with each change: where hundreds
come at once, one table is made.

Served over UDP and TCP (RFC 1035 section 4.2, RFC 7766). Port 53 takes root to bind, so control gets descriptors.
Everything a client can take is bounded by the `dns` settings: the size of a query, the time to send it and to take its
answer, connections in all and per address. Over UDP an answer that the socket does not take at once is dropped; the
resolver asks again. One client's failure ends its own connection and nothing else.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import trio

from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Dns
from vpnd.discovery.registry import Member
from vpnd.errors import ProtocolViolation
from vpnd.names.members import MemberTable, table_of
from vpnd.names.zone import Zone

log = logging.getLogger(__name__)


class NameService:
    """Answers for one network. Owner: control's trio loop; `run` once, the rest at any time.

    `members` gives the other members, as they are at the moment. `count` as `NameServer` counts.
    """

    def __init__(
        self,
        own_id: str,
        members: Callable[[], Iterable[Member]],
        settings: Dns,
        count: Callable[[str], None],
    ) -> None:
        self._own_id, self._members = own_id, members
        self._settings, self._count = settings, count
        self._own: OwnAddresses | None = None
        self._zone: Zone | None = None
        self._table = MemberTable(())
        self._stale = False
        self._waiting: tuple[list[socket.socket], list[socket.socket]] | None = None
        self._arrived = trio.Event()
        self._serving = trio.CancelScope()

    # what is answered

    def own_changed(self, own: OwnAddresses) -> None:
        """This node's name, addresses and network. Nothing is answered before the first call."""
        self._own, self._zone, self._stale = own, None, True

    def changed(self) -> None:
        """Members have come, gone, or have other names or addresses."""
        self._stale = True

    def answer_untrusted(self, wire: bytes, *, tcp: bool) -> bytes | None:
        """See `vpnd.names.zone.Zone`."""
        self._refresh()
        return self._zone.answer_untrusted(wire, tcp=tcp) if self._zone is not None else None

    def _refresh(self) -> None:
        own = self._own
        if own is None or not self._stale:
            return
        self._stale = False
        prefixes = tuple(f"{text}/{ipaddress.ip_address(text).max_prefixlen}" for text in own.addresses)
        myself = Member(peer_id=self._own_id, name=own.label, prefixes=prefixes, addresses=())
        self._table = table_of([*self._members(), myself])
        if self._zone is not None:
            self._zone.replace(self._table)
            return
        subnets = [ipaddress.ip_network(text) for text in own.subnets]
        try:
            self._zone = Zone(own.network, own.label, subnets, self._settings, self._table)
        except ValueError as error:
            log.warning("names of members are not answered: %s", error)

    # where it is answered

    def sockets(self, udp: int, descriptors: list[int]) -> None:
        """Serve on these from now on, and no longer on those before: `udp` UDP sockets, then as many of TCP.

        Takes the descriptors out of the list. Raises ProtocolViolation when they are of another number.
        """
        if len(descriptors) != 2 * udp:
            raise ProtocolViolation(f"NameSockets for {udp} sockets with {len(descriptors)} descriptors")
        taken = [socket.socket(fileno=descriptors.pop(0)) for _ in range(len(descriptors))]
        _close(self._waiting)
        self._waiting = taken[:udp], taken[udp:]
        self._serving.cancel()
        self._arrived.set()

    async def run(self) -> None:
        try:
            while True:
                await self._arrived.wait()
                self._arrived = trio.Event()
                waiting, self._waiting = self._waiting, None
                if waiting is not None:
                    with trio.CancelScope() as self._serving:
                        await self._serve(*waiting)
        finally:
            _close(self._waiting)

    async def _serve(self, udp: list[socket.socket], tcp: list[socket.socket]) -> None:
        try:
            await NameServer(self, self._settings, self._count).run(udp, tcp)
            await trio.sleep(math.inf)  # there was not one socket
        except* OSError as group:
            log.warning("names of members are not answered: %s", group.exceptions[0])


def _close(sockets: tuple[list[socket.socket], list[socket.socket]] | None) -> None:
    for each in sockets or ():
        for bound in each:
            bound.close()


#: RFC 1035 section 4.2.2: the length before each message over TCP.
LENGTH_BYTES = 2


class NameServer:
    """Serves one zone on any number of sockets. Owner: control; `run` once."""

    def __init__(self, zone: NameService | Zone, settings: Dns, count: Callable[[str], None]) -> None:
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
