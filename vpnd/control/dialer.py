"""Carrying out what the planner plans: one task for each dial, until there is a session, an error or no interest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from vpnd.adapter.dial import DialError, dial_any
from vpnd.adapter.handoff import Detached
from vpnd.config.live import Live
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


class Taker(Protocol):
    """What is needed of vpnd.control.sessions.Sessions."""

    def keeps_up(self, shard: int) -> bool:
        """Whether the shard reads its messages; one that does not gets no dial."""
        ...

    def dialed(self, detached: Detached, shard: int) -> bool:
        """Pass a session on, which is closed afterwards; False when nobody takes it, which is nobody's failure."""
        ...

    def announce(self) -> None:
        """The planner may have changed a circuit."""
        ...


class Dialer:
    """Runs the dials that are due, and cancels those that the planner has forgotten. Owner: control's loop.

    `count` counts under names of vpnd.metrics.
    """

    def __init__(
        self, planner: Planner, live: Live, *, count: Callable[[str], None], now_s: Callable[[], float]
    ) -> None:
        self._planner, self._live = planner, live
        self._count, self._now_s = count, now_s
        self._scopes: dict[Dial, trio.CancelScope] = {}
        self._slots = trio.CapacityLimiter(live.config.p2p.max_dials)
        live.watch(lambda config: config.p2p.max_dials, self._other_limit)
        self._changed = trio.Event()

    def _other_limit(self) -> None:
        self._slots.total_tokens = self._live.config.p2p.max_dials

    def replan(self) -> None:
        """Look at the plan again: it may be another one."""
        self._changed.set()

    async def run(self, host: Host, taker: Taker) -> None:
        """Dial for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                for dial, scope in self._scopes.items():
                    if not self._planner.expects(dial):
                        scope.cancel()
                for dial in self._planner.take_due(self._now_s()):
                    scope = self._scopes[dial] = trio.CancelScope()
                    nursery.start_soon(self._dial, host, taker, dial, scope)
                taker.announce()
                wait_s = self._planner.next_due_s() - self._now_s()
                with trio.move_on_after(max(0.0, wait_s) if wait_s < NEVER else NEVER):
                    await self._changed.wait()

    async def _dial(self, host: Host, taker: Taker, dial: Dial, scope: trio.CancelScope) -> None:
        """One dial, from plan to session or failure. Whatever goes wrong stays in here."""
        error, blame = "", True
        try:
            with scope:
                await self._try(host, taker, dial)
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
        taker.announce()
        self.replan()

    async def _try(self, host: Host, taker: Taker, dial: Dial) -> None:
        peer_id = dial.member.peer_id
        async with self._slots:
            if not taker.keeps_up(dial.shard):
                raise ShardBusy(f"shard {dial.shard} does not keep up with its messages")
            self._count("dials")
            if dial.retry:
                self._count("retries")
            stagger_s = self._live.config.p2p.address_stagger
            session = await dial_any(
                lambda address: host.dial(address, peer_id), dial.member.addresses, stagger_s
            )
        try:
            if self._planner.expects(dial) and taker.dialed(session, dial.shard):
                self._count("sessions_dialed")
        finally:
            session.close()
