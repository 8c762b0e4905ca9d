"""The node's network at work: everything that happens to the directory goes through here, to whoever has to know.

comes from                                       goes to
-----------------------------------------------  -----------------------------------------------------------
neighbours (`gossiping`)                         neighbours: what is new
who joins or renews here (`enrolling`)           disk (`saving`)
members not known yet (`introducing`)
our own renewal (`renewing`), presence           control: members that came, went, changed (`_registry`)
commands (`requests`), and time: memberships end supervisor: own addresses, networks to be routed
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence

import msgspec
import trio

from vpnd.adapter.addresses import FAMILIES
from vpnd.adapter.guests import BOTH, ENROL, INTRODUCE, Question
from vpnd.adapter.host import Host
from vpnd.api.messages import Message, OwnChanged, RoutesKnown
from vpnd.api.reports import NetworkReport, OwnAddresses
from vpnd.config import multiaddrs
from vpnd.control.common import Common
from vpnd.control.enrolling import EnrolmentDesk
from vpnd.control.founding import Founding
from vpnd.control.gossiping import GOSSIP, Gossiping
from vpnd.control.introducing import Introducing
from vpnd.control.renewing import Renewing
from vpnd.control.routes import Announced, announced
from vpnd.control.state import EARLY, EXPIRED, LOST, MEMBER, MILLISECONDS, REMOVED, OwnNetwork
from vpnd.discovery.registry import Member, PeerRegistry
from vpnd.membership import enrolment, introduction, roster
from vpnd.membership.gossip import Outcome
from vpnd.membership.network import Network
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Kind, Presence, Statement
from vpnd.membership.store import Store, StoreError
from vpnd.nat.paths import RelayAt
from vpnd.printable import many

#: The clock does not go that much faster or slower between two looks: it was set.
STEP_MS = 1000

#: Where a member of the registry is from.
SOURCE = "membership"

log = logging.getLogger(__name__)


class NetworkService:
    """Owner: control's trio loop; `enter` once, then `run` once.

    `host` must be running. `tell` sends to the supervisor; it is not used before `run`.
    """

    def __init__(
        self,
        own: OwnNetwork,
        common: Common,
        registry: PeerRegistry,
        host: Host,
        founding: Founding,
        *,
        tell: Callable[[Message], None],
    ) -> None:
        self.own = own
        self._registry, self._host, self._tell = registry, host, tell
        self._live, self._count, self._seldom = common.live, common.count, common.seldom
        self._now_ms = common.now_ms
        self._own_watchers: list[Callable[[OwnAddresses], None]] = []
        self._told_own = own.addresses(self._now_ms())
        self._told_routes = RoutesKnown(routes=())
        self._announced = Announced(owners={})
        #: by peer id and kind of address: multiaddr on the local network, when it was news
        self._seen: dict[tuple[str, str], tuple[str, int]] = {}
        self._state = own.state(self._now_ms())
        self._conflicts: tuple[str, ...] = ()
        self._set_by = ""  # what a step of the clock did to all others
        self._tick = trio.Event()
        self._founding = founding
        self._clock_ms = 0
        self._begun_ms = self._now_ms()
        self._twin = ""
        self.saver = Saver(
            own.store,
            own.directory.statements,
            self._live.config.membership.save_interval,
            self._live.config.retry.max_interval,
        )
        self._gossiping = Gossiping(own, common, act=self.act, not_admitted=self._not_admitted)
        self._desk = EnrolmentDesk(own, common, publish=self.publish)
        self._introducing = Introducing(own, common, act=self.act)
        self._relays: Callable[[], Sequence[RelayAt]] = tuple
        self._called_over: Callable[[], Sequence[RelayAt]] = tuple
        self._renewing = Renewing(
            own, common, publish=self.publish, learn=self.learn, relays=lambda: self._relays()
        )
        self._live.watch(lambda config: config.p2p.announce, self.say_where)

    # --- the life of it

    def enter(self) -> OwnAddresses:
        """Fill the registry with the members there are; what this node is among them."""
        if self._state != MEMBER:
            self._say_state()
        self._settle_routes()
        self._registry.update({member.peer_id: self._entry(member) for member in self._others()})
        return self._told_own

    def call_over(
        self, relays: Callable[[], Sequence[RelayAt]], called_over: Callable[[], Sequence[RelayAt]]
    ) -> None:
        """From now on authorities that cannot be dialed are called over `relays`, and others are told that this node is
        over `called_over`."""
        self._relays, self._called_over = relays, called_over

    def invites(self) -> bool:
        return self.own.authority is not None

    def takes_guests(self, peer_id: str) -> bool:
        """Whether that node, which is no member, may ask something here."""
        return self._desk.admits(peer_id)

    def watch_own(self, changed: Callable[[OwnAddresses], None]) -> None:
        """Call `changed` with what this node is, now and whenever it is something else."""
        changed(self._told_own)
        self._own_watchers.append(changed)

    async def run(self) -> None:
        """Serve, gossip, renew and save until cancelled."""
        host, desk, introducing = self._host, self._desk, self._introducing
        host.desk.open(
            Question(ENROL, desk.answer_untrusted, desk.admits, enrolment.MAX_REQUEST),
            Question(INTRODUCE, introducing.answer_untrusted, introducing.admits, introduction.MAX_REQUEST),
            Question(BOTH, introducing.answer_both_untrusted, introducing.admits, introduction.MAX_REQUEST),
        )
        host.introduce_by(functools.partial(introducing.introduce, host))
        host.serve(GOSSIP, self._gossiping.serve, math.inf)
        self._tell_routes()
        self.say_where()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.saver.run)
            nursery.start_soon(self._gossiping.run, host)
            nursery.start_soon(self._renewing.run, host)
            nursery.start_soon(self._keep_time)

    async def _keep_time(self) -> None:
        """Memberships end, directories are compared, and the clock is looked at."""
        self._clock_ms = self._now_ms() - round(trio.current_time() * MILLISECONDS)
        while True:
            self._tick = trio.Event()
            wait_s = (self.own.gossip.next_timer_ms() - self._now_ms()) / MILLISECONDS
            # Not for long at a stretch: it is the wall clock that counts, and that may be set.
            with trio.move_on_after(min(max(0.0, wait_s), self._live.config.membership.gossip_interval)):
                await self._tick.wait()
            now_ms = self._now_ms()
            step_ms = now_ms - round(trio.current_time() * MILLISECONDS) - self._clock_ms
            if abs(step_ms) > STEP_MS:
                self._clock_ms += step_ms
                self._clock_set(step_ms, now_ms)
            if now_ms >= self.own.gossip.next_timer_ms():
                self.act(self.own.gossip.tick(now_ms))
            self._sign_again(now_ms)
            await trio.lowlevel.checkpoint()

    def _clock_set(self, step_ms: int, now_ms: int) -> None:
        """All that was judged by the clock is judged anew."""
        log.warning("the clock was set by %+.0f s: all statements are judged again", step_ms / MILLISECONDS)
        self._seen.clear()
        beside = self._beside(now_ms - step_ms)
        judged = self.own.gossip.clock_set(now_ms)
        changes, judged.changes = judged.changes, roster.Changes()
        self.act(judged)
        # By what it signed while it was ahead an authority is no member, and would end all sessions: made good first
        self._sign_again(now_ms)
        self._changed(changes)
        if beside and not self._beside(now_ms):
            self._set_by = (
                f"the clock was set by {step_ms / MILLISECONDS:+.0f} s, which ended all other memberships"
            )
        self.say_where()
        self._renewing.begin_anew()
        self._introducing.begin_anew()
        self._gossiping.begin_anew()

    def _beside(self, now_ms: int) -> int:
        """How many members there are beside this node, at some time."""
        own_id = self.own.peer_id
        return sum(one.peer_id != own_id for one in self.own.directory.members(now_ms))

    def _sign_again(self, now_ms: int) -> None:
        """What this node signed as an authority while its clock was ahead, others refuse: make it good."""
        ahead = self.own.signed_ahead(now_ms)
        if not ahead:
            return
        try:
            if again := self.own.signed_again(ahead, now_ms):
                self.publish(again)
                log.warning(
                    "%s signed while the clock was ahead: signed again", many(len(again), "statement")
                )
            self.own.directory.give_up(ahead)
        except (MembershipRefused, StoreError) as error:
            self._seldom.warn(
                "signed ahead", f"what was signed while the clock was ahead is not signed again: {error}"
            )

    # --- what happens

    def publish(self, statements: Iterable[Statement]) -> int:
        """Make statements known that were signed here; how many neighbours hear of them now. Those of an authority are
        on disk before anybody does.

        Raises StoreError, and nothing is changed; MembershipRefused, when this node's own directory refuses one.
        """
        signed = list(statements)
        lasting = [statement for statement in signed if statement.kind is not Kind.PRESENCE]
        if lasting:
            self.saver.ahead(lasting)
        outcome = self.own.gossip.publish(signed, self._now_ms())
        refused = [one for one in lasting if not self.own.directory.knows(one.digest)]
        self.act(outcome)
        if refused:
            reason = next(iter(outcome.refused), "malformed")
            raise MembershipRefused(reason, f"it is not done: {reason.replace('_', ' ')}")
        return len(self._gossiping.neighbours())

    def learn(self, wires: Sequence[bytes]) -> None:
        """Take in statements that came as an answer."""
        self.act(self.own.gossip.learn(wires, self._now_ms()))

    def act(self, outcome: Outcome) -> None:
        """Do all that follows from something that happened to the directory."""
        for reason in outcome.refused:
            self._count(f"refused_{reason}")
        self._gossiping.send(outcome.send)
        for statement in outcome.accepted:
            if isinstance(statement.body, Presence) and statement.body.peer_id == self.own.peer_id:
                self._note_twin(statement.body)
        if outcome.accepted:
            removal = any(statement.kind in _AT_ONCE for statement in outcome.accepted)
            self.saver.changed(urgent=removal)
            self._tick.set()
        if outcome.changes:
            self._changed(outcome.changes)
            self._gossiping.wake()

    def _note_twin(self, said: Presence) -> None:
        """A presence of this node is new here: when this run did not sign it, its identity is on two machines."""
        if self.own.has_signed(said) or said.sequence_ms <= self._begun_ms:
            return
        here, there = ", ".join(self._host.listen_addresses()), ", ".join(said.addresses)
        warning = (
            f"another machine runs with this node's identity: it is at {there or 'no address'}, this one at {here}. "
            "Stop one, delete its state directory, and let it join again by a new token"
        )
        if warning != self._twin:
            self._twin = warning
            log.error("%s", warning)
            self.say_where()  # so that the other hears of this one; each says it once

    def seen(self, peer_id: str, multiaddr: str) -> None:
        """Somebody says that a member is at an address of the local network: dial that too.

        Anybody there can say it, so there is one such address of each IP version for a member, and not another one
        within discovery.mdns_interval.
        """
        key = peer_id, multiaddrs.parse(multiaddr).kind
        now_ms = self._now_ms()
        member = self.own.directory.find(peer_id, now_ms)
        if member is None or self._state != MEMBER or multiaddr in member.multiaddrs:
            return
        before, since_ms = self._seen.get(key, ("", 0))
        interval_ms = self._live.config.discovery.mdns_interval * MILLISECONDS
        if multiaddr == before or (before and now_ms < since_ms + interval_ms):
            return
        log.info("%s says on the local network that it is at %s", member.name or peer_id, multiaddr)
        self._seen[key] = (multiaddr, now_ms)
        self._registry.update({peer_id: self._entry(member)})

    def say_where(self) -> None:
        """Publish where this node can be dialed, if that is news."""
        relays = [relay.peer_id for relay in self._called_over()]
        statement = self.own.presence(self._host.listen_addresses(), self._now_ms(), relays)
        if statement is not None and self.own.is_member(self._now_ms()):
            self.publish([statement])

    def withhold(self, routes: tuple[str, ...]) -> None:
        """Say nothing of these networks behind this node, but of all others."""
        self.own.withheld = routes
        self.say_where()

    def network_changed(self) -> None:
        """The machine has other addresses or routes."""
        self.say_where()
        self._introducing.begin_anew()
        self._gossiping.begin_anew()

    async def leave(self) -> bool:
        """Forget the network; whether an authority knows that this node has left. Raises StoreError."""
        told = await self._renewing.leave(self._host)
        self.saver.forget()
        return told

    async def move(self, token: str) -> Network:
        """Join another network instead of this one, which nobody else is in. See Founding.move."""
        return await self._founding.move(self._host, token, self.own, self.saver.stop)

    async def farewell(self, peer_id: str) -> None:
        """Let a neighbour that is no member any more know why, before its connections are closed."""
        await self._gossiping.farewell(peer_id)

    def report(self) -> NetworkReport:
        report = self.own.report(self._now_ms(), len(self._gossiping.neighbours()))
        unsaved = (
            self.saver.problem and f"{self.saver.problem}; what changes now is forgotten at the next start"
        )
        warnings = (*report.warnings, *filter(None, (self._twin, unsaved, self._renewing.problem)))
        clock = "" if self._beside(self._now_ms()) else self._set_by
        return msgspec.structs.replace(report, warnings=warnings, clock=clock)

    # --- what follows

    def _changed(self, changes: roster.Changes) -> None:
        own_id, now_ms = self.own.peer_id, self._now_ms()
        self._note_own(now_ms)
        for what, old, new in changes.moved:
            names = [self.own.known_as(peer_id, now_ms) for peer_id in (new, old)]
            self._seldom.warn("moved", f"{what} belongs to {names[0]} now, and no more to {names[1]}")
        touched = [*changes.added, *changes.changed, *changes.removed]
        news: dict[str, Member | None] = {}
        if any(member.peer_id == own_id for member in touched):
            # Who is no member has no peers, and who is one again has all of them.
            news = {member.peer_id: None for member in self._registry.of_network()}
            self._settle_routes()
            self._tell_routes()
            news |= {member.peer_id: self._entry(member) for member in self._others()}
        elif self._state == LOST:
            self._renewing.begin_anew()  # there may be an authority among them
        elif self._state == MEMBER:
            affected = {member.peer_id for member in touched}
            if any(member.routes for member in touched) or affected & set(self._announced.owners.values()):
                before = self._announced
                self._settle_routes()
                self._tell_routes()
                affected |= _differing(before, self._announced)
            for peer_id in affected - {own_id}:
                member = self.own.directory.find(peer_id, now_ms)
                news[peer_id] = self._entry(member) if member is not None else None
        self._registry.update(news)
        self._note_conflicts(now_ms)

    def _note_own(self, now_ms: int) -> None:
        """Tell when this node is something else than before."""
        state = self.own.state(now_ms)
        if state != self._state:
            self._state = state
            self._say_state()
            if state == MEMBER:
                self.say_where()
        own = self.own.addresses(now_ms)
        if own != self._told_own:
            self._told_own = own
            log.info("this node is %s at %s now", own.label, ", ".join(own.addresses))
            for changed in self._own_watchers:
                changed(own)
            self._tell(OwnChanged(own=own))

    def _say_state(self) -> None:
        name = self.own.network.name
        if self._state == REMOVED:
            log.warning(
                "this node was removed from the network %s; it has no peers until it joins again by a new token",
                name,
            )
        elif self._state == EARLY:
            log.warning("the membership in the network %s begins in the future: is the clock right?", name)
        elif self._state == EXPIRED:
            log.warning("the membership in the network %s has ended and was not renewed", name)
        elif self._state == LOST:
            log.warning("the membership in the network %s is not among what was saved any more", name)
        else:
            log.info("this node is a member of the network %s again", name)

    def _note_conflicts(self, now_ms: int) -> None:
        conflicts = self.own.report(now_ms, 0).conflicts if self.own.directory.conflicts() else ()
        for line in conflicts:
            if line not in self._conflicts:
                log.warning("%s", line)
        self._conflicts = conflicts
        if any(self.own.peer_id in one.losers for one in self.own.directory.conflicts()):
            self._renewing.ask()

    def _others(self) -> tuple[roster.Member, ...]:
        """The other members; none while this node is none itself."""
        if self._state != MEMBER:
            return ()
        members = self.own.directory.members(self._now_ms())
        return tuple(member for member in members if member.peer_id != self.own.peer_id)

    def _settle_routes(self) -> None:
        settings = self._live.config.network
        before = self._announced.problems
        self._announced = announced(self._others(), self._told_own, settings)
        for problem in self._announced.problems:
            if problem not in before:
                log.warning("%s", problem)

    def _tell_routes(self) -> None:
        known = self._announced.known()
        if known != self._told_routes:
            self._told_routes = known
            self._tell(known)

    def _entry(self, member: roster.Member) -> Member:
        seen = [self._seen[key][0] for kind in FAMILIES if (key := (member.peer_id, kind)) in self._seen]
        return Member(
            peer_id=member.peer_id,
            name=member.name or member.peer_id,
            prefixes=self._announced.prefixes(member),
            addresses=tuple(dict.fromkeys((*member.multiaddrs, *seen))),
            source=SOURCE,
            relays=member.relays,
        )

    def _not_admitted(self) -> None:
        """A member does not know this node. When nobody does, it may have been removed."""
        if not self._gossiping.neighbours():
            self._renewing.ask()


_AT_ONCE = (Kind.REMOVAL, Kind.REVOKE)


def _differing(before: Announced, after: Announced) -> set[str]:
    """Peer ids that own other networks than before."""
    pairs = set(before.owners.items()) ^ set(after.owners.items())
    return {peer_id for _, peer_id in pairs}


class Saver:
    """Writes what `statements` gives into the store, at most once in `interval_s`; what could not be written, again
    after `retry_s`. Owner: control; `run` once.

    Removals are kept at once, and what this node signed as an authority before anybody hears of it: a member that its
    own authority has forgotten could not come back. Of everything else little is lost with the seconds before a crash:
    it comes again from the other members.

    `problem`: why what is known is not on disk; empty when it is.
    """

    def __init__(
        self, store: Store, statements: Callable[[], list[bytes]], interval_s: float, retry_s: float
    ) -> None:
        self._store = store
        self._statements = statements
        self._interval_s = interval_s
        self._retry_s = retry_s
        self.problem = ""
        self._dirty = trio.Event()
        self._urgent = trio.Event()
        self._off = False

    def changed(self, *, urgent: bool = False) -> None:
        """There is something to keep; `urgent`: do not wait for more."""
        self._dirty.set()
        if urgent:
            self._urgent.set()

    def ahead(self, signed: list[Statement]) -> None:
        """Keep everything, and what is to be known next, before returning. Raises StoreError; the file is as it was."""
        if not self._off:
            self._store.save_statements([*self._statements(), *(one.wire for one in signed)])
            self.changed()

    def stop(self) -> None:
        """From now on nothing is written: the files are of another network."""
        self._off = True

    def forget(self) -> None:
        """Leave the network: its files go, and nothing is written any more. Raises StoreError."""
        self._off = True
        self._store.forget()

    async def run(self) -> None:
        """Save until cancelled, and then what is left."""
        try:
            while True:
                await self._dirty.wait()
                with trio.move_on_after(self._interval_s):
                    await self._urgent.wait()
                self._dirty, self._urgent = trio.Event(), trio.Event()
                if not self._off:
                    # a thread, because the disk may take its time; it is waited for even when this is cancelled
                    await trio.to_thread.run_sync(self._save, self._statements())
                if self.problem:
                    self._dirty.set()
                    with trio.move_on_after(self._retry_s):
                        await self._urgent.wait()
        finally:
            if self._dirty.is_set() and not self._off:
                self._save(self._statements())

    def _save(self, wires: list[bytes]) -> None:
        try:
            self._store.save_statements(wires)
        except StoreError as error:
            if str(error) != self.problem:
                log.error("%s; trying again. Until then changes are lost if the node ends", error)
            self.problem = str(error)
        else:
            self.problem = ""
