"""Reaching members that cannot be dialed, and being reached: relays that call this node, and meetings there.

    relays     nat.relays members that this node can dial, and that say they relay, are kept a stream to; each such
               member is asked, in an order that all nodes have, so that two of them have a relay in common
    meeting    a leg to a relay both know; over it a relayed session at once, and beside that a direct connection is
               tried (`vpnd.adapter.punch`); what comes first is handed over, and what is better later
    called     as for a meeting, from the other end: the session comes as inbound ones do

Of two that call each other at once, the call of the smaller peer id stands, if a relay brings it to the other.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import math
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from vpnd.adapter.arrivals import Rate
from vpnd.adapter.birthday import Chances, guess, open_many
from vpnd.adapter.dial import DialError, Patience
from vpnd.adapter.framing import hear_untrusted, say
from vpnd.adapter.handoff import Detached
from vpnd.adapter.host import Host
from vpnd.adapter.meeting import Leg, MeetingRefused
from vpnd.adapter.punch import Use, punch
from vpnd.control.common import Common
from vpnd.control.relaying import GUESTS, local_networks, may_answer
from vpnd.discovery.registry import Member, PeerRegistry
from vpnd.endpoint import Endpoint, of_socket_address
from vpnd.endpoint import parse as parse_endpoint
from vpnd.errors import RemoteProtocolError, VpndError
from vpnd.nat import messages, paths
from vpnd.nat.messages import ASK, BOTH, NAT, TOKEN_BYTES, Call, Gone, Hello, Meet, Welcome
from vpnd.nat.paths import Path, RelayAt

#: No peer's id: whether there is anybody at all.
NOBODY = ""

log = logging.getLogger(__name__)

#: Gets a session, which it closes; False when it is not wanted.
Deliver = Callable[[Detached], bool]


class CalledMeanwhile(VpndError):
    """The peer calls this node at the same moment, and its call stands: a session comes that way."""


class NoRelay(DialError):
    """No relay answered at which a member could be met."""


class _Relay:
    """A relay that may call this node. `you`: where it sees this node."""

    def __init__(self, member: Member, stream: Any, you: Endpoint) -> None:
        self.member, self.stream, self.you = member, stream, you


class _Calling:
    """A meeting of our own that no relay has answered yet."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self._over, self._answered = trio.Event(), False

    def end(self, *, answered: bool) -> None:
        self._answered = answered
        self._over.set()

    async def comes_about(self) -> bool:
        """Wait until it is known."""
        await self._over.wait()
        return self._answered


class Traversal:
    """Owner: control's loop; `run` once, with what it starts in `nursery`. `without()`: the networks that lead into the
    VPN."""

    def __init__(
        self,
        own_id: str,
        common: Common,
        registry: PeerRegistry,
        host: Host,
        nursery: trio.Nursery,
        *,
        without: Callable[[], Sequence[str]],
        takes_guests: Callable[[str], bool] = lambda peer_id: False,
    ) -> None:
        self._own_id, self._registry, self._without = own_id, registry, without
        self._takes_guests, self._for_guests = takes_guests, False
        self._host, self._nursery = host, nursery
        self._live, self._count, self._now_s = common.live, common.count, common.now_s
        self._subscribers: list[Callable[[], None]] = []
        self._on_chance: list[Callable[[], None]] = []
        self._relays: dict[str, _Relay] = {}
        self._asking: set[str] = set()
        self._rests: dict[str, float] = {}
        self._calls = Rate(self._now_s)
        self._mapping = messages.UNKNOWN
        self._by_chance = False  # one such try at a time
        self._calling: dict[str, set[_Calling]] = {}  # by whom they are with
        self._poor: dict[str, float] = {}  # relays that gave nothing, and until when they are asked last
        self._changed = trio.Event()

    def relays(self) -> tuple[Member, ...]:
        """Those that may call this node."""
        return tuple(relay.member for relay in self._relays.values())

    def relays_at(self) -> tuple[RelayAt, ...]:
        """The same, each at the address that is most likely to be its own for everybody."""
        return tuple(
            RelayAt(min(member.addresses, key=paths.is_local), member.peer_id) for member in self.relays()
        )

    def keep_for_guests(self, wanted: bool) -> None:
        """Whether to have relays only so that strangers can be invited."""
        if wanted != self._for_guests:
            self._for_guests = wanted
            self._changed.set()

    def guests_changed(self) -> None:
        """Strangers have been invited: the relays of this node let them call it."""
        for relay in self._relays.values():
            self._nursery.start_soon(self._tell, relay.stream, relay.member, self._hello())

    async def _tell(self, stream: Any, relay: Member, message: messages.AnyMessage) -> None:
        try:
            await say(stream, message)
        except Exception as error:  # of libp2p, in great variety: the stream is over, and its reader knows
            log.debug("the relay %s is gone: %r", relay.name, error)

    def _hello(self) -> Hello:
        return Hello(self.mapping, self._takes_guests(NOBODY))

    def subscribe(self, told: Callable[[], None]) -> None:
        """Call `told` whenever there is one more to meet others at."""
        self._subscribers.append(told)

    @property
    def mapping(self) -> str:
        """What the NAT in front of this node makes of ports, as far as it is known; a word of `messages`."""
        return self._mapping

    @mapping.setter
    def mapping(self, mapping: str) -> None:
        news, self._mapping = mapping not in (self._mapping, messages.UNKNOWN), mapping
        if news and self._live.config.nat.birthday:
            for told in self._on_chance:
                told()

    def on_chance(self, told: Callable[[], None]) -> None:
        """Call `told` whenever direct connections can be had that only chance brings about."""
        self._on_chance.append(told)

    def members_changed(self) -> None:
        self._changed.set()

    def network_changed(self) -> None:
        """Whoever was no relay may be one from here."""
        self._rests.clear()
        self._poor.clear()
        self._changed.set()

    # --- relays

    async def run(self) -> None:
        while True:
            self._changed = trio.Event()
            chosen, again_s = self._choose()
            for member in chosen:
                self._asking.add(member.peer_id)
                self._nursery.start_soon(self._ask, member)
            with trio.move_on_at(again_s):
                await self._changed.wait()

    def _choose(self) -> tuple[list[Member], float]:
        """Whom to ask now, and when to look again."""
        settings, now_s = self._live.config.nat, self._now_s()
        members = self._registry.members()
        lacking = settings.relays - len(self._relays) - len(self._asking)
        # A relay for two that are this node and the relay itself is none, but for strangers that are invited.
        if not settings.enabled or len(members) < 2 - self._for_guests or lacking <= 0:
            return [], math.inf
        known = {member.peer_id for member in members}
        self._rests = {peer_id: until_s for peer_id, until_s in self._rests.items() if peer_id in known}
        asked = self._relays.keys() | self._asking
        others = [member for member in members if member.addresses and member.peer_id not in asked]
        ready = [member for member in others if self._rests.get(member.peer_id, 0.0) <= now_s]
        again_s = min((until_s for until_s in self._rests.values() if until_s > now_s), default=math.inf)
        return sorted(ready, key=self._order)[:lacking], again_s

    def _order(self, member: Member) -> tuple[bool, bytes]:
        """The same at every node, but for those that can hardly be dialed from here, which come last."""
        near = any(map(self.may_answer, member.addresses))
        return not near, hashlib.sha256(member.peer_id.encode()).digest()

    async def _ask(self, member: Member) -> None:
        """One relay, from the question to its end. Whatever goes wrong stays in here."""
        peer_id, rest_s = member.peer_id, self._live.config.nat.relay_retry
        try:
            stream = await self._host.open_stream(member.addresses, peer_id, NAT)
            with trio.fail_after(self._live.config.p2p.dial_timeout):
                await say(stream, self._hello())
                welcome = await hear_untrusted(stream, Welcome)
            if welcome.refused:
                log.debug("%s is no relay for this node: %s", member.name, welcome.refused)
                await stream.close()
                return
            self._relays[peer_id] = _Relay(member, stream, parse_endpoint(welcome.you))
            self._asking.discard(peer_id)
            log.info("%s is a relay of this node, which it sees at %s", member.name, welcome.you)
            rest_s = self._live.config.retry.initial_interval
            self._changed.set()
            for told in self._subscribers:
                told()
            await self._listen(stream, member)
        except (DialError, RemoteProtocolError, trio.TooSlowError) as error:
            log.debug("%s is no relay for this node: %s", member.name, error)
        except Exception as error:  # of libp2p, in great variety: the stream is over
            log.debug("the relay %s is gone: %r", member.name, error)
        finally:
            self._relays.pop(peer_id, None)
            self._asking.discard(peer_id)
            self._rests[peer_id] = self._now_s() + rest_s
            self._changed.set()

    async def _listen(self, stream: Any, member: Member) -> None:
        while True:
            call = await hear_untrusted(stream, Call)
            refused = self._follows(call)
            if refused:
                self._count("calls_refused")
                await say(stream, Gone(call.token, refused))
            else:
                self._nursery.start_soon(self._answer, stream, member, call)

    def _follows(self, call: Call) -> str:
        """Empty, or why the call is not followed."""
        caller = call.caller
        if self._registry.find(caller) is None:
            if call.mode != ASK or not self._takes_guests(caller):
                return messages.NOT_MEMBER
            caller = GUESTS
        if not self._calls.allows(caller, self._live.config.nat.max_calls):
            return messages.TOO_OFTEN
        return ""

    async def _answer(self, stream: Any, relay: Member, call: Call) -> None:
        """Follow a call, or say that a call of ours stands. One that cannot be brought to the caller does not: a member
        that has just started calls before it can be called."""
        for calling in tuple(self._calling.get(call.caller, ())) if call.mode == BOTH else ():
            if self._own_id > call.caller:
                calling.scope.cancel()
                continue
            stands = False
            with trio.move_on_after(self._live.config.nat.relay_stagger):
                stands = await calling.comes_about()
            if stands:
                self._count("calls_refused")
                await self._tell(stream, relay, Gone(call.token, messages.ABSENT))
                return
        await self._come(relay, call)

    # --- meetings

    def can_meet(self, peer_id: str) -> bool:
        """Whether there is a relay to meet at."""
        member = self._registry.find(peer_id)
        return any(relay != peer_id for relay in self._relays) or bool(member and self._relays_of(member))

    def dials_at_once(self, member: Member) -> bool:
        """Whether there is no point in waiting for the member to dial this node: a relay is the only way there may be,
        or all addresses of this node mean nothing where the member is."""
        answering = [*filter(self.may_answer, member.addresses)]
        if not answering:
            return self.can_meet(member.peer_id)
        return not any(map(paths.is_local, answering)) and all(
            map(paths.is_local, self._host.listen_addresses())
        )

    def _relays_of(self, member: Member) -> list[Member]:
        """Members that can call that one, by its own word."""
        known = map(self._registry.find, member.relays)
        return [one for one in known if one is not None and one.addresses and one.peer_id != member.peer_id]

    def may_answer(self, address: str) -> bool:
        return may_answer(address, self._host.listen_addresses())

    async def meet(self, member: Member, mode: str, deliver: Deliver) -> str:
        """Meet a member at one relay after another until one lets us, and deliver what comes of it: with BOTH a relayed
        session and then, if it can be had, a direct one; with PUNCH only that. Returns when there is nothing more to
        come, and why there is no direct one, if not. Raises DialError when no relay lets us, NoRelay when none answers,
        CalledMeanwhile when the member's own call stands."""
        tried, why = set[str](), ""
        while True:
            got = False

            def take(detached: Detached) -> bool:
                nonlocal got
                got = True
                return deliver(detached)

            try:
                leg, relay_id = await self._leg(member, mode, tried)
            except NoRelay:
                if tried:
                    return why
                raise
            self._count("meetings")
            promised = leg.met.relayed
            why = await self._conclude(leg, relay_id, member.peer_id, take)
            if got or not promised:
                return why
            self._gave_nothing(relay_id)
            tried.add(relay_id)

    async def _leg(self, member: Member, mode: str, tried: set[str]) -> tuple[Leg, str]:
        """A leg at one of the relays that were not `tried`."""
        calling, found = _Calling(), None
        under_way = self._calling.setdefault(member.peer_id, set())
        under_way.add(calling)
        try:
            with calling.scope:
                found = await self._first_leg(member, mode, tried)
        finally:
            calling.end(answered=found is not None)
            under_way.discard(calling)
            if not under_way:
                self._calling.pop(member.peer_id, None)
        if found is None:
            raise CalledMeanwhile(f"{member.name} calls at the same moment")
        return found

    async def _first_leg(self, member: Member, mode: str, tried: set[str]) -> tuple[Leg, str]:
        """Relays are asked one after the other, the next one beside those that have not answered within
        nat.relay_stagger; last those that have not answered lately."""
        own, theirs = self.relays(), self._relays_of(member)
        both = [relay for relay in own if relay.peer_id in member.relays]
        relays = {each.peer_id: each for each in (*both, *own, *theirs)}
        without = (*tried, member.peer_id)
        relays = {peer_id: each for peer_id, each in relays.items() if peer_id not in without}
        errors: list[str] = []
        found: list[tuple[Leg, str]] = []
        answered = False

        async def ask(relay: Member, over: trio.Event) -> None:
            nonlocal answered
            try:
                request = self._request(secrets.token_bytes(TOKEN_BYTES), member.peer_id, mode)
                found.append((await self._at(relay, request), relay.peer_id))
                self._poor.pop(relay.peer_id, None)
                nursery.cancel_scope.cancel()
            except DialError as error:
                if isinstance(error, MeetingRefused):
                    answered = True
                    self._count("meetings_refused")
                else:
                    self._gave_nothing(relay.peer_id)
                errors.append(f"{relay.name}: {error}")
            finally:
                over.set()

        try:
            async with trio.open_nursery() as nursery:
                for relay in sorted(relays.values(), key=self._gives_nothing):
                    over = trio.Event()
                    nursery.start_soon(ask, relay, over)
                    with trio.move_on_after(self._live.config.nat.relay_stagger) as patience:
                        await over.wait()
                    if patience.cancelled_caught:
                        self._gave_nothing(relay.peer_id)
            unused = found[1:]
        except BaseException:
            unused = found
            raise
        finally:
            for leg, _ in unused:
                leg.close()
        if found:
            return found[0]
        raise (DialError if answered else NoRelay)("; ".join(errors) or "no relay is known")

    def _gave_nothing(self, peer_id: str) -> None:
        """A relay did not answer, or nothing came through it."""
        now_s = self._now_s()
        self._poor = {each: until_s for each, until_s in self._poor.items() if until_s > now_s}
        self._poor[peer_id] = now_s + self._live.config.nat.relay_retry

    def _gives_nothing(self, relay: Member) -> bool:
        return self._poor.get(relay.peer_id, 0.0) > self._now_s()

    def _request(self, token: bytes, peer_id: str, mode: str) -> Meet:
        birthday = self._live.config.nat.birthday
        return Meet(token, peer_id, mode, mapping=self.mapping, birthday=birthday)

    async def _at(self, relay: Member, request: Meet) -> Leg:
        """A leg to a relay, at the first of its addresses that answers. Raises DialError."""
        p2p, nat = self._live.config.p2p, self._live.config.nat
        patience = Patience(p2p.dial_timeout + nat.meet_timeout, p2p.connect_timeout)
        errors: list[str] = []
        for address in relay.addresses:
            try:
                return await self._host.ends.meet(address, relay.peer_id, request, patience)
            except MeetingRefused:
                raise
            except DialError as error:
                errors.append(str(error))
        raise DialError("; ".join(errors) or "it has no address")

    async def _come(self, relay: Member, call: Call) -> None:
        """Follow a call. Whatever goes wrong stays in here."""
        try:
            leg = await self._at(relay, self._request(call.token, call.caller, call.mode))
            self._count("calls_followed")
            if call.mode == ASK:
                if leg.met.relayed:
                    await self._host.ends.respond(*leg.take(relay.peer_id), call.caller)
                leg.close()
                return
            await self._conclude(leg, relay.peer_id, call.caller, None)
        except DialError as error:
            log.debug("no meeting with %s at %s: %s", call.caller, relay.name, error)
        except Exception:
            log.exception("a meeting with %s failed unexpectedly", call.caller)

    async def _conclude(self, leg: Leg, relay_id: str, peer_id: str, deliver: Deliver | None) -> str:
        """Make what sessions can be made after Met; why there is no direct one, if not. `deliver`: of who called; the
        other end's are inbound ones."""
        settings = self._live.config.nat
        relaying, direct = trio.CancelScope(), False

        def first() -> bool:
            """A direct session is there: whether it is the first."""
            nonlocal direct
            if direct:
                return False
            self._count("punches_won")
            direct = True
            return True

        async def relayed() -> None:
            sock, path = leg.take(relay_id)
            if deliver is None:
                await self._host.ends.respond(sock, path, peer_id)
                return
            with relaying:
                detached = await self._initiated(sock, path, peer_id)
                # Cancelling does not reach what is there already.
                if detached is not None and not direct:
                    deliver(detached)
                elif detached is not None:
                    detached.close()

        async def use(sock: socket.socket) -> bool:
            address = of_socket_address(sock.getpeername())
            kind = paths.DIRECT if paths.is_private(address.ip) else paths.PUNCHED
            path = Path(kind=kind, address=str(address))
            if deliver is None:
                won = await self._host.ends.respond(sock, path, peer_id)
                if won:
                    first()
                return won
            detached = await self._initiated(sock, path, peer_id)
            if detached is None:
                return False
            relaying.cancel()  # if it is not there yet, it need not come any more
            if first():
                deliver(detached)
            else:  # two connections came about
                detached.close()
            return True

        you, peer = parse_endpoint(leg.met.you), parse_endpoint(leg.met.peer)
        candidates = [parse_endpoint(text) for text in leg.met.candidates]
        without = [ipaddress.ip_network(text, strict=False) for text in self._without()]
        targets = paths.to_punch(you, peer, candidates, local_networks(), without)
        won = False
        try:
            async with trio.open_nursery() as nursery:
                if leg.met.relayed:
                    nursery.start_soon(relayed)
                self._count("punches")
                with trio.move_on_after(settings.punch_timeout):
                    won = await punch(
                        leg.places,
                        targets,
                        settings.punch_interval,
                        use,
                        self._live.config.session.small_segment,
                        self._chance(leg, peer),
                    )
        finally:
            leg.close()
        return "" if won else self._why(leg.met.mapping)

    def _chance(self, leg: Leg, peer: Endpoint) -> Callable[[Use], Awaitable[None]] | None:
        """What to try beside, where one NAT takes another port for each destination and the other one does not."""
        settings, theirs = self._live.config.nat, leg.met.mapping
        here = next((each for each in leg.places if each.family == peer.family), None)
        symmetric = [each == messages.RANDOM for each in (self.mapping, theirs)]
        if not (settings.birthday and leg.met.birthday) or here is None or self._by_chance:
            return None
        if sum(symmetric) != 1 or messages.UNKNOWN in (self.mapping, theirs):
            return None
        chances = Chances(settings.birthday_ports, settings.birthday_rate)
        segment = self._live.config.session.small_segment

        async def by_chance(use: Use) -> None:
            self._by_chance = True
            try:
                if symmetric[0]:
                    await open_many(peer, here.ip, chances, segment, use)
                else:
                    await guess(peer.ip, here, chances, segment, use)
            finally:
                self._by_chance = False

        return by_chance

    def _why(self, theirs: str) -> str:
        """What kept two from a direct connection, as far as it is known."""
        match self.mapping == messages.RANDOM, theirs == messages.RANDOM:
            case True, True:
                return "both NATs are symmetric"
            case True, False:
                return "the NAT of this node is symmetric"
            case False, True:
                return "the peer's NAT is symmetric"
        return f"nothing came through within {self._live.config.nat.punch_timeout:g} s"

    async def _initiated(self, sock: socket.socket, path: Path, peer_id: str) -> Detached | None:
        try:
            return await self._host.ends.initiate(sock, path, peer_id, self._live.config.p2p.dial_timeout)
        except Exception as error:  # of libp2p, in great variety: this connection came to nothing
            log.debug("no %s session with %s: %r", path.kind, peer_id, error)
            return None
