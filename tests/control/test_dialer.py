"""Dials on a made-up clock: how many at once, and how addresses are tried beside each other."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from planner_node import Node, member, settings

from vpnd.adapter.dial import DialError
from vpnd.adapter.handoff import Detached
from vpnd.config.live import Live
from vpnd.config.schema import P2P, Config, Nat
from vpnd.control.book import Held
from vpnd.control.dialer import Dialer
from vpnd.control.traversal import CalledMeanwhile, NoRelay
from vpnd.discovery.registry import Member
from vpnd.nat.paths import DIRECT, PUNCHED, RELAYED, Path
from vpnd.session import Established


class SilentHost:
    """Nobody answers; who was dialed when is kept."""

    def __init__(self) -> None:
        self.begun: list[tuple[float, str]] = []
        self.begun_s = trio.current_time()
        self.small: list[bool] = []
        self.small_to: set[str] = set()

    async def dial(self, address: str, peer_id: str, *, small: bool) -> Any:
        self.small.append(small)
        self.begun.append((round(trio.current_time() - self.begun_s, 3), address))
        await trio.sleep_forever()


class RefusingHost(SilentHost):
    """Nobody is there."""

    async def dial(self, address: str, peer_id: str, *, small: bool) -> Any:
        self.small.append(small)
        raise DialError(f"{address}: connection refused")


class AnsweringHost(SilentHost):
    """Everybody is there."""

    async def dial(self, address: str, peer_id: str, *, small: bool) -> Any:
        return session(peer_id, Path(kind=DIRECT))


class Relays:
    """A relay at which every peer can be met, or none; each meeting brings what `brings` gives, in turn."""

    def __init__(self, *brings: str | None, near: bool = True) -> None:
        """`near`: the addresses of peers could be theirs."""
        self.brings, self._near = list(brings), near
        self.begun: list[tuple[float, str]] = []
        self._since_s: float | None = None

    def can_meet(self, peer_id: str) -> bool:
        return bool(self.brings)

    def may_answer(self, address: str) -> bool:
        return self._near

    async def meet(self, member: Member, mode: str, deliver: Callable[[Detached], bool]) -> str:
        if self._since_s is None:
            self._since_s = trio.current_time()
        self.begun.append((round(trio.current_time() - self._since_s, 3), mode))
        kind = self.brings.pop(0) if len(self.brings) > 1 else self.brings[0]
        if kind is not None:
            deliver(session(member.peer_id, Path(kind=kind)))
        return "" if kind == PUNCHED else "the peer's NAT is symmetric"


def session(peer_id: str, path: Path) -> Detached:
    established = Established(
        peer_id=peer_id, initiator=True, cipher="aesgcm", send_key=bytes(32), send_nonce=0, receive_key=bytes(32),
        receive_nonce=0, leftover=b"", path=path,
    )  # fmt: skip
    return Detached(established, os.open("/dev/null", os.O_RDONLY))


def with_p2p(**p2p: Any) -> Config:
    return msgspec.structs.replace(settings(), p2p=P2P(**p2p))


class Taker:
    """Takes whatever session there is for a node, and enters it into its book."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.paths: list[str] = []

    def keeps_up(self, shard: int) -> bool:
        return True

    def dialed(self, detached: Detached, shard: int) -> int:
        session, book = detached.session, self._node.book
        self.paths.append(session.path.kind)
        session_id = book.new_id()
        book.add(Held(session_id, session.peer_id, shard, True, 0.0, path=session.path))
        return session_id

    def best(self, peer_id: str, shard: int) -> Held | None:
        return self._node.book.best(peer_id, shard)

    def announce(self) -> None:
        """Nobody listens."""


def played(
    config: Config,
    node: Node,
    then: Callable[[Live, SilentHost, Dialer], Any],
    relays: Relays | None = None,
    *,
    seconds: float = 10.0,
    host_of: type[SilentHost] = SilentHost,
) -> list[str]:
    """A dialer of `node` that has run for so long; then what the test does. The paths of the sessions it made."""
    taker = Taker(node)

    async def main() -> None:
        live = Live(config)
        host, begun_s = host_of(), trio.current_time()
        dialer = Dialer(
            node.planner,
            live,
            relays or Relays(),
            count=lambda name: None,
            measured=lambda name, seconds: None,
            now_s=lambda: trio.current_time() - begun_s,
            small=host.small_to.__contains__,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialer.run, host, taker)
            await trio.sleep(seconds)
            await then(live, host, dialer)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return taker.paths


@pytest.mark.setting("p2p.max_dials")
def test_so_many_dials_are_under_way_and_other_settings_hold_at_once() -> None:
    config = with_p2p(max_dials=2)
    node = Node("a", *(member(f"m{number}") for number in range(5)), config=config)
    node.planner.shard_ready(0, 0.0)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert len(host.begun) == 2
        live.take(with_p2p(max_dials=4))
        await trio.sleep(1.0)
        assert len(host.begun) == 4

    played(config, node, then)


def test_a_peer_that_large_segments_do_not_reach_is_dialed_with_small_ones() -> None:
    config = settings()
    node = Node("a", member("m", addresses=("/ip4/192.0.2.1/tcp/4001",)), config=config)
    node.planner.shard_ready(0, 0.0)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        async def dialed(seconds: float) -> set[bool]:
            host.small.clear()
            node.planner.wanted("m", 0, 1, True, 0.0)
            await trio.sleep(seconds)
            return set(host.small)

        assert await dialed(20.0) == {False}
        host.small_to.add("m")
        assert await dialed(20.0) == {True}
        host.small_to.clear()
        assert await dialed(20.0) == {False}

    played(config, node, then, host_of=RefusingHost)


@pytest.mark.setting("p2p.address_stagger")
@pytest.mark.parametrize("stagger_s", [0.5, 2.0])
def test_the_next_address_is_tried_when_the_one_before_had_its_head_start(stagger_s: float) -> None:
    config = with_p2p(address_stagger=stagger_s)
    addresses = tuple(f"/ip4/192.0.2.{number}/tcp/4001" for number in (1, 2, 3))
    node = Node("a", member("m", addresses=addresses), config=config)
    node.planner.shard_ready(0, 0.0)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert host.begun == [(place * stagger_s, address) for place, address in enumerate(addresses)]

    played(config, node, then)


def hidden(config: Config, **settings: Any) -> tuple[Config, Node]:
    """A node with one peer, whose only address does not answer."""
    config = msgspec.structs.replace(config, nat=Nat(**settings))
    node = Node("a", member("m", addresses=("/ip4/192.0.2.1/tcp/4001",)), config=config)
    node.planner.shard_ready(0, 0.0)
    return config, node


@pytest.mark.setting("nat.meet_delay")
@pytest.mark.parametrize("delay_s", [0.0, 2.0])
def test_a_relay_is_asked_when_addresses_had_their_head_start(delay_s: float) -> None:
    config, node = hidden(settings(), meet_delay=delay_s)
    relays = Relays(PUNCHED)

    async def until(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert relays.begun == []
        await trio.sleep(0.2)
        assert relays.begun

    async def at_once(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert relays.begun

    then = until if delay_s else at_once
    assert played(config, node, then, relays, seconds=max(0.1, delay_s - 0.1)) == [PUNCHED]


def test_a_relayed_session_comes_first_and_a_direct_one_replaces_it() -> None:
    config, node = hidden(settings())
    relays = Relays(RELAYED, None, PUNCHED)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert [mode for _, mode in relays.begun] == ["both", "punch", "punch"]

    assert played(config, node, then, relays, seconds=1000.0, host_of=RefusingHost) == [RELAYED, PUNCHED]


@pytest.mark.setting("nat.upgrade_interval", "nat.upgrade_max_interval")
def test_a_direct_connection_is_tried_again_later_and_later_and_at_once_from_another_network() -> None:
    config, node = hidden(settings(), upgrade_interval=5.0, upgrade_max_interval=15.0, meet_delay=0.0)
    relays = Relays(RELAYED, None)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        waits = [later - sooner for (sooner, _), (later, _) in itertools.pairwise(relays.begun)]
        assert waits == pytest.approx([5.0, 10.0, 15.0, 15.0], abs=0.5)
        state = dialer.improving("m", 0)
        assert state is not None and state.tries == 5 and state.why == "the peer's NAT is symmetric"
        before = len(relays.begun)
        dialer.begin_anew()
        await trio.sleep(0.1)
        assert len(relays.begun) == before + 1

    assert played(config, node, then, relays, seconds=50.0, host_of=RefusingHost) == [RELAYED]


def test_a_relayed_session_of_an_earlier_control_is_improved_on_too() -> None:
    config, node = hidden(settings(), upgrade_interval=5.0, meet_delay=0.0)
    peer = node.planner.report(0.0)[0]
    node.book.add(Held(1, peer.peer_id, 0, True, 0.0, up=True, path=Path(kind=RELAYED)))
    relays = Relays(PUNCHED)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert relays.begun == []
        dialer.found("m", 0)
        await trio.sleep(4.9)
        state = dialer.improving("m", 0)
        assert relays.begun == [] and state is not None and state.tries == 0
        await trio.sleep(0.2)
        assert [mode for _, mode in relays.begun] == ["punch"]

    assert played(config, node, then, relays, host_of=RefusingHost) == [PUNCHED]


def holding(node: Node, path: Path, *, ours: bool) -> None:
    """The node's only shard has a session with the peer."""
    node.book.add(Held(1, "m", 0, ours, 0.0, up=True, path=path))


@pytest.mark.parametrize("ours", [True, False])
def test_an_address_takes_the_place_of_a_hole_in_a_nat_as_soon_as_it_is_known(ours: bool) -> None:
    config, node = hidden(settings())
    holding(node, Path(kind=PUNCHED, address="203.0.113.2:33949"), ours=ours)
    relays = Relays(PUNCHED)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert dialer.improving("m", 0) is None
        dialer.found("m", 0, news=True)
        await trio.sleep(0.0 if ours else config.p2p.dial_stagger)
        await trio.sleep(0.01)
        assert dialer.improving("m", 0) is None and relays.begun == []

    assert played(config, node, then, relays, host_of=AnsweringHost) == [DIRECT]


def test_better_addresses_that_keep_changing_are_not_knocked_at_all_day() -> None:
    config, node = hidden(settings())
    holding(node, Path(kind=PUNCHED), ours=True)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        for _ in range(600):
            dialer.found("m", 0, news=True)
            await trio.sleep(0.1)
        assert 3 <= len(host.small) <= 60.0 / config.retry.max_interval + 1

    assert played(config, node, then, host_of=RefusingHost) == []


def test_an_address_that_is_no_better_or_nowhere_is_not_dialed() -> None:
    for path, near in ((Path(address="203.0.113.2:4001"), True), (Path(kind=PUNCHED), False)):
        config, node = hidden(settings())
        holding(node, path, ours=True)

        async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
            dialer.found("m", 0, news=True)
            await trio.sleep(100.0)

        assert played(config, node, then, Relays(near=near), host_of=AnsweringHost) == []


def test_who_was_called_over_a_relay_tries_for_a_direct_session_when_it_knows_of_another_network() -> None:
    config, node = hidden(settings())
    holding(node, Path(kind=RELAYED), ours=False)
    relays = Relays(PUNCHED)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        dialer.found("m", 0)
        await trio.sleep(10_000.0)
        dialer.begin_anew()
        await trio.sleep(1.0)
        assert relays.begun == []
        dialer.begin_anew(both=True)
        await trio.sleep(1.0)
        assert [mode for _, mode in relays.begun] == ["punch"]

    assert played(config, node, then, relays, host_of=RefusingHost) == [PUNCHED]


def test_a_direct_session_ends_the_meeting() -> None:
    config, node = hidden(settings())

    relays = Relays(PUNCHED)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert relays.begun == []

    assert played(config, node, then, relays, host_of=AnsweringHost) == [DIRECT]


@pytest.mark.parametrize("near", [True, False])
def test_who_is_behind_a_nat_and_has_no_relay_is_said_to_and_what_helps(near: bool) -> None:
    config, node = hidden(settings())

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        said = node.planner.report(0.0)[0].last_error
        assert "connection refused" in said
        assert ("forward a port" in said) == (not near)

    assert played(config, node, then, Relays(near=near), host_of=RefusingHost) == []


@pytest.mark.parametrize(("error", "told"), [(NoRelay("r is silent"), True), (DialError("not_here"), False)])
def test_relays_that_are_all_away_are_no_relays(error: DialError, told: bool) -> None:
    config, node = hidden(settings())

    class Failing(Relays):
        async def meet(self, member: Member, mode: str, deliver: Callable[[Detached], bool]) -> str:
            raise error

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert ("forward a port" in node.planner.report(0.0)[0].last_error) == told

    assert played(config, node, then, Failing(RELAYED, near=False), host_of=RefusingHost) == []


def test_a_peer_that_calls_at_the_same_moment_is_not_to_blame() -> None:
    config, node = hidden(settings())

    class Calling(Relays):
        async def meet(self, member: Member, mode: str, deliver: Callable[[Detached], bool]) -> str:
            self.begun.append((0.0, mode))
            raise CalledMeanwhile("m calls at the same moment")

    relays = Calling(RELAYED)

    async def then(live: Live, host: SilentHost, dialer: Dialer) -> None:
        assert len(relays.begun) > 1 and node.circuit() == "closed"
        assert node.planner.report(0.0)[0].dial_failures

    breaker = msgspec.structs.replace(config.circuit_breaker, failure_threshold=1)
    config = msgspec.structs.replace(config, circuit_breaker=breaker)
    node = Node("a", member("m", addresses=("/ip4/192.0.2.1/tcp/4001",)), config=config)
    node.planner.shard_ready(0, 0.0)
    assert played(config, node, then, relays, host_of=RefusingHost) == []
