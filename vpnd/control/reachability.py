"""Whether this node can be dialed from outside, and where.

    a port of the router    asked for beside everything else (`vpnd.adapter.router`), renewed at half its time, or as
                            soon as the router says that it has started, and given back at the end
    whether it works        asked of two members, which dial back (`vpnd.adapter.reach`): at that port, and at the port
                            this node listens on, which somebody may have forwarded by hand; again every
                            nat.reach_interval, and at once when the network or the port changes
    what the NAT is like    what the two see of one port of ours

What is announced is where both came through. Only where there is nobody to ask, the router's word has to do, and then
its address must be one of the Internet: one that is private is behind another NAT.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import trio

from vpnd.adapter.arrivals import Rate
from vpnd.adapter.dial import DialError
from vpnd.adapter.host import Host
from vpnd.adapter.reach import Observed
from vpnd.adapter.router import UPNP, NoPort, PortMap, Router, default_router, hear_announcements
from vpnd.api.reports import ReachReport
from vpnd.control.common import Common
from vpnd.control.traversal import Traversal
from vpnd.discovery.registry import Member, PeerRegistry
from vpnd.endpoint import Endpoint
from vpnd.metrics import CounterPage
from vpnd.nat import messages, paths
from vpnd.nat.paths import RelayAt

#: Members that have to agree, and how many are tried to get at so many.
ASKED, TRIED = 2, 6
YES, NO, UNKNOWN = "yes", "no", "unknown"

log = logging.getLogger(__name__)


class Witness(msgspec.Struct, frozen=True):
    """One member that was asked. `error`: why it gave no answer; else where it sees this node, and how far it is."""

    name: str
    address: str
    error: str = ""
    you: str = ""
    rtt_ms: float = 0.0


class Reachability:
    """Owner: control's loop; `run` once. `nonce`: see Router. `say_where`: publish where this node is, if that
    is news. `invites`: whether this node may invite others."""

    def __init__(
        self,
        common: Common,
        registry: PeerRegistry,
        host: Host,
        page: CounterPage,
        traversal: Traversal,
        *,
        nonce: bytes,
        say_where: Callable[[], None],
        invites: Callable[[], bool] = lambda: False,
    ) -> None:
        self._registry, self._host, self._page, self._traversal = registry, host, page, traversal
        self._live, self._dice, self._now_s = common.live, common.dice, common.now_s
        self._nonce, self._say_where, self._invites = nonce, say_where, invites
        self._questions = Rate(self._now_s)
        allows = self._questions.allows
        host.reaching.allows = lambda peer_id: allows(peer_id, self._live.config.nat.max_reach_questions)
        self._map: PortMap | None = None
        self._map_until_s = self._asked_s = 0.0
        self._router: Router | None = None
        self._no_port = ""
        self._reachable: bool | None = None
        self._places: tuple[Endpoint, ...] = ()
        self._told_relays: tuple[RelayAt, ...] = ()
        self._outside: tuple[str, ...] = ()
        self._asked: tuple[Witness, ...] = ()
        self._ask_router, self._ask_members = trio.Event(), trio.Event()
        self._looking = trio.Lock()
        traversal.subscribe(self._other_relays)
        self._live.watch(
            lambda config: (config.nat.map_ports, config.nat.map_lifetime), lambda: self._ask_router.set()
        )
        page.set("port_maps", 0)
        page.set("reachable", 0)

    async def run(self) -> None:
        """Until cancelled."""
        if not self._live.config.nat.enabled:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_port)
            nursery.start_soon(self._hear_router)
            nursery.start_soon(self._keep_asking)

    # --- what changes

    def network_changed(self) -> None:
        """Another router, perhaps, or none."""
        self._ask_router.set()
        self._ask_members.set()

    def members_changed(self) -> None:
        if self._reachable is None:
            self._ask_members.set()

    def _other_relays(self) -> None:
        self.members_changed()
        self._settle()

    # --- the router

    async def _keep_port(self) -> None:
        try:
            while True:
                self._ask_router = trio.Event()
                wait_s = await self._renew()
                with trio.move_on_after(wait_s):
                    await self._ask_router.wait()
        finally:
            with trio.CancelScope(shield=True):
                await self._give_back()

    async def _hear_router(self) -> None:
        def heard(ip: ipaddress.IPv4Address) -> None:
            # Anybody in the local network can say so: the router is asked once in a while, whoever says it how often.
            if (
                self._router is not None
                and ip == self._router.ip
                and self._asked_s + self._pause_s() <= self._now_s()
            ):
                log.debug("the router has started")
                self._ask_router.set()

        try:
            await hear_announcements(heard)
        except OSError as error:
            log.debug("what the router announces is not heard: %s", error.strerror)

    def _pause_s(self) -> float:
        return self._live.config.retry.initial_interval

    async def _renew(self) -> float:
        """Have a port of the router's; for how long to leave it alone."""
        settings, held = self._live.config.nat, self._map
        router = default_router(self._nonce) if settings.map_ports else None
        if router is None or not paths.is_private(router.client):
            await self._give_back()
            self._no_port = "there is no NAT in front of this machine" if router is not None else ""
            return math.inf
        if self._router is not None and (router.ip, router.client) != (self._router.ip, self._router.client):
            held = None
        ports = self._host.ports()
        if not ports:
            return settings.map_retry
        self._router, self._asked_s = router, self._now_s()
        try:
            got = await router.give(ports[0], round(settings.map_lifetime), held, settings.map_timeout)
        except NoPort as error:
            if str(error) != self._no_port:
                log.info("the router gives no port: %s", error)
            self._no_port = str(error)
            self._has(None)
            # One that is not renewed may be had anew: routers forget when they start.
            return settings.map_retry if held is None else self._pause_s()
        self._no_port = ""
        if held is None or got.outside != held.outside:
            log.info("the router gives port %s, by %s", got.outside, got.protocol)
        self._has(got)
        half_s = min(got.lifetime_s, settings.map_lifetime) / 2
        if got.protocol != UPNP:  # two datagrams: a router that forgot it without a word has it again
            half_s = min(half_s, settings.map_check)
        return max(self._live.config.retry.max_interval, half_s)

    def _has(self, got: PortMap | None) -> None:
        before, self._map = self._map, got
        self._map_until_s = self._now_s() + got.lifetime_s if got is not None else 0.0
        self._page.set("port_maps", int(got is not None))
        if (before and before.outside) != (got and got.outside):
            self._settle()
            self._ask_members.set()

    async def _give_back(self) -> None:
        if self._map is not None and self._router is not None:
            await self._router.take_back(self._map, self._live.config.nat.map_timeout)
            self._has(None)

    # --- members

    async def _keep_asking(self) -> None:
        while True:
            # What is new is seldom alone; and when a node has just started, its sessions come first.
            await trio.sleep(self._live.config.nat.reach_delay)
            self._ask_members = trio.Event()
            await self.look()
            with trio.move_on_after(self._live.config.nat.reach_interval):
                await self._ask_members.wait()

    async def look(self) -> None:
        """Ask two members now; what they say is what this knows then."""
        async with self._looking:
            ports = list(
                dict.fromkeys((*((self._map.outside.port,) if self._map else ()), *self._host.ports()))
            )
            asked: list[Witness] = []
            seen: list[Observed] = []
            came: dict[Endpoint, list[bool]] = {}
            for member in self._whom():
                if len(seen) >= ASKED:
                    break
                await self._question(member, ports, asked, seen, came)
            self._asked = tuple(asked)
            self._reachable = any(map(all, came.values())) if seen else None
            self._places = tuple(place for place, answers in came.items() if all(answers))
            self._outside = tuple(dict.fromkeys(str(each.you.ip) for each in seen))
            self._traversal.mapping = _kind(seen)
            self._settle()

    def _whom(self) -> list[Member]:
        """Members to ask, those first that see this node from the Internet, and in any order."""
        members = [member for member in self._registry.members() if member.addresses]
        self._dice.shuffle(members)
        members.sort(key=lambda member: all(map(paths.is_local, member.addresses)))
        return members[:TRIED]

    async def _question(
        self,
        member: Member,
        ports: Sequence[int],
        asked: list[Witness],
        seen: list[Observed],
        came: dict[Endpoint, list[bool]],
    ) -> None:
        """All about one member: where it sees one port of ours, and to which of `ports` it comes."""
        source = seen[0].local.port if seen else 0
        errors: list[str] = []
        for address in member.addresses:
            if not self._traversal.may_answer(address):
                continue
            try:
                first, *rest = ports
                observed = await self._host.where_seen(address, member.peer_id, first, source)
                came.setdefault(Endpoint(observed.you.ip, first), []).append(observed.reached)
                for port in rest:
                    again = await self._host.where_seen(address, member.peer_id, port)
                    came.setdefault(Endpoint(again.you.ip, port), []).append(again.reached)
            except DialError as error:
                errors.append(str(error))
                continue
            seen.append(observed)
            rtt_ms = observed.rtt_s * 1000
            asked.append(Witness(member.name, address, you=str(observed.you), rtt_ms=rtt_ms))
            return
        if errors:
            asked.append(Witness(member.name, member.addresses[0], "; ".join(errors)))

    def _settle(self) -> None:
        """Announce what is known."""
        places = [place for place in self._places if not paths.is_private(place.ip)]
        if self._reachable is None and self._map is not None and not paths.is_private(self._map.outside.ip):
            places.append(self._map.outside)
        self._page.set("reachable", int(bool(self._reachable)))
        self._traversal.keep_for_guests(self._reachable is False and self._invites())
        before = self._host.listen_addresses()
        self._host.reached_at(places)
        moved = self._host.listen_addresses() != before
        if moved:
            log.info("this node can be dialed at %s", ", ".join(self._host.listen_addresses()))
        if moved or self.called_over() != self._told_relays:
            self._told_relays = self.called_over()
            self._say_where()

    # --- who is called

    def called_over(self) -> tuple[RelayAt, ...]:
        """The relays of a node that is known to be one that cannot be dialed; until anything is known, of one whose
        addresses mean nothing elsewhere."""
        hidden = self._reachable is False
        if self._reachable is None:
            hidden = all(map(paths.is_local, self._host.listen_addresses()))
        return self._traversal.relays_at() if hidden else ()

    def relays_at(self) -> tuple[RelayAt, ...]:
        """Where a node that cannot dial this one may call it; none where it can."""
        return () if self._reachable else self._traversal.relays_at()

    def guests_changed(self) -> None:
        """Strangers have been invited, or may be from now on."""
        self._traversal.keep_for_guests(self._reachable is False and self._invites())
        self._traversal.guests_changed()

    # --- what is told

    def report(self) -> ReachReport:
        return ReachReport(
            reachable=UNKNOWN if self._reachable is None else YES if self._reachable else NO,
            mapping=self._traversal.mapping,
            outside=self._outside,
            port_map=f"{self._map.outside} by {self._map.protocol}" if self._map is not None else "",
            relays=tuple(member.name for member in self._traversal.relays()),
        )

    async def check(self) -> dict[str, Any]:
        """For `vpnd netcheck`: looked at now."""
        await self.look()
        places = [str(place) for place in self._places]
        return {
            **msgspec.to_builtins(self.report()),
            "reached_at": places,
            "map_s": max(0.0, self._map_until_s - self._now_s()) if self._map is not None else None,
            "no_port": self._no_port,
            "map_ports": self._live.config.nat.map_ports,
            "listen": list(self._host.listen_addresses()),
            "asked": msgspec.to_builtins(self._asked),
        }


def _kind(seen: Sequence[Observed]) -> str:
    """What the NAT makes of ports, from what members saw of one of ours."""
    if not seen:
        return messages.UNKNOWN
    if all(each.you == each.local for each in seen):
        return messages.NONE
    if all(each.you.port == each.local.port for each in seen):
        return messages.KEPT
    one, *others = (each for each in seen if each.local.port == seen[0].local.port)
    if not others:
        return messages.UNKNOWN
    return messages.MOVED if all(other.you == one.you for other in others) else messages.RANDOM
