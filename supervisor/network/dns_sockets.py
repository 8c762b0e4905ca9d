"""Names of members on this machine: sockets for control to answer on, and the word to systemd-resolved.

Port 53 takes root, answering takes none: the supervisor binds UDP and TCP on each virtual address, keeps the sockets
for the next control, and reads nothing from them. Names are a convenience, so nothing here fails a start: what did not
work is in `warnings`, which `vpnd status` shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence

from vpnd.api import messages
from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Dns
from vpnd.names.origins import origin_of
from vpnd.names.resolved import Link, Resolved

log = logging.getLogger("supervisor")

#: What gives a message with its descriptors to control.
Send = Callable[[messages.Message, tuple[int, ...]], object]


class Names:
    """Sockets and registration of one node. Owner: supervisor loop; `close` when done, before the device goes."""

    def __init__(self, interface: str, settings: Dns, resolved: Resolved | None = None) -> None:
        """`interface` is the TUN device; `resolved` is replaced by tests."""
        self._interface, self._settings = interface, settings
        self._resolved = resolved or Resolved(settings.register_timeout)
        self._sockets: dict[str, tuple[socket.socket, socket.socket]] = {}  # by address: UDP, TCP
        self._problems: list[str] = []
        self._hint = ""
        self._telling: asyncio.Task[None] | None = None
        self._link: Link | None = None

    @property
    def warnings(self) -> list[str]:
        """One line each: what does not work, and what the user can do about it."""
        return [*self._problems, *([self._hint] if self._hint else [])]

    def apply(self, own: OwnAddresses) -> None:
        """Have a socket of each kind on each of our addresses, which must be on the device, and on no other.

        Registers with systemd-resolved in the background. Give the sockets to control afterwards.
        """
        if not self._settings.enabled:
            return
        self._problems = []
        for address in [held for held in self._sockets if held not in own.addresses]:
            _close(self._sockets.pop(address))
        for address in own.addresses:
            if address not in self._sockets:
                try:
                    self._sockets[address] = _bind(address, self._settings.port)
                except OSError as error:
                    self._problems.append(
                        f"names are not answered at {address} port {self._settings.port}: {error.strerror}"
                    )
                    log.warning("%s", self._problems[-1])
        servers = tuple(address for address in own.addresses if address in self._sockets)
        link = Link(
            interface=self._interface,
            origin=origin_of(own.network),
            prefixes=tuple(ipaddress.ip_network(text) for text in own.subnets),
            servers=servers,
            port=self._settings.port,
        )
        if servers and link != self._link:
            self._link = link
            self._tell_resolved(link)

    def give(self, send: Send) -> None:
        """Give all sockets to control, which has to be told again whenever it was started again."""
        if not self._settings.enabled:
            return
        udp = tuple(pair[0].fileno() for pair in self._sockets.values())
        tcp = tuple(pair[1].fileno() for pair in self._sockets.values())
        send(messages.NameSockets(udp=len(udp)), (*udp, *tcp))

    async def registered(self) -> None:
        """Wait until systemd-resolved has been told what there is to tell."""
        if self._telling is not None:
            await asyncio.wait({self._telling})

    async def close(self) -> None:
        """Close the sockets and take the registration back. Idempotent."""
        for pair in self._sockets.values():
            _close(pair)
        self._sockets.clear()
        await self.registered()
        if self._link is not None:
            self._link = None
            await asyncio.to_thread(self._resolved.undo)

    def _tell_resolved(self, link: Link) -> None:
        before = self._telling

        async def tell() -> None:
            if before is not None:  # one at a time, in order
                await asyncio.wait({before})
            self._hint = await asyncio.to_thread(self._register, link)

        self._telling = asyncio.get_running_loop().create_task(tell())

    def _register(self, link: Link) -> str:
        """Blocks, for up to dns.register_timeout per command; returns the hint."""
        if not self._settings.register:
            return ""
        hint = self._resolved.register(link).hint
        return "" if self._settings.hosts_file else hint  # names are found in that file then


def _bind(address: str, port: int) -> tuple[socket.socket, socket.socket]:
    """UDP and TCP on one address. Raises OSError; neither is left then."""
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    with contextlib.ExitStack() as stack:
        pair = []
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            bound = stack.enter_context(socket.socket(family, kind))
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if kind == socket.SOCK_STREAM:  # connections of the node before may be in TIME_WAIT
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((address, port))
            bound.setblocking(False)
            pair.append(bound)
        stack.pop_all()
    return pair[0], pair[1]


def _close(pair: Sequence[socket.socket]) -> None:
    for bound in pair:
        bound.close()
