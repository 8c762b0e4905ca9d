"""Carrying out what the planner plans: one task for each dial, until there is a session, an error or no interest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from vpnd.adapter.dial import DialError, dial_any
from vpnd.adapter.handoff import Detached
from vpnd.config.schema import Config
from vpnd.control.dialstate import NEVER, Dial
from vpnd.control.planner import Planner
from vpnd.errors import VpndError

log = logging.getLogger(__name__)


class ShardBusy(VpndError):
    """The shard does not read its messages: it would get a session too late, and the peer is not to blame."""


class Host(Protocol):
    """What is needed of vpnd.adapter.host.Host."""

    async def dial(self, address: str, peer_id: str) -> Detached:
        """A session, which the caller closes. Raises DialError."""
        ...


class Dialer:
    """Runs the dials that are due. Owner: control's loop.

    `keeps_up(shard)`: whether it reads its messages; one that does not gets no dial. `hand_over(session, shard)`:
    pass a session on, which is closed here afterwards; False when nobody takes it, which is nobody's failure.
    `announce`: called whenever the planner may have changed a circuit. `count` counts under names of vpnd.metrics.
    """

    def __init__(
        self,
        planner: Planner,
        config: Config,
        *,
        keeps_up: Callable[[int], bool],
        hand_over: Callable[[Detached, int], bool],
        announce: Callable[[], None],
        count: Callable[[str], None],
        now_s: Callable[[], float],
    ) -> None:
        self._planner = planner
        self._keeps_up = keeps_up
        self._hand_over = hand_over
        self._announce = announce
        self._count = count
        self._now_s = now_s
        self._scopes: dict[Dial, trio.CancelScope] = {}
        self._slots = trio.CapacityLimiter(config.p2p.max_dials)
        self._address_stagger_s = config.p2p.address_stagger
        self._changed = trio.Event()

    def configure(self, config: Config) -> None:
        """Other settings, for the dials that begin from now on."""
        self._slots.total_tokens = config.p2p.max_dials
        self._address_stagger_s = config.p2p.address_stagger

    def replan(self) -> None:
        """Look at the plan again: it may be another one."""
        self._changed.set()

    def cancel(self, applies: Callable[[Dial], bool]) -> None:
        """End the dials under way that `applies` to. The planner must have forgotten them."""
        for dial, scope in self._scopes.items():
            if applies(dial):
                scope.cancel()

    async def run(self, host: Host) -> None:
        """Dial for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                for dial in self._planner.take_due(self._now_s()):
                    scope = self._scopes[dial] = trio.CancelScope()
                    nursery.start_soon(self._dial, host, dial, scope)
                self._announce()
                wait_s = self._planner.next_due_s() - self._now_s()
                with trio.move_on_after(max(0.0, wait_s) if wait_s < NEVER else NEVER):
                    await self._changed.wait()

    async def _dial(self, host: Host, dial: Dial, scope: trio.CancelScope) -> None:
        """One dial, from plan to session or failure. Whatever goes wrong stays in here."""
        error, blame = "", True
        try:
            with scope:
                await self._try(host, dial)
        except DialError as failure:
            error = str(failure)
        except ShardBusy as failure:
            error, blame = str(failure), False
        except Exception as failure:
            log.exception("dialing %s failed in an unforeseen way", dial.member.name)
            error = f"{type(failure).__name__}: {failure}"
        finally:
            del self._scopes[dial]
        if error:
            self._count("dial_failures")
        if self._planner.dial_ended(dial, error, self._now_s(), blame=blame):
            log.info("no session with %s: %s", dial.member.name, error)
        self._announce()
        self.replan()

    async def _try(self, host: Host, dial: Dial) -> None:
        peer_id = dial.member.peer_id
        async with self._slots:
            if not self._keeps_up(dial.shard):
                raise ShardBusy(f"shard {dial.shard} does not keep up with its messages")
            self._count("dials")
            if dial.retry:
                self._count("retries")
            session = await dial_any(
                lambda address: host.dial(address, peer_id), dial.member.addresses, self._address_stagger_s
            )
        try:
            if self._hand_over(session, dial.shard):
                self._count("sessions_dialed")
        finally:
            session.close()
