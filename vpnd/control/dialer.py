"""Carrying out what the planner plans: one task for each dial, until there is a session, an error or no interest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import trio

from vpnd.adapter.dial import DialError, dial_any
from vpnd.adapter.handoff import Detached
from vpnd.adapter.host import Host
from vpnd.config.live import Live
from vpnd.control.dialstate import NEVER, Dial
from vpnd.control.planner import Planner
from vpnd.control.traversal import CalledMeanwhile, Traversal
from vpnd.discovery.registry import Member
from vpnd.errors import VpndError
from vpnd.nat.messages import BOTH, PUNCH
from vpnd.nat.paths import RELAYED

log = logging.getLogger(__name__)


#: Of a peer whose addresses mean nothing here.
NO_RELAY = (
    "it is behind a NAT, and no member that both can reach relays: forward a port to one member's p2p.listen; see "
    "docs/nat.md"
)


class ShardBusy(VpndError):
    """The shard does not read its messages: it would get a session too late, and the peer is not to blame."""


class Taker(Protocol):
    """What is needed of vpnd.control.sessions.Sessions."""

    def keeps_up(self, shard: int) -> bool:
        """Whether the shard reads its messages; one that does not gets no dial."""
        ...

    def dialed(self, detached: Detached, shard: int) -> int:
        """Pass a session on, which is closed afterwards: its id; 0 when nobody takes it, which is nobody's failure."""
        ...

    def relayed(self, peer_id: str, shard: int) -> bool:
        """Whether the shard reaches that peer by a relay only."""
        ...

    def announce(self) -> None:
        """The planner may have changed a circuit."""
        ...


class _Attempt:
    """A dial under way. `over`: the planner has been told how it ended."""

    def __init__(self, dial: Dial) -> None:
        self.dial, self.scope = dial, trio.CancelScope()
        self.over = False


class Dialer:
    """Runs the dials that are due. Owner: control's loop.

    A dial is over with the first session it gets. It goes on, beside that, as long as a better one may come: behind a
    relayed session a direct one. Later that is tried again, by who dialed, every nat.upgrade_interval, doubling.

    `count` counts, `measured` adds to histograms, under names of vpnd.metrics. `small`: whether sessions with that peer
    id are to have small segments.
    """

    def __init__(
        self,
        planner: Planner,
        live: Live,
        traversal: Traversal,
        *,
        count: Callable[[str], None],
        measured: Callable[[str, float], None],
        now_s: Callable[[], float],
        small: Callable[[str], bool],
    ) -> None:
        self._planner, self._live, self._traversal, self._small = planner, live, traversal, small
        self._count, self._measured, self._now_s = count, measured, now_s
        self._attempts: dict[Dial, _Attempt] = {}
        self._slots = trio.CapacityLimiter(live.config.p2p.max_dials)
        live.watch(lambda config: config.p2p.max_dials, self._other_limit)
        self._changed = trio.Event()
        self._elsewhere = trio.Event()
        self._improving: dict[tuple[str, int], Improving] = {}
        self._found: list[tuple[Member, int]] = []

    def _other_limit(self) -> None:
        self._slots.total_tokens = self._live.config.p2p.max_dials

    def replan(self) -> None:
        """Look at the plan again: it may be another one."""
        self._changed.set()

    def begin_anew(self) -> None:
        """What could not be had directly may be had now: it is tried at once."""
        self._elsewhere.set()
        self._elsewhere = trio.Event()

    def found_relayed(self, member: Member, shard: int) -> None:
        """The shard has a relayed session with the member, which this node dialed before control was started anew."""
        self._found.append((member, shard))

    def improving(self, peer_id: str, shard: int) -> Improving | None:
        """What is being done about a relayed session of the shard with that peer, if this node dialed it."""
        return self._improving.get((peer_id, shard))

    async def run(self, host: Host, taker: Taker) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                for dial, attempt in self._attempts.items():
                    if not attempt.over and not self._planner.expects(dial):
                        attempt.scope.cancel()
                for dial in self._planner.take_due(self._now_s()):
                    attempt = self._attempts[dial] = _Attempt(dial)
                    nursery.start_soon(self._dial, host, taker, attempt)
                while self._found:
                    member, shard = self._found.pop()
                    nursery.start_soon(self._improve, host, taker, member, shard)
                taker.announce()
                wait_s = self._planner.next_due_s() - self._now_s()
                with trio.move_on_after(max(0.0, wait_s) if wait_s < NEVER else NEVER):
                    await self._changed.wait()

    async def _dial(self, host: Host, taker: Taker, attempt: _Attempt) -> None:
        """One dial, from plan to session or failure, and what comes after. Whatever goes wrong stays in here."""
        dial, error, blame, why = attempt.dial, "", True, ""
        try:
            with attempt.scope:
                why = await self._try(host, taker, attempt)
        except DialError as failure:
            error = str(failure)
        except (ShardBusy, CalledMeanwhile) as failure:
            error, blame = str(failure), False
        except Exception as failure:
            log.exception("dialing %s failed unexpectedly", dial.member.name)
            error = f"{type(failure).__name__}: {failure}"
        finally:
            del self._attempts[dial]
        self._over(taker, attempt, error, blame=blame)
        await self._improve(host, taker, dial.member, dial.shard, why)

    def _over(self, taker: Taker, attempt: _Attempt, error: str = "", *, blame: bool = True) -> None:
        if attempt.over:
            return
        attempt.over = True
        if error:
            self._count("dial_failures")
        if self._planner.dial_ended(attempt.dial, error, self._now_s(), blame=blame):
            log.info("no session with %s: %s", attempt.dial.member.name, error)
        taker.announce()
        self.replan()

    async def _try(self, host: Host, taker: Taker, attempt: _Attempt) -> str:
        """Why there is no direct session, if there is none."""
        dial = attempt.dial
        await self._slots.acquire_on_behalf_of(attempt)
        try:
            if not taker.keeps_up(dial.shard):
                raise ShardBusy(f"shard {dial.shard} does not keep up with its messages")
            self._count("dials")
            if dial.retry:
                self._count("retries")

            def deliver(detached: Detached) -> bool:
                wanted = attempt.over or self._planner.expects(dial)
                taken = self._deliver(detached, taker, dial.shard, wanted)
                self._over(taker, attempt)
                if self._slots_held(attempt):
                    self._slots.release_on_behalf_of(attempt)
                return taken

            return await self._by_all_ways(host, dial.member, BOTH, deliver)
        finally:
            if self._slots_held(attempt):
                self._slots.release_on_behalf_of(attempt)

    def _slots_held(self, attempt: _Attempt) -> bool:
        return attempt in self._slots.statistics().borrowers

    def _deliver(self, detached: Detached, taker: Taker, shard: int, wanted: bool) -> bool:
        try:
            taken = wanted and bool(taker.dialed(detached, shard))
        finally:
            detached.close()
        if taken:
            self._count("sessions_dialed")
        return taken

    async def _by_all_ways(
        self, host: Host, member: Member, mode: str, deliver: Callable[[Detached], bool]
    ) -> str:
        """Deliver what can be had: from an address of the peer, which has nat.meet_delay for it, and from a meeting
        beside. A direct session ends it; why there is none, if not. Raises DialError when there was nothing at all,
        CalledMeanwhile when the peer's call will bring a session."""
        settings = self._live.config
        errors: list[str] = []
        small = self._small(member.peer_id)
        got = called = False
        why = ""
        failed = trio.Event()

        def take(detached: Detached) -> bool:
            nonlocal got
            got = True
            taken = deliver(detached)
            if detached.session.path.kind != RELAYED:
                nursery.cancel_scope.cancel()
            return taken

        async def dial() -> None:
            begun_s = self._now_s()
            try:
                detached = await dial_any(
                    lambda address: host.dial(address, member.peer_id, small=small),
                    member.addresses,
                    settings.p2p.address_stagger,
                )
                self._measured("handshake", self._now_s() - begun_s)
                take(detached)
            except DialError as error:
                errors.append(str(error))
                failed.set()

        async def meet() -> None:
            nonlocal called, why
            if any(map(self._traversal.may_answer, member.addresses)):
                with trio.move_on_after(settings.nat.meet_delay):
                    await failed.wait()
            try:
                why = await self._traversal.meet(member, mode, take)
                if why:
                    errors.append(why)
            except CalledMeanwhile as error:
                called = True
                errors.append(str(error))
            except DialError as error:
                errors.append(str(error))

        async with trio.open_nursery() as nursery:
            if member.addresses:
                nursery.start_soon(dial)
            if self._traversal.can_meet(member.peer_id):
                nursery.start_soon(meet)
        if not got and not (why and mode == PUNCH):
            near = any(map(self._traversal.may_answer, member.addresses))
            if not near and not self._traversal.can_meet(member.peer_id):
                errors.append(NO_RELAY)
            raise (CalledMeanwhile if called else DialError)("; ".join(errors))
        return why

    async def _improve(self, host: Host, taker: Taker, member: Member, shard: int, why: str = "") -> None:
        """Behind a relayed session: try for a direct one until there is one, or no session any more. `why`: what came
        of the try that there was already."""
        key = member.peer_id, shard
        if key in self._improving or not taker.relayed(*key):
            return
        settings = self._live.config.nat
        state = self._improving[key] = Improving(int(bool(why)), why, 0.0)
        wait_s = settings.upgrade_interval
        try:
            while True:
                state.next_s = self._now_s() + wait_s
                elsewhere = self._elsewhere
                with trio.move_on_after(wait_s):
                    await elsewhere.wait()
                if not taker.relayed(*key):
                    return
                try:
                    state.why = await self._by_all_ways(
                        host, member, PUNCH, lambda detached: self._deliver(detached, taker, shard, True)
                    )
                except (DialError, CalledMeanwhile) as error:
                    state.why = str(error)
                state.tries += 1
                wait_s = settings.upgrade_interval if elsewhere.is_set() else wait_s * 2
                wait_s = min(wait_s, settings.upgrade_max_interval)
        except Exception:
            log.exception("a better way to %s failed unexpectedly", member.name)
        finally:
            del self._improving[key]


class Improving:
    """`tries` so far for a direct connection, `why` the last one came to nothing, and when the next one is due."""

    def __init__(self, tries: int, why: str, next_s: float) -> None:
        self.tries, self.why, self.next_s = tries, why, next_s
