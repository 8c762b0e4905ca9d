"""The processes that answer HTTP, seen from the supervisor: it binds the socket; a process without rights
(vpnd/exporter.py, vpnd/page) answers on it, and is told the status when it asks."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from supervisor.children import Child
from supervisor.nursery import Nursery
from supervisor.pacing import Priorities
from vpnd.api import messages, parts
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.errors import MachineError
from vpnd.metrics import create_page


class Endpoint(NamedTuple):
    """One of them. `key`: the setting that says where it listens."""

    title: str
    module: str
    key: str
    listen: Callable[[Config], str]
    max_age_s: Callable[[Config], float]


EXPORTER = Endpoint(
    "exporter",
    "vpnd.exporter",
    "metrics.listen",
    lambda config: config.metrics.listen,
    lambda config: config.metrics.max_age,
)
PAGE = Endpoint(
    "page", "vpnd.page", "web.listen", lambda config: config.web.listen, lambda config: config.web.interval
)


class ExporterSlot:
    """The listening socket, which outlives the processes. See children.Slot. `token`: see vpnd.page."""

    role = "exporter"
    more_time_s = 0.0

    def __init__(self, endpoint: Endpoint, live: Live, token: str) -> None:
        """Raises MachineError when the address cannot be bound."""
        self.title, self.module = endpoint.title, endpoint.module
        self._live, self._token = live, token
        listen = endpoint.listen(live.config)
        host, _, port = listen.rpartition(":")
        host = host.strip("[]")
        try:
            ((family, _, _, _, address), *_) = socket.getaddrinfo(
                host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            self._socket = socket.create_server(address[:2], family=family)
        except OSError as error:
            raise MachineError(
                f"{endpoint.key} = {listen}: {error.strerror}; choose another address or empty it"
            ) from error
        self.page, self._page_fd = create_page((), f"vpnd-heartbeat-{self.title}")

    def begin(self) -> tuple[messages.Message, tuple[int, ...]]:
        start = messages.ExporterStart(config=self._live.config, token=self._token)
        return start, (self._socket.fileno(), self._page_fd)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        self.page.close()
        os.close(self._page_fd)


class Exporter:
    """Owner: supervisor loop. `start`, then `stop`, once each.

    `told` is called at most once in the endpoint's max_age_s, whatever the process asks; see report.Shared.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        live: Live,
        priorities: Priorities,
        nursery: Nursery,
        told: Callable[[float], Awaitable[bytes]],
        token: str = "",
    ) -> None:
        self._endpoint, self._live, self._priorities, self._told = endpoint, live, priorities, told
        self._slot = ExporterSlot(endpoint, live, token)
        self.child = Child(self._slot, live, priorities, nursery, self._up, self._gone, self._said)
        self._telling: asyncio.Task[None] | None = None
        self._told_s = 0.0
        live.watch(lambda config: config, self._reconfigured)

    async def start(self) -> None:
        """Return when it answers. Raises the error it failed with."""
        await self.child.start()

    async def stop(self) -> None:
        """End the process, and listen no more."""
        await self.child.stop()
        self._gone(self.child)
        self._slot.close()

    def _reconfigured(self) -> None:
        self.child.send(messages.Reconfigure(config=self._live.config))

    def _up(self, child: Child[ExporterSlot]) -> None:
        self._priorities.usual(child.pid)

    def _said(self, child: Child[ExporterSlot], message: messages.Message) -> None:
        if isinstance(message, messages.StatusWanted) and self._telling is None:
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    def _gone(self, child: Child[ExporterSlot]) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None

    async def _tell(self) -> None:
        loop = asyncio.get_running_loop()
        max_age_s = self._endpoint.max_age_s(self._live.config)
        await asyncio.sleep(self._told_s + max_age_s - loop.time())
        self._told_s = loop.time()
        try:
            content = await self._told(max_age_s)
            for part in parts.split(messages.StatusTold(content=content)):
                await asyncio.sleep(0)  # packets have their turn: of 1,000 peers it is a megabyte
                self.child.send(part)
        finally:
            self._telling = None
