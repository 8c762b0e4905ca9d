"""What the settings of [membership] change, in the part of one node, without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
from own_world import NobodyAnswers, OwnWorld, key_of, on_a_made_up_clock, peer_id_of, trio_ms

from vpnd.api.messages import Request
from vpnd.api.reports import ReachReport
from vpnd.config.live import Live
from vpnd.config.schema import Network, Retry
from vpnd.control.membership import NetworkService
from vpnd.control.renewing import Renewing
from vpnd.control.requests import Requests
from vpnd.control.state import OwnNetwork
from vpnd.discovery.registry import PeerRegistry
from vpnd.errors import RefusedError
from vpnd.membership import messages
from vpnd.membership import token as tokens
from vpnd.membership.authority import Wish
from vpnd.membership.index import entry
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Statement
from vpnd.membership.store import Store

HOUR_MS = 3_600_000


def world(path: Path, **settings: Any) -> OwnWorld:
    """A node that has made its network."""
    made = OwnWorld(path, **settings)
    trio.run(made.enter)
    return made


@pytest.mark.setting("membership.name", "membership.subnet")
def test_a_network_that_is_made_here_has_name_and_range_of_the_settings(tmp_path: Path) -> None:
    made = world(tmp_path, name="workshop", subnet="10.99.0.0/24")
    own = made.own.addresses(made.now_ms())
    assert (own.network, own.subnets[0]) == ("workshop", "10.99.0.0/24")
    assert own.addresses[0].startswith("10.99.0.")


@pytest.mark.setting("membership.record_lifetime")
def test_a_membership_is_signed_for_its_lifetime(tmp_path: Path) -> None:
    made = world(tmp_path, record_lifetime=3600.0)
    body = made.enrol("b").body
    assert body.expires_ms - body.issued_ms == HOUR_MS


@pytest.mark.setting("membership.clock_skew")
@pytest.mark.parametrize(("skew_s", "refused"), [(7200.0, []), (60.0, ["not_yet_valid"])])
def test_statements_of_a_clock_that_is_ahead(tmp_path: Path, skew_s: float, refused: list[str]) -> None:
    made = world(tmp_path, clock_skew=skew_s)
    ahead = made.authority.enrol(peer_id_of("b"), Wish(name="b"), made.now_ms() + HOUR_MS)
    assert [one.reason for one in made.merge(ahead).refused] == refused


@pytest.mark.setting("membership.forget_after")
def test_an_expired_member_may_renew_until_it_is_forgotten(tmp_path: Path) -> None:
    made = world(tmp_path, record_lifetime=3600.0, clock_skew=0.0, forget_after=7200.0)
    made.enrol("b")
    for passed_ms, remembered in ((2 * HOUR_MS, True), (4 * HOUR_MS, False)):
        made.own.directory.advance(made.now_ms() + passed_ms)
        assert made.own.directory.find(peer_id_of("b"), made.now_ms() + passed_ms) is None
        assert (made.own.directory.newest(peer_id_of("b")) is not None) == remembered
        if remembered:
            made.authority.renew(peer_id_of("b"), made.now_ms() + passed_ms)


@pytest.mark.setting("membership.max_members")
def test_the_directory_holds_so_many_peer_ids(tmp_path: Path) -> None:
    made = world(tmp_path, max_members=2)
    made.enrol("b")
    third = made.authority.enrol(peer_id_of("c"), Wish(name="c"), made.now_ms())
    assert made.merge(third).refused and len(made.own.directory.members(made.now_ms())) == 2


@pytest.mark.setting("membership.invite_lifetime")
def test_a_token_is_good_for_so_long(tmp_path: Path) -> None:
    made = world(tmp_path, invite_lifetime=60.0)
    requests = Requests(
        made.common(),
        SimpleNamespace(own=made.own),  # type: ignore[arg-type]
        PeerRegistry(()),
        SimpleNamespace(listen_addresses=lambda: ("/ip4/192.0.2.1/tcp/4001",)),  # type: ignore[arg-type]
        SimpleNamespace(standing=None, ask=None),  # type: ignore[arg-type]
        reachability=SimpleNamespace(  # type: ignore[arg-type]
            relays_at=tuple, guests_changed=lambda: None, report=ReachReport
        ),
        connected=lambda peer_id: False,
    )
    answer = trio.run(requests.carry_out, Request(serial=1, command="invite", arguments={}))
    token = tokens.parse_untrusted(msgspec.json.decode(answer.result)["token"])

    def redeem(name: str, after_ms: int) -> object:
        return made.own.invitations.redeem(
            made.authority, made.own.directory, token.secret, peer_id_of(name), name, made.now_ms() + after_ms
        )

    with pytest.raises(MembershipRefused, match="expired"):
        redeem("b", 61_000)
    assert redeem("b", 59_000)


# --- gossip


@pytest.mark.setting("membership.gossip_interval")
def test_directories_are_compared_every_interval(tmp_path: Path) -> None:
    made = world(tmp_path, gossip_interval=90.0)
    gossip = made.own.gossip
    gossip.connected("x", made.now_ms(), dialed=False)
    assert gossip.tick(made.now_ms()).send
    assert gossip.next_timer_ms() == made.now_ms() + 90_000


def published(made: OwnWorld, *signed: Statement, after_ms: int = 0) -> list[object]:
    """What the neighbour is told when this node learns of something."""
    outcome = made.own.gossip.publish(signed, made.now_ms() + after_ms)
    return [messages.parse_untrusted(data) for _, data in outcome.send]


@pytest.mark.setting("membership.gossip_push")
@pytest.mark.parametrize(("push_bytes", "kind"), [(0, messages.Announce), (1 << 14, messages.Statements)])
def test_little_news_is_sent_whole_and_more_is_named(tmp_path: Path, push_bytes: int, kind: type) -> None:
    made = world(tmp_path, gossip_push=push_bytes)
    made.own.gossip.connected("x", made.now_ms(), dialed=False)
    (said,) = published(made, made.authority.enrol(peer_id_of("b"), Wish(name="b"), made.now_ms()))
    assert isinstance(said, kind)


@pytest.mark.setting("membership.gossip_request_timeout")
def test_what_was_asked_for_is_asked_for_elsewhere_in_time(tmp_path: Path) -> None:
    made = world(tmp_path, gossip_request_timeout=30.0)
    named = messages.encode(
        messages.Announce(entry(made.authority.enrol(peer_id_of("b"), Wish(name="b"), made.now_ms())))
    )
    for neighbour in "xyz":
        made.own.gossip.connected(neighbour, made.now_ms(), dialed=False)
    asked = [
        [to for to, _ in made.own.gossip.receive_untrusted(neighbour, named, made.now_ms() + after_ms).send]
        for neighbour, after_ms in (("x", 0), ("y", 29_000), ("z", 30_000))
    ]
    assert asked == [["x"], [], ["z"]]


@pytest.mark.setting("membership.presence_interval")
def test_where_a_member_is_is_pushed_on_that_often(tmp_path: Path) -> None:
    made = world(tmp_path, presence_interval=60.0)
    made.enrol("b")
    made.own.gossip.connected("x", made.now_ms(), dialed=False)
    told = [
        bool(published(made, made.presence("b", after_ms), after_ms=after_ms))
        for after_ms in (1000, 30_000, 62_000)
    ]
    assert told == [True, False, True]


# --- keeping and renewing


@pytest.mark.setting("membership.save_interval")
def test_the_directory_is_written_that_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def here(function: Callable[..., object], *arguments: object) -> object:
        return function(*arguments)  # a thread takes real time, which the made-up clock does not wait for

    async def main() -> None:
        made = OwnWorld(tmp_path, now_ms=trio_ms, save_interval=40.0)
        await made.enter()
        service, saves = service_of(made), []
        monkeypatch.setattr(trio.to_thread, "run_sync", here)
        monkeypatch.setattr(Store, "save_statements", lambda store, wires: saves.append(1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.saver.run)
            for second in range(100):
                service.saver.changed()
                await trio.sleep(1.0)
                assert second >= 39 or not saves
            assert 1 <= len(saves) <= 2
            nursery.cancel_scope.cancel()

    on_a_made_up_clock(main)


def service_of(made: OwnWorld) -> NetworkService:
    return NetworkService(
        made.own,
        made.common(),
        PeerRegistry(()),
        NobodyAnswers(),  # type: ignore[arg-type]
        made.founding(),
        tell=lambda message: None,
    )


@pytest.mark.setting("membership.renew_share")
@pytest.mark.parametrize(("share", "renewed"), [(0.9, True), (0.1, False)])
def test_a_membership_is_renewed_when_its_share_is_left(tmp_path: Path, share: float, renewed: bool) -> None:
    """Of its hundred seconds forty have passed. An authority renews its own."""

    async def main() -> None:
        made = OwnWorld(tmp_path, now_ms=trio_ms, record_lifetime=100.0, renew_share=share)
        await made.enter()
        service = service_of(made)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            await trio.sleep(40.0)
            nursery.cancel_scope.cancel()
        assert bool(made.counts["renewals"]) == renewed

    on_a_made_up_clock(main)


def test_waits_between_renewals_are_those_of_the_settings_in_force(tmp_path: Path) -> None:
    """A member whose authority is away: it asks seldom, and after a reload often."""

    async def main() -> None:
        made = OwnWorld(tmp_path / "a", now_ms=trio_ms, record_lifetime=10.0, clock_skew=0.0)
        await made.enter()
        made.enrol("b")
        made.merge(made.presence("me"))
        slow = msgspec.structs.replace(made.config, retry=Retry(initial_interval=600.0, max_interval=600.0))
        b = OwnNetwork(
            slow, made.own.network, Store(tmp_path / "b"), peer_id=peer_id_of("b"), node_name="b",
            identity=key_of("b"), root=None, dice=made.dice,
        )  # fmt: skip
        b.directory.merge(made.own.directory.statements(), trio_ms())
        host = NobodyAnswers()
        live = Live(slow)
        renewing = Renewing(b, made.common(live), publish=lambda _: None, learn=lambda _: None, relays=tuple)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(renewing.run, host)
            await trio.sleep(1000.0)
            before = len(host.asked)
            live.take(msgspec.structs.replace(slow, retry=Retry(initial_interval=1.0, max_interval=1.0)))
            await trio.sleep(1600.0)
            nursery.cancel_scope.cancel()
        assert 1 <= before <= 2
        assert len(host.asked) - before > 500

    on_a_made_up_clock(main)


@pytest.mark.setting("membership.join_timeout")
def test_joining_is_given_up_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        made = OwnWorld(tmp_path, now_ms=trio_ms, join_timeout=100.0)
        token = tokens.Token(
            network=bytes(tokens.HINT_BYTES),
            peer_id=peer_id_of("b"),
            addresses=("/ip4/192.0.2.1/tcp/4001",),
            secret=bytes(tokens.SECRET_BYTES),
        )
        begun_s = trio.current_time()
        with pytest.raises(RefusedError, match="could not be joined"):
            await made.founding().enter(NobodyAnswers(), tokens.encode(token))
        assert trio.current_time() - begun_s == pytest.approx(100.0, abs=0.1)

    on_a_made_up_clock(main)


# --- what is announced


@pytest.mark.setting("network.accept_routes", "network.exit_node")
@pytest.mark.parametrize(
    ("settings", "routes", "exit_peer"),
    [
        ({}, {"10.9.0.0/24"}, ""),
        ({"accept_routes": False}, set(), ""),
        ({"exit_node": "b"}, {"10.9.0.0/24", "0.0.0.0/0"}, "b"),
    ],
    ids=["networks behind members", "none of them", "the way out too"],
)
def test_what_members_announce_is_taken_as_the_settings_want(
    tmp_path: Path, settings: dict[str, Any], routes: set[str], exit_peer: str
) -> None:
    made = world(tmp_path, network=Network(**settings))
    made.enrol("b", routes=("10.9.0.0/24", "0.0.0.0/0"))
    service = service_of(made)
    service.enter()
    known = service._announced.known()
    assert set(known.routes) == routes
    assert known.exit_peer == (peer_id_of(exit_peer) if exit_peer else "")
