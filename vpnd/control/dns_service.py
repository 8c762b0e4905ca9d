"""The names of members, as control serves them: a zone that follows the members, on sockets the supervisor binds.

The zone's table is made again with the first query after members have changed, not with each change: where hundreds
come at once, one table is made.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import socket
from collections.abc import Callable, Iterable, Sequence

import trio

from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Dns
from vpnd.control.dns_server import NameServer
from vpnd.discovery.registry import Member
from vpnd.errors import ProtocolViolation
from vpnd.names.members import MemberTable, table_of
from vpnd.names.zone import Zone, origin_of

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

    def find(self, text: str) -> Sequence[ipaddress.IPv4Address | ipaddress.IPv6Address] | None:
        """The addresses of a member whose name, label or full name a user wrote; None for nobody's."""
        self._refresh()
        return self._table.find(text, origin_of(self._own.network)) if self._own is not None else None

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
        """Serve until cancelled."""
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
