"""Carrying out what the planner plans: one task for each dial, until there is a session, an error or no interest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import trio

from vpnd.adapter.dial import DialError, dial_any
from vpnd.adapter.handoff import Detached
from vpnd.adapter.host import Host
from vpnd.config.live import Live
from vpnd.control.book import Held
from vpnd.control.dialstate import NEVER, Dial
from vpnd.control.planner import Planner
from vpnd.control.traversal import CalledMeanwhile, NoRelay, Traversal
from vpnd.discovery.registry import Member
from vpnd.errors import VpndError
from vpnd.nat import paths
from vpnd.nat.messages import BOTH, PUNCH
from vpnd.nat.paths import AROUND, PUNCHED, RELAYED

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

    def best(self, peer_id: str, shard: int) -> Held | None:
        """The session by which the shard reaches that peer best."""
        ...

    def announce(self) -> None:
        """The planner may have changed a circuit."""
        ...


class Better(NamedTuple):
    """How a session with a member could be replaced by a better one: dialed at `addresses`, and where `mode` is not
    empty, by a meeting. `ours`: this node dialed the session there is."""

    member: Member
    addresses: Sequence[str]
    mode: str
    ours: bool


class _Attempt:
    """A dial under way. `over`: the planner has been told how it ended."""

    def __init__(self, dial: Dial) -> None:
        self.dial, self.scope = dial, trio.CancelScope()
        self.over = False


class Dialer:
    """Runs the dials that are due. Owner: control's loop.

    A dial is over with the first session it gets. It goes on, beside that, as long as a better one may come: behind a
    relayed session a direct one. Later that is tried again, by who dialed, every nat.upgrade_interval, doubling. So are
    addresses that are better than the way there is, by both ends and as soon as they are known.

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
        self._improving: dict[tuple[str, int], Improving] = {}
        self._found: list[tuple[str, int, float | None]] = []
        self._tried_s: dict[tuple[str, int], float] = {}  # when a better session was tried for last

    def _other_limit(self) -> None:
        self._slots.total_tokens = self._live.config.p2p.max_dials

    def replan(self) -> None:
        """Look at the plan again: it may be another one."""
        self._changed.set()

    def begin_anew(self, *, both: bool = False) -> None:
        """What could not be had directly may be had now: it is tried at once, by who dialed. `both`: this node is the
        one that knows, so it tries also where the peer dialed."""
        for state in self._improving.values():
            if state.waits or both:
                state.wake(self._now_s())

    def found(self, peer_id: str, shard: int, *, news: bool = False) -> None:
        """The shard has a session with the peer that was not dialed here, or (`news`) the peer has other addresses:
        they are tried at once, if that has not been done within retry.max_interval."""
        key, again_s = (peer_id, shard), None
        if news:
            rest_s = self._live.config.retry.max_interval
            again_s = max(self._now_s(), self._tried_s.get(key, -NEVER) + rest_s)
        if (state := self._improving.get(key)) is not None:
            state.wake(again_s)
        else:
            self._found.append((*key, again_s))
            self.replan()

    def improving(self, peer_id: str, shard: int) -> Improving | None:
        """What is being done about a session of the shard with that peer that could be a better one."""
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
                    peer_id, shard, again_s = self._found.pop()
                    nursery.start_soon(self._improve, host, taker, peer_id, shard, "", again_s)
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
        await self._improve(host, taker, dial.member.peer_id, dial.shard, why)

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

            by_all = Better(dial.member, dial.member.addresses, BOTH, ours=True)
            return await self._by_all_ways(host, by_all, deliver, self._now_s())
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
        self, host: Host, better: Better, deliver: Callable[[Detached], bool], since_s: float
    ) -> str:
        """Deliver what can be had: from an address of the peer, which has nat.meet_delay for it, and from a meeting
        beside. A direct session ends it; why there is none, if not. `since_s`: when the first try for one began. Raises
        DialError when there was nothing at all, CalledMeanwhile when the peer's call will bring a session."""
        settings, (member, addresses, mode, _) = self._live.config, better
        errors: list[str] = []
        small = self._small(member.peer_id)
        got = called = unmet = False
        why = ""
        failed = trio.Event()

        def take(detached: Detached) -> bool:
            nonlocal got
            kind = detached.session.path.kind
            if kind == PUNCHED or (kind != RELAYED and (got or mode == PUNCH)):
                self._measured("to_direct", self._now_s() - since_s)
            got = True
            taken = deliver(detached)
            if kind != RELAYED:
                nursery.cancel_scope.cancel()
            return taken

        async def dial() -> None:
            begun_s = self._now_s()
            try:
                detached = await dial_any(
                    lambda address: host.dial(address, member.peer_id, small=small),
                    addresses,
                    settings.p2p.address_stagger,
                )
                self._measured("handshake", self._now_s() - begun_s)
                take(detached)
            except DialError as error:
                errors.append(str(error))
                failed.set()

        async def meet() -> None:
            nonlocal called, unmet, why
            if any(map(self._traversal.may_answer, addresses)):
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
                unmet = isinstance(error, NoRelay)
                errors.append(str(error))

        async with trio.open_nursery() as nursery:
            if addresses:
                nursery.start_soon(dial)
            if mode and self._traversal.can_meet(member.peer_id):
                nursery.start_soon(meet)
        if not got and not (why and mode == PUNCH):
            near = any(map(self._traversal.may_answer, member.addresses))
            if not near and (unmet or not self._traversal.can_meet(member.peer_id)):
                errors.append(NO_RELAY)
            raise (CalledMeanwhile if called else DialError)("; ".join(errors))
        return why

    def _better(self, taker: Taker, peer_id: str, shard: int) -> Better | None:
        """How the shard could have a better session with the peer than it has; None where it has none, or the best."""
        held, member = taker.best(peer_id, shard), self._planner.member(peer_id)
        if held is None or member is None:
            return None
        if held.path.rank == AROUND:
            return Better(member, member.addresses, PUNCH, held.initiator)
        may = [each for each in member.addresses if paths.rank_at(each) < held.path.rank]
        addresses = [each for each in may if self._traversal.may_answer(each)]
        return Better(member, addresses, "", held.initiator) if addresses else None

    def _note_try(self, key: tuple[str, int]) -> None:
        now_s = self._now_s()
        since_s = now_s - self._live.config.retry.max_interval
        self._tried_s = {each: at_s for each, at_s in self._tried_s.items() if at_s > since_s}
        self._tried_s[key] = now_s

    async def _improve(
        self, host: Host, taker: Taker, peer_id: str, shard: int, why: str = "", again_s: float | None = None
    ) -> None:
        """Try for a better session until there is no better one to be had, or none any more. `why`: what came of the
        try that there was already; `again_s`: when there is reason for the next."""
        key = peer_id, shard
        if (other := self._improving.get(key)) is not None:
            other.wake(again_s)
            return
        config, wait_s = self._live.config, self._live.config.nat.upgrade_interval
        state = self._improving[key] = Improving(int(bool(why)), why, self._now_s(), wait_s)
        state.wake(again_s)
        try:
            while (better := self._better(taker, *key)) is not None:
                state.waits = better.ours or not better.mode
                left_s = max(0.0, state.next_s - self._now_s())
                with trio.move_on_after(left_s if state.waits or state.news else NEVER):
                    await state.woken.wait()
                    state.woken = trio.Event()
                    continue
                news, state.news = state.news, False
                self._note_try(key)
                if not better.ours:  # who dialed has its turn first
                    await trio.sleep(config.p2p.dial_stagger)
                if (better := self._better(taker, *key)) is None:
                    return
                try:
                    state.why = await self._by_all_ways(
                        host,
                        better,
                        lambda detached: self._deliver(detached, taker, shard, True),
                        state.since_s,
                    )
                except (DialError, CalledMeanwhile) as error:
                    state.why = str(error)
                state.tries += 1
                wait_s = config.nat.upgrade_interval if news else wait_s * 2
                wait_s = min(wait_s, config.nat.upgrade_max_interval)
                state.next_s = self._now_s() + wait_s
        except Exception:
            log.exception("a better way to %s failed unexpectedly", peer_id)
        finally:
            del self._improving[key]


class Improving:
    """`tries` so far for a better session, `why` the last one came to nothing, and when the next one is due; `since_s`:
    when the first one was. `news`: there is reason for that one. `waits`: it comes without one, too."""

    def __init__(self, tries: int, why: str, since_s: float, wait_s: float) -> None:
        self.tries, self.why, self.since_s, self.next_s = tries, why, since_s, since_s + wait_s
        self.news, self.waits, self.woken = False, True, trio.Event()

    def wake(self, again_s: float | None) -> None:
        """What there is has changed; `again_s`: when that is reason for a try."""
        if again_s is not None:
            self.news, self.next_s = True, min(self.next_s, again_s)
        self.woken.set()
