"""Which peers get small TCP segments, and how they come by large ones again.

    large ── large ones seem to get lost ──▶ doubt: its next sessions have small ones
      ▲                                        │ session.segment_trial later, beside those: a session with large ones
      └───────── its shard says it is up ──────┤
                                               └─ it is not: again after twice that, up to session.segment_trial_max

A way that carries nothing for some seconds looks like one that drops what is large, until a session comes about. Where
there was doubt a shard uses a session with large segments only when they have passed both ways: a trial costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Protocol

import trio

from vpnd.adapter.dial import DialError, dial_any
from vpnd.adapter.handoff import Detached
from vpnd.config.live import Live
from vpnd.control.dialstate import NEVER
from vpnd.discovery.registry import Member

log = logging.getLogger(__name__)


class Host(Protocol):
    """What is needed of vpnd.adapter.host.Host."""

    async def dial(self, address: str, peer_id: str, *, small: bool) -> Detached:
        """A session, which the caller closes. Raises DialError."""
        ...


class Taker(Protocol):
    """What is needed of vpnd.control.sessions.Sessions."""

    def dialed(self, detached: Detached, shard: int) -> int:
        """Pass a session on, which is closed afterwards: its id; 0 when nobody takes it."""
        ...

    def dialed_directly(self, peer_id: str, since_s: float) -> tuple[Member | None, Collection[int]]:
        """The peer, if it still is one, and the shards that have sessions with it which this node has dialed since then
        and nobody relays."""
        ...


class _Doubt:
    """About one peer. `wait_s`: until the next trial, which is `due_s`; `failures`: trials that large segments did not
    survive."""

    def __init__(self, now_s: float, wait_s: float) -> None:
        self.begun_s, self.wait_s, self.failures = now_s, wait_s, 0
        self.due_s = now_s + wait_s


class Segments:
    """Owner: control's loop; `run` once."""

    def __init__(self, live: Live, now_s: Callable[[], float]) -> None:
        self._live, self._now_s = live, now_s
        self._doubts: dict[str, _Doubt] = {}
        self._changed = trio.Event()
        self._trial = 0  # the session that is tried
        self._verdict = trio.Event()
        self._passed = False

    def small(self, peer_id: str) -> bool:
        """Whether sessions with the peer are to have small segments."""
        return peer_id in self._doubts

    def stuck(self, peer_id: str, name: str) -> None:
        """Large ones seem to get lost on the way to the peer, or from it."""
        if peer_id not in self._doubts:
            session = self._live.config.session
            self._doubts[peer_id] = _Doubt(self._now_s(), session.segment_trial)
            log.info(
                "large TCP segments may not reach %s: its next sessions have segments of %d bytes",
                name,
                session.small_segment,
            )
            self._changed.set()

    def network_changed(self) -> None:
        """All ways are others."""
        self._doubts.clear()

    def over(self, session_id: int, *, up: bool) -> bool:
        """The shard says that the session is up, or has ended; whether it is the one that is tried."""
        if session_id != self._trial or self._verdict.is_set():
            return False
        self._passed = up
        self._verdict.set()
        return True

    async def run(self, host: Host, taker: Taker) -> None:
        """Try what is due, one peer at a time, for ever."""
        while True:
            self._changed = trio.Event()
            due_s = min((doubt.due_s for doubt in self._doubts.values()), default=NEVER)
            with trio.move_on_after(max(0.0, due_s - self._now_s()) if due_s < NEVER else NEVER):
                await self._changed.wait()
            now_s = self._now_s()
            for peer_id in [peer_id for peer_id, doubt in self._doubts.items() if doubt.due_s <= now_s]:
                try:
                    await self._try(host, taker, peer_id)
                except Exception:
                    log.exception("large segments could not be tried")

    async def _try(self, host: Host, taker: Taker, peer_id: str) -> None:
        doubt = self._doubts.get(peer_id)
        if doubt is None:
            return
        # Without a session that came about since nothing is known of the way, and that one is to come first.
        member, shards = taker.dialed_directly(peer_id, doubt.begun_s)
        if member is None:
            del self._doubts[peer_id]
            return
        passed: list[bool | None] = []
        for shard in shards:
            passed.append(await self._passes(host, taker, member, shard))
            if not passed[-1]:
                break
        if self._doubts.get(peer_id) is not doubt:
            return
        if passed and all(passed):
            log.info("large TCP segments reach %s", member.name)
            del self._doubts[peer_id]
            return
        if False in passed:
            session = self._live.config.session
            doubt.failures += 1
            doubt.wait_s = min(2 * doubt.wait_s, session.segment_trial_max)
            if doubt.failures == 1:
                log.info(
                    "large TCP segments do not reach %s: something on the way has a small MTU and does not say so; its "
                    "sessions have segments of %d bytes",
                    member.name,
                    session.small_segment,
                )
        doubt.due_s = self._now_s() + doubt.wait_s

    async def _passes(self, host: Host, taker: Taker, member: Member, shard: int) -> bool | None:
        """Whether large segments do; None when there was no session to tell by."""
        p2p = self._live.config.p2p
        try:
            detached = await dial_any(
                lambda address: host.dial(address, member.peer_id, small=False),
                member.addresses,
                p2p.address_stagger,
            )
        except DialError as error:
            log.debug("large segments to %s not tried: %s", member.name, error)
            return None
        self._verdict, self._passed = trio.Event(), False
        try:
            self._trial = taker.dialed(detached, shard)
        finally:
            detached.close()
        if not self._trial:
            return None
        with trio.move_on_after(p2p.dial_timeout) as patience:
            await self._verdict.wait()
        self._trial = 0
        return None if patience.cancelled_caught else self._passed
