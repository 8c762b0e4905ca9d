"""Whether a node can be dialed: the router's port, what members say, and what follows from both."""

from __future__ import annotations

import ipaddress
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import trio
import trio.testing
from control_nodes import Node, running

from vpnd.adapter import router as router_module
from vpnd.adapter.dial import DialError
from vpnd.adapter.reach import Observed
from vpnd.adapter.router import NAT_PMP, PCP, NoPort, PortMap, Router
from vpnd.config.live import Live
from vpnd.config.schema import Config, Nat
from vpnd.control import reachability
from vpnd.control.common import Common
from vpnd.control.reachability import NO, UNKNOWN, YES, Reachability
from vpnd.discovery.registry import Member
from vpnd.endpoint import Endpoint, parse
from vpnd.logs import Seldom
from vpnd.nat import messages, portmap
from vpnd.nat.paths import RelayAt

LOOPBACK = ipaddress.IPv4Address("127.0.0.1")
INSIDE = ipaddress.IPv4Address("10.1.0.2")
OUTSIDE = "203.0.113.1"


# --- two members, really


def test_a_member_is_dialed_back_where_it_is_seen_and_nowhere_else() -> None:
    async def main() -> None:
        a, b = Node(), Node()
        b.host.reaching.allows = lambda peer_id: peer_id == a.peer_id
        async with running(a, b):
            seen = await a.host.where_seen(b.address, b.peer_id, a.port)
            assert seen.reached and seen.you == seen.local and seen.rtt_s > 0
            closed = await a.host.where_seen(b.address, b.peer_id, 9, seen.local.port)
            assert not closed.reached and closed.local.port == seen.local.port, (
                "from the port that was asked for"
            )
            only = await a.host.where_seen(b.address, b.peer_id, 0)
            assert not only.reached and only.you.port == only.local.port
            # b's port is open, but who listens there is not a
            assert not (await a.host.where_seen(b.address, b.peer_id, b.port)).reached
            b.host.reaching.allows = lambda peer_id: False
            assert not (await a.host.where_seen(b.address, b.peer_id, a.port)).reached

    trio.run(main)


# --- a router, really


class Gateway:
    """Answers on the router's port of loopback: to NAT-PMP, and to PCP if `pcp`."""

    def __init__(self, *, pcp: bool) -> None:
        self._pcp = pcp
        self.heard: list[bytes] = []

    async def run(self, *, task_status: Any) -> None:
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
            await sock.bind((str(LOOPBACK), portmap.ROUTER_PORT))
            task_status.started()
            while True:
                data, who = await sock.recvfrom(portmap.MAX_DATAGRAM)
                self.heard.append(data)
                await sock.sendto(b"stray", who)
                await sock.sendto(self._answer(data), who)

    def _answer(self, data: bytes) -> bytes:
        if data[0] == 2:
            if not self._pcp:
                return b"\x00\x81\x00\x01" + bytes(20)
            return data[:1] + b"\x81\x00\x00" + data[4:8] + bytes(16) + data[24:44] + portmap._mapped(INSIDE)
        if data[1] == 0:
            return b"\x00\x80\x00\x00" + bytes(4) + ipaddress.IPv4Address(OUTSIDE).packed
        return b"\x00\x82\x00\x00" + bytes(4) + data[4:12]


@pytest.mark.parametrize(
    ("pcp", "protocol", "outside"), [(True, PCP, str(INSIDE)), (False, NAT_PMP, OUTSIDE)]
)
def test_a_router_is_asked_by_what_it_speaks(pcp: bool, protocol: str, outside: str) -> None:
    async def main() -> None:
        gateway = Gateway(pcp=pcp)
        asking = Router(LOOPBACK, LOOPBACK, bytes(12))
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.run)
            got = await asking.give(4001, 600, None, 0.1)
            assert got == PortMap(protocol, parse(f"{outside}:4001"), 4001, 600)
            gateway.heard.clear()
            assert await asking.give(4001, 600, got, 0.1) == got
            assert {data[0] for data in gateway.heard} == {2 if pcp else 0}, "renewed as it was given"
            gateway.heard.clear()
            await asking.take_back(got, 1.0)
            taken = gateway.heard[-1]
            lifetime = taken[4:8] if pcp else taken[8:12]
            assert lifetime == bytes(4)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_no_router_is_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(timeout_s: float) -> Any:
        raise NoPort(f"no answer within {timeout_s}")

    async def main() -> None:
        with pytest.raises(NoPort, match=r"PCP: .*; NAT-PMP: .*; UPnP: no answer within 0.25"):
            await Router(LOOPBACK, LOOPBACK, bytes(12)).give(4001, 600, None, 0.25)

    monkeypatch.setattr(router_module, "_upnp_device", none)
    trio.run(main)


# --- what is made of it


class Place:
    """A host whose members see it as `seen` says: an endpoint for each question, and the ports they come to."""

    def __init__(self, *open_ports: int, outside: str = OUTSIDE, moves: Iterator[int] | None = None) -> None:
        self.reaching, self.open, self.outside = self, open_ports, outside
        self.moves = moves
        self.allows: Callable[[str], bool] = lambda peer_id: True
        self.asked: list[tuple[float, str, int]] = []
        self.dead: set[str] = set()
        self.extra: tuple[Endpoint, ...] = ()
        self.own: tuple[Endpoint, ...] = ()

    def ports(self) -> tuple[int, ...]:
        return (4001,)

    def reached_at(self, endpoints: Sequence[Endpoint]) -> None:
        self.extra = tuple(endpoints)

    def listen_addresses(self) -> tuple[str, ...]:
        return tuple(endpoint.multiaddr() for endpoint in (*self.own, *self.extra))

    async def where_seen(self, address: str, peer_id: str, port: int, source_port: int = 0) -> Observed:
        if peer_id in self.dead:
            raise DialError("no answer")
        self.asked.append((trio.current_time(), peer_id, port))
        local = Endpoint(INSIDE, source_port or 40000 + len(self.asked))
        you = Endpoint(ipaddress.ip_address(self.outside), next(self.moves) if self.moves else local.port)
        return Observed(local, you, port in self.open, 0.04)


class GivingRouter:
    """Gives the port it is asked for, unless `refuses`."""

    client, ip = INSIDE, ipaddress.IPv4Address("10.1.0.1")
    refuses, outside = False, f"{OUTSIDE}:4001"

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []
        self.back: list[float] = []

    async def give(self, port: int, lifetime_s: int, before: PortMap | None, timeout_s: float) -> PortMap:
        self.asked.append((trio.current_time(), lifetime_s))
        if self.refuses:
            raise NoPort("not permitted")
        return PortMap(PCP, parse(self.outside), port, lifetime_s)

    async def take_back(self, held: PortMap, timeout_s: float) -> None:
        self.back.append(timeout_s)


class Meetings:
    mapping = messages.UNKNOWN
    found: tuple[RelayAt, ...] = ()

    def keep_for_guests(self, wanted: bool) -> None:
        self.for_guests = wanted

    def subscribe(self, told: Callable[[], None]) -> None:
        self.told = told

    def may_answer(self, address: str) -> bool:
        return True

    def relays(self) -> tuple[Member, ...]:
        return ()

    def relays_at(self) -> tuple[RelayAt, ...]:
        return self.found


class Members:
    def __init__(self, *names: str) -> None:
        self._members = [
            Member(peer_id=name, name=name, prefixes=(), addresses=(f"/ip4/192.0.2.{place}/tcp/4001",))
            for place, name in enumerate(names, 1)
        ]

    def members(self) -> Sequence[Member]:
        return self._members

    def find(self, peer_id: str) -> Member | None:
        return next((member for member in self._members if member.peer_id == peer_id), None)


class Played:
    """A node that has run for so long. `said`: how often it published where it is."""

    def __init__(
        self,
        place: Place,
        *names: str,
        router: GivingRouter | None = None,
        seconds: float = 10.0,
        then: Callable[[Played], None] = lambda played: None,
        more_s: float = 0.0,
        announcements: Sequence[tuple[float, ipaddress.IPv4Address]] = (),
        **nat: Any,
    ) -> None:
        self.place, self.router, self.gauges = place, router, Counter[str]()
        self.said, self.meetings, self.live = 0, Meetings(), Live(Config(nat=Nat(**nat)))

        async def main() -> None:
            common = Common(
                self.live, lambda name: None, Seldom(logging.getLogger(), self.live, trio.current_time),
                trio.current_time, dice=random.Random(1),
            )  # fmt: skip
            self.here = Reachability(
                common, Members(*names), place, self, self.meetings, nonce=bytes(12), say_where=self._say,  # type: ignore[arg-type]
            )  # fmt: skip
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.here.run)
                await trio.sleep(seconds)
                then(self)
                await trio.sleep(more_s)
                self.report = self.here.report()
                self.told = place.listen_addresses()
                nursery.cancel_scope.cancel()

        async def hear(heard: Callable[[ipaddress.IPv4Address], None]) -> None:
            for at_s, ip in announcements:
                await trio.sleep_until(at_s)
                heard(ip)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reachability, "default_router", lambda nonce: router)
            patch.setattr(reachability, "hear_announcements", hear)
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    def set(self, name: str, value: int) -> None:
        self.gauges[name] = value

    def _say(self) -> None:
        self.said += 1


def test_where_two_came_through_is_told_to_all() -> None:
    played = Played(Place(4001), "a", "b", "c")
    assert played.report.reachable == YES and played.report.outside == (OUTSIDE,)
    assert played.told == (f"/ip4/{OUTSIDE}/tcp/4001",) and played.said == 1
    assert len({peer_id for _, peer_id, _ in played.place.asked}) == 2 == len(played.place.asked)
    assert played.gauges["reachable"] == 1 and played.report.mapping == messages.KEPT


def test_one_that_does_not_answer_is_replaced_and_nobody_is_not_no() -> None:
    place = Place(4001)
    place.dead = {"a", "b"}
    assert Played(place, "a", "b", "c", "d").report.reachable == YES
    assert Played(Place(), "a", "b").report.reachable == NO
    nobody = Played(Place())
    assert nobody.report.reachable == UNKNOWN and nobody.said == 0


@pytest.mark.parametrize(
    ("own", "comes", "at_first", "then"),
    [(str(INSIDE), False, 1, 1), (str(INSIDE), True, 1, 0), (OUTSIDE, False, 0, 1), (OUTSIDE, True, 0, 0)],
)
def test_relays_are_told_at_once_where_all_addresses_are_of_a_local_network(
    own: str, comes: bool, at_first: int, then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody elsewhere can dial them, and who calls meanwhile would not be reached."""
    monkeypatch.setattr(Meetings, "found", (RelayAt("/ip4/192.0.2.1/tcp/4001", "a"),))
    place, told = Place(*[4001] * comes), []
    place.own = (Endpoint(ipaddress.ip_address(own), 4001),)
    for seconds in (1.0, 10.0):
        Played(place, "a", "b", seconds=seconds, then=lambda played: told.append(played.here.called_over()))
    assert [*map(len, told)] == [at_first, then]


@pytest.mark.parametrize(
    ("ports", "mapping"),
    [([7, 7], messages.MOVED), ([7, 8], messages.RANDOM), ([7], messages.UNKNOWN)],
)
def test_what_the_nat_makes_of_ports_is_seen_by_two(ports: list[int], mapping: str) -> None:
    names = ("a", "b")[: len(ports)]
    assert Played(Place(moves=iter(ports)), *names).meetings.mapping == mapping


@pytest.mark.setting("nat.map_lifetime", "nat.map_ports")
def test_a_port_is_renewed_at_half_its_time_and_given_back() -> None:
    router = GivingRouter()
    played = Played(Place(), router=router, seconds=999.0, map_lifetime=400.0, map_check=1000.0)
    assert router.asked == [(at_s, 400) for at_s in (0.0, 200.0, 400.0, 600.0, 800.0)]
    assert played.report.port_map == f"{OUTSIDE}:4001 by PCP"
    assert len(router.back) == 1 and played.gauges["port_maps"] == 0
    unasked = GivingRouter()
    assert Played(Place(), router=unasked, map_ports=False).report.port_map == "" and unasked.asked == []


@pytest.mark.setting("nat.map_check")
def test_a_router_that_has_forgotten_is_asked_again_soon_and_at_once_when_it_says_that_it_has_started() -> (
    None
):
    router = GivingRouter()
    Played(Place(), router=router, seconds=100.0, map_check=40.0)
    assert [at_s for at_s, _ in router.asked] == [0.0, 40.0, 80.0]
    told = GivingRouter()
    said = [(10.0, told.ip), (10.01, told.ip), (20.0, INSIDE)]  # twice in a row, and by somebody else
    Played(Place(), router=told, seconds=30.0, announcements=said)
    assert [at_s for at_s, _ in told.asked] == [0.0, 10.0]


def test_a_router_that_says_that_it_has_started_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portmap, "ANNOUNCED_TO", (str(LOOPBACK), 53500))

    async def main() -> None:
        heard: list[ipaddress.IPv4Address] = []
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(router_module.hear_announcements, heard.append)
                await trio.testing.wait_all_tasks_blocked()
                for said in (b"\x00\x80" + bytes(10), b"stray", b"\x02\x80" + bytes(22)):
                    await sock.sendto(said, portmap.ANNOUNCED_TO)
                with trio.fail_after(5.0):
                    while len(heard) < 2:
                        await trio.sleep(0.01)
                assert heard == [LOOPBACK, LOOPBACK]
                nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.setting("nat.map_timeout")
def test_nothing_waits_long_for_a_router_at_the_end() -> None:
    router = GivingRouter()
    Played(Place(), router=router, map_timeout=0.7)
    assert router.back == [0.7]


@pytest.mark.setting("nat.map_retry")
def test_a_router_that_refuses_is_asked_again_later() -> None:
    router = GivingRouter()
    router.refuses = True
    played = Played(Place(), router=router, seconds=100.0, map_retry=40.0)
    assert [at_s for at_s, _ in router.asked] == [0.0, 40.0, 80.0]
    assert played.report.port_map == "" and played.told == ()


@pytest.mark.parametrize(("outside", "told"), [(f"{OUTSIDE}:4001", True), ("100.64.1.2:4001", False)])
def test_with_nobody_to_ask_the_routers_word_has_to_do_if_it_is_on_the_internet(
    outside: str, told: bool
) -> None:
    router = GivingRouter()
    router.outside = outside
    assert bool(Played(Place(), router=router).told) == told


def test_a_port_behind_another_nat_is_not_told() -> None:
    router = GivingRouter()
    router.outside = (
        "198.51.100.9:4001"  # by the router's word; members see another address, and do not come through
    )
    played = Played(Place(), "a", "b", router=router)
    assert played.report.reachable == NO and played.told == ()


@pytest.mark.setting("nat.reach_delay", "nat.reach_interval")
def test_members_are_asked_after_a_while_and_again_and_again_and_when_the_network_changes() -> None:
    place = Place(4001)
    Played(
        place, "a", seconds=60.0, more_s=10.0, then=lambda played: played.here.network_changed(),
        reach_delay=5.0, reach_interval=20.0,
    )  # fmt: skip
    assert [at_s for at_s, *_ in place.asked] == [5.0, 30.0, 55.0, 65.0]


@pytest.mark.setting("nat.max_reach_questions")
def test_a_member_is_dialed_back_so_often() -> None:
    played = Played(Place(), "a", max_reach_questions=2)
    allows = played.place.allows
    played.here._questions._now_s = lambda: 10.0
    assert [allows("x") for _ in range(3)] == [True, True, False] and allows("y")
