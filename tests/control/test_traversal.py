"""What a node does to be called, and what it refuses; and what a relay permits. Without any socket."""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from vpnd import peerid
from vpnd.adapter.arrivals import Rate
from vpnd.adapter.dial import DialError
from vpnd.config.live import Live
from vpnd.config.schema import Config, Nat, Relay
from vpnd.control import relaying as relaying_module
from vpnd.control import traversal as traversal_module
from vpnd.control.common import Common
from vpnd.control.relaying import Relaying
from vpnd.control.traversal import Traversal
from vpnd.discovery.registry import Member
from vpnd.endpoint import parse
from vpnd.metrics import CONTROL_COUNTERS, CounterPage, create_page
from vpnd.nat import messages
from vpnd.nat.messages import Call

PEERS = [peerid.from_public_key(bytes([number]) * 32) for number in range(6)]
OWN, OTHERS = PEERS[0], PEERS[1:]
TOKEN = bytes(16)
SEEN = parse("203.0.113.2:40001")


class Registry:
    """All others are members, at addresses nobody answers at."""

    def __init__(self, *peer_ids: str, hidden: str = "") -> None:
        """`hidden`: one that says an address of somebody else's network."""
        self.peer_ids, self._hidden = list(peer_ids), hidden

    def members(self) -> list[Member]:
        return [
            Member(
                peer_id=peer_id,
                name=peer_id[-4:],
                prefixes=(),
                addresses=(
                    "/ip4/192.168.211.2/tcp/4001" if peer_id == self._hidden else "/ip4/203.0.113.2/tcp/4001",
                ),
            )
            for peer_id in self.peer_ids
        ]

    def find(self, peer_id: str) -> Member | None:
        return next((member for member in self.members() if member.peer_id == peer_id), None)


class Nobody:
    """A host that reaches nobody; whom it tried when is kept."""

    ends: Any = None
    listening: tuple[str, ...] = ("/ip4/192.168.211.1/tcp/4001",)

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []

    def listen_addresses(self) -> tuple[str, ...]:
        return self.listening

    async def open_stream(self, addresses: Any, peer_id: str, protocol: str) -> Any:
        self.asked.append((trio.current_time(), peer_id))
        await trio.sleep(0.01)
        raise DialError("nobody is there")


def traversal(
    config: Config, registry: Registry, host: Nobody, nursery: trio.Nursery, own: str = OWN
) -> Traversal:
    return Traversal(
        own,
        Common(Live(config), Counter[str]().update, None, trio.current_time),  # type: ignore[arg-type]
        registry,
        host,
        nursery,
        without=tuple,
    )


@pytest.mark.parametrize(
    ("address", "may"),
    [
        ("/ip4/203.0.113.2/tcp/4001", True),
        ("/ip4/192.168.211.2/tcp/4001", True),
        ("/ip4/192.168.212.2/tcp/4001", False),  # of somebody else's network
        ("/ip4/192.168.211.1/tcp/4001", False),  # our own
        ("/ip4/192.168.211.1/tcp/4002", True),  # another node of this machine
        ("/dns4/vm.example/tcp/4001", True),
    ],
)
def test_where_a_peer_could_be_seen_from_here(
    address: str, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ipaddress.ip_network("192.168.211.0/24")
    monkeypatch.setattr(relaying_module, "local_networks", lambda: [network])
    assert traversal(Config(), Registry(), Nobody(), None).may_answer(address) == may  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "peers", "relay", "at_once"),
    [
        ("192.168.211.1", ["203.0.113.2"], False, True),
        ("192.168.211.1", ["203.0.113.2", "192.168.212.2"], False, True),
        ("192.168.211.1", ["203.0.113.2", "192.168.211.2"], False, False),  # they are in one network
        ("203.0.113.1", ["203.0.113.2"], True, False),  # both can be dialed
        ("203.0.113.1", ["192.168.212.2"], False, False),  # only this node can be
        ("203.0.113.1", ["192.168.212.2"], True, True),
        ("192.168.211.1", ["192.168.212.2"], True, True),
    ],
)
def test_who_cannot_dial_this_node_is_not_waited_for(
    own: str, peers: list[str], relay: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ipaddress.ip_network("192.168.211.0/24")
    monkeypatch.setattr(relaying_module, "local_networks", lambda: [network])
    host = Nobody()
    host.listening = (f"/ip4/{own}/tcp/4001",)
    addresses = tuple(f"/ip4/{ip}/tcp/4001" for ip in peers)
    relays = (PEERS[2],) if relay else ()
    member = Member(peer_id=PEERS[1], name="m", prefixes=(), addresses=addresses, relays=relays)
    registry = Registry(PEERS[2])
    monkeypatch.setattr(registry, "find", {PEERS[2]: registry.members()[0], PEERS[1]: member}.get)
    here = traversal(Config(), registry, host, None)  # type: ignore[arg-type]
    assert here.dials_at_once(member) == at_once


def asked(nat: Nat, registry: Registry, seconds: float) -> list[tuple[float, str]]:
    """Who is asked to be a relay within so long."""

    async def main() -> list[tuple[float, str]]:
        host, begun_s = Nobody(), trio.current_time()
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                await traversal(Config(nat=nat), registry, host, nursery).run()
        return [(at_s - begun_s, peer_id) for at_s, peer_id in host.asked]

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_everybody_is_asked_in_one_order_few_at_a_time() -> None:
    found = [peer_id for _, peer_id in asked(Nat(relays=1), Registry(*OTHERS), 1.0)]
    assert sorted(found) == sorted(OTHERS)
    assert found == [peer_id for _, peer_id in asked(Nat(relays=1), Registry(*reversed(OTHERS)), 1.0)]


def test_who_can_hardly_be_dialed_is_asked_last() -> None:
    for peer_id in OTHERS:
        found = [asked_id for _, asked_id in asked(Nat(relays=1), Registry(*OTHERS, hidden=peer_id), 1.0)]
        assert found[-1] == peer_id


@pytest.mark.setting("nat.relays")
def test_so_many_are_asked_at_once() -> None:
    at_first = [peer_id for at_s, peer_id in asked(Nat(relays=3), Registry(*OTHERS), 1.0) if at_s == 0.0]
    assert len(at_first) == 3


@pytest.mark.setting("nat.relay_retry")
def test_who_was_no_relay_is_asked_again() -> None:
    times = [
        at_s
        for at_s, peer_id in asked(Nat(relay_retry=7.0), Registry(*OTHERS[:2]), 20.0)
        if peer_id == OTHERS[0]
    ]
    assert times == pytest.approx([0.0, 7.0, 14.0], abs=0.2)


@pytest.mark.setting("nat.enabled")
def test_who_does_not_want_it_asks_nobody() -> None:
    assert asked(Nat(enabled=False), Registry(*OTHERS), 100.0) == []


def test_between_two_there_is_nobody_to_relay_for() -> None:
    assert asked(Nat(), Registry(OTHERS[0]), 100.0) == []


def in_trio(test: Callable[[trio.Nursery], None]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            test(nursery)

    trio.run(main)


@pytest.mark.setting("nat.max_calls")
def test_a_member_calls_so_often_and_a_stranger_not_at_all() -> None:
    def calls(nursery: trio.Nursery) -> None:
        here = traversal(Config(nat=Nat(max_calls=3)), Registry(*OTHERS[:2]), Nobody(), nursery)
        said = [here._follows(Call(TOKEN, OTHERS[0])) for _ in range(5)]
        assert said == ["", "", "", messages.TOO_OFTEN, messages.TOO_OFTEN]
        assert here._follows(Call(TOKEN, OTHERS[1])) == ""
        assert here._follows(Call(TOKEN, OTHERS[2])) == messages.NOT_MEMBER

    in_trio(calls)


@pytest.mark.parametrize(
    ("smaller", "brought", "followed"),
    [(True, True, False), (True, False, True), (False, True, True)],
    ids=["ours stands", "ours could not be brought", "theirs stands"],
)
def test_of_two_calls_at_once_that_of_the_smaller_peer_id_stands_if_it_comes_about(
    smaller: bool, brought: bool, followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = sorted(OTHERS[:2], reverse=not smaller)
    came: list[Call] = []
    said: list[messages.Message] = []

    async def say(stream: Any, message: messages.Message) -> None:
        said.append(message)

    async def come(relay: Member, call: Call) -> None:
        came.append(call)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            here = traversal(Config(), Registry(other), Nobody(), nursery, own)
            monkeypatch.setattr(here, "_come", come)
            calling = traversal_module._Calling()
            here._calling[other] = {calling}
            call, (relay,) = Call(TOKEN, other), Registry(other).members()
            nursery.start_soon(here._answer, None, relay, call)
            await trio.testing.wait_all_tasks_blocked()
            assert calling.scope.cancel_called == bool(came) == (not smaller)
            calling.end(answered=brought)
            await trio.testing.wait_all_tasks_blocked()
            assert came == ([call] if followed else [])
            assert said == ([] if followed else [messages.Gone(TOKEN, messages.ABSENT)])
            assert here._follows(call) == ""

    monkeypatch.setattr(traversal_module, "say", say)
    trio.run(main)


# --- the relay's side


def relaying(relay: Relay, registry: Registry) -> tuple[Relaying, CounterPage]:
    page, _ = create_page(CONTROL_COUNTERS, "test")
    return Relaying(Live(Config(relay=relay)), registry, page, lambda: 0.0, lambda: None), page


@pytest.mark.setting("relay.serve")
def test_who_declines_is_no_relay() -> None:
    here, _ = relaying(Relay(serve=False), Registry(*OTHERS))
    assert here.stays(OTHERS[0], SEEN, 0) == messages.NOT_SERVING
    assert here.meets(OTHERS[0], OTHERS[1]) == messages.NOT_SERVING


@pytest.mark.setting("relay.max_members")
def test_so_many_wait_here_and_strangers_never() -> None:
    here, _ = relaying(Relay(max_members=3), Registry(*OTHERS[:2]))
    assert here.stays(OTHERS[0], SEEN, 2) == ""
    assert here.stays(OTHERS[0], SEEN, 3) == messages.FULL
    assert here.stays(OTHERS[2], SEEN, 0) == messages.NOT_MEMBER


def test_who_is_seen_at_its_own_address_of_this_local_network_needs_no_relay(monkeypatch: Any) -> None:
    here, _ = relaying(Relay(), Registry(*OTHERS))
    monkeypatch.setattr(relaying_module, "local_networks", lambda: [ipaddress.ip_network("203.0.113.0/24")])
    assert here.stays(OTHERS[0], SEEN, 0) == messages.NOT_SERVING
    # a NAT in the same network: it has another address than it says
    assert here.stays(OTHERS[0], parse("203.0.113.7:1"), 0) == ""


@pytest.mark.setting("relay.max_meets")
def test_a_member_may_meet_so_often() -> None:
    here, _ = relaying(Relay(max_meets=3), Registry(*OTHERS))
    said = [here.meets(OTHERS[0], OTHERS[1]) for _ in range(4)]
    assert said == ["", "", "", messages.TOO_OFTEN]
    assert here.meets(OTHERS[1], OTHERS[0]) == ""
    assert here.meets(OTHERS[1], OWN) == messages.NOT_MEMBER == here.meets(OTHERS[1], OTHERS[1])


@pytest.mark.setting("relay.max_sessions", "relay.max_sessions_per_member")
def test_sessions_are_relayed_within_limits() -> None:
    async def main() -> None:
        here, page = relaying(Relay(max_sessions=3, max_sessions_per_member=2), Registry(*OTHERS))
        here._channel = object()  # type: ignore[assignment]
        here._send = lambda *_: None  # type: ignore[method-assign]
        a, b, c, d, _ = OTHERS
        for pair in ((a, b), (a, c)):
            assert await here.room(*pair)
            here.join(*pair, (0, 0))
        assert not await here.room(a, d), "two of a already"
        assert await here.room(b, c)
        here.join(b, c, (0, 0))
        assert not await here.room(d, OWN), "three already"
        assert page.read()["relay_pairs"] == 3

    trio.run(main)


def test_a_rate_forgets_what_is_a_minute_ago() -> None:
    now_s = 0.0
    rate = Rate(lambda: now_s)
    assert [rate.allows("a", 2) for _ in range(3)] == [True, True, False]
    now_s = 59.0
    assert not rate.allows("a", 2)
    now_s = 61.0
    assert rate.allows("a", 2) and rate.allows("b", 2)
    now_s = math.inf
    assert rate.allows("c", 1) and len(rate._times) == 1


def test_members_meet_at_a_relay_that_both_have_then_at_one_of_either() -> None:
    """By what a member says of its relays in its presence; of who is no member no word counts."""
    a, b, c, d, _ = OTHERS

    class Telling(Registry):
        def members(self) -> list[Member]:
            return [
                msgspec.structs.replace(one, relays=(c, d, a, "nobody") if one.peer_id == a else ())
                for one in super().members()
            ]

    async def main() -> list[str]:
        registry, met = Telling(*OTHERS), []
        async with trio.open_nursery() as nursery:
            here = traversal(Config(), registry, Nobody(), nursery)
            assert here.can_meet(a) and not here.can_meet(b)
            for peer_id in (b, c):
                here._relays[peer_id] = SimpleNamespace(member=registry.find(peer_id))  # type: ignore[assignment]

            async def at(relay: Member, request: Any) -> Any:
                met.append(relay.peer_id)
                raise DialError("nobody is there")

            here._at = at  # type: ignore[method-assign]
            member = registry.find(a)
            assert member is not None
            with pytest.raises(DialError):
                await here.meet(member, messages.BOTH, lambda detached: True)
        return met

    assert trio.run(main) == [c, b, d]


class AnsweredLeg:
    """What a relay gives that lets two meet, or says so. `closed`: it has been."""

    def __init__(self) -> None:
        self.met, self.closed = SimpleNamespace(relayed=True), False

    def close(self) -> None:
        self.closed = True


@pytest.mark.setting("nat.relay_stagger", "nat.relay_retry")
def test_a_relay_that_does_not_answer_holds_up_nobody_and_is_asked_last_for_a_while() -> None:
    a, b, c, *_ = OTHERS
    asked: list[tuple[str, float]] = []
    legs: list[AnsweredLeg] = []

    async def main() -> None:
        registry = Registry(*OTHERS)
        async with trio.open_nursery() as nursery:
            config = Config(nat=Nat(relay_stagger=0.5, relay_retry=20.0))
            here = traversal(config, registry, Nobody(), nursery)
            for peer_id in (b, c):
                here._relays[peer_id] = SimpleNamespace(member=registry.find(peer_id))  # type: ignore[assignment]

            async def at(relay: Member, request: Any) -> Any:
                asked.append((relay.peer_id, trio.current_time()))
                if relay.peer_id == b:
                    await trio.sleep_forever()
                await trio.sleep(0.1)
                legs.append(AnsweredLeg())
                return legs[-1]

            async def conclude(leg: Any, relay_id: str, peer_id: str, deliver: Any) -> str:
                deliver(SimpleNamespace())
                return relay_id

            here._at, here._conclude = at, conclude  # type: ignore[method-assign]
            member = registry.find(a)
            assert member is not None
            for wait_s in (0.0, 0.0, 30.0):
                await trio.sleep(wait_s)
                begun_s, before = trio.current_time(), len(asked)
                assert await here.meet(member, messages.BOTH, lambda detached: True) == c
                times.append(trio.current_time() - begun_s)
                order.append([peer_id for peer_id, _ in asked[before:]])

    times: list[float] = []
    order: list[list[str]] = []
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert times == pytest.approx([0.6, 0.1, 0.6])
    assert order == [[b, c], [c], [b, c]]


def test_a_relay_through_which_nothing_comes_is_replaced_by_the_next() -> None:
    a, b, c, *_ = OTHERS
    tried: list[str] = []

    async def main() -> str:
        registry = Registry(*OTHERS)
        async with trio.open_nursery() as nursery:
            here = traversal(Config(), registry, Nobody(), nursery)
            for peer_id in (b, c):
                here._relays[peer_id] = SimpleNamespace(member=registry.find(peer_id))  # type: ignore[assignment]

            async def at(relay: Member, request: Any) -> Any:
                return AnsweredLeg()

            async def conclude(leg: Any, relay_id: str, peer_id: str, deliver: Any) -> str:
                tried.append(relay_id)
                if relay_id == through:
                    deliver(SimpleNamespace())
                return "no hole"

            here._at, here._conclude = at, conclude  # type: ignore[method-assign]
            member = registry.find(a)
            assert member is not None
            return await here.meet(member, messages.BOTH, lambda detached: True)

    through = c
    assert trio.run(main) == "no hole" and tried == [b, c]
    tried.clear()
    through = ""
    assert trio.run(main) == "no hole" and tried == [b, c]
