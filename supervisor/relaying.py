"""The relay process: started when control first says that members wait for calls here."""

from __future__ import annotations

import asyncio
import logging
import os

from supervisor.children import Child, State, introduce
from supervisor.nursery import Nursery
from supervisor.pacing import Priorities
from supervisor.slots import ControlSlot
from vpnd.api import messages
from vpnd.config.live import Live
from vpnd.errors import VpndError
from vpnd.metrics import create_page

log = logging.getLogger("supervisor")


class RelaySlot:
    """The relay process, seen from the supervisor: a children.Slot. Only the page with its heartbeat outlives it."""

    title, role, module, more_time_s = "relay", "relay", "vpnd.relay", 0.0

    def __init__(self, live: Live) -> None:
        self._live = live
        self.page, self._page_fd = create_page((), "vpnd-heartbeat-relay")

    def begin(self) -> tuple[messages.Message, tuple[int, ...]]:
        return messages.RelayStart(config=self._live.config), (self._page_fd,)

    def close(self) -> None:
        """The node stops."""
        self.page.close()
        os.close(self._page_fd)


class RelayChild:
    """Owner: supervisor loop."""

    def __init__(
        self, live: Live, priorities: Priorities, nursery: Nursery, control: Child[ControlSlot]
    ) -> None:
        self._live, self._control = live, control
        self._starting: asyncio.Task[None] | None = None
        self.child = Child(
            RelaySlot(live),
            live,
            priorities,
            nursery,
            lambda _: self.introduce(),
            lambda _: None,
            lambda *_: None,
        )

    def want(self) -> None:
        """Start it, unless it is there or on its way."""
        if self.child.state is State.STOPPED and self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())

    async def _start(self) -> None:
        try:
            await self.child.start()
        except VpndError as error:
            log.error("no sessions of other members are relayed: %s", error)
        finally:
            self._starting = None

    def introduce(self) -> None:
        """It or control is there (again)."""
        introduce(self._control, messages.RelayArrived(), self.child)

    def reconfigured(self) -> None:
        """The configuration is another one."""
        if self.child.state is State.UP:
            self.child.send(messages.Reconfigure(config=self._live.config))

    async def stop(self) -> None:
        """End it; its pairs end with it."""
        if self._starting is not None:
            self._starting.cancel()
        await self.child.stop()
