"""What the settings of [discovery] change, in the part of one node; the table is on real hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from control_nodes import eventually
from own_world import OwnWorld, on_a_made_up_clock, peer_id_of, trio_ms
from test_dht import Table, tables
from test_discovering import Local

from vpnd.adapter.dht import DhtError
from vpnd.adapter.mdns import LocalNetwork
from vpnd.config.schema import Discovery
from vpnd.control import discovering as module
from vpnd.control.discovering import Discovering
from vpnd.discovery.lookup import Found
from vpnd.discovery.records import RecordRules, dht_key
from vpnd.discovery.registry import PeerRegistry
from vpnd.membership.authority import Wish
from vpnd.membership.refusal import MembershipRefused

Body = Callable[[Discovering, OwnWorld], Any]


def discovering(made: OwnWorld, unreachable: tuple[str, ...] = ()) -> Discovering:
    return Discovering(
        SimpleNamespace(own=made.own, seen=None, learn=None, watch_own=lambda changed: None),  # type: ignore[arg-type]
        made.common(),
        PeerRegistry(()),
        unreachable=lambda: unreachable,
    )


def with_discovering(
    path: Path, body: Body, *, unreachable: tuple[str, ...] = (), skew_s: float = 300.0, **settings: Any
) -> None:
    """`body` on a made-up clock."""

    async def main() -> None:
        made = OwnWorld(path, now_ms=trio_ms, discovery=Discovery(**settings), clock_skew=skew_s)
        await made.enter()
        await body(discovering(made, unreachable), made)

    on_a_made_up_clock(main)


class Part:
    """Stands for the table, or for the local network: that it runs is all that counts."""

    def __init__(self, begun: list[str], name: str) -> None:
        self._begun, self._name = begun, name

    async def run(self) -> None:
        self._begun.append(self._name)


@pytest.mark.setting("discovery.dht", "discovery.mdns")
@pytest.mark.parametrize(
    ("settings", "parts"), [({"dht": False}, ["mdns"]), ({"mdns": False}, ["dht"]), ({}, ["dht", "mdns"])]
)
def test_a_part_that_is_switched_off_does_not_run(
    tmp_path: Path, settings: dict[str, bool], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(Discovering, "_make_dht", lambda self, host: Part(begun, "dht"))
    monkeypatch.setattr(Discovering, "_make_local", lambda self, host: Part(begun, "mdns"))

    async def body(node: Discovering, made: OwnWorld) -> None:
        with trio.move_on_after(1.0):
            await node.run(None)

    with_discovering(tmp_path, body, **settings)
    assert sorted(begun) == parts


@pytest.mark.setting(
    "discovery.cache_lifetime", "discovery.negative_cache_lifetime", "discovery.cache_entries"
)
def test_answers_are_remembered_as_long_and_as_many_as_set(tmp_path: Path) -> None:
    async def body(node: Discovering, made: OwnWorld) -> None:
        for place, value in enumerate((Found(addresses=(), age_s=0.0), None)):
            node.cache.put(str(place), value, 0.0)
        assert node.cache.get("1", 9.9) and not node.cache.get("1", 10.0)
        assert node.cache.get("0", 199.9) and not node.cache.get("0", 200.0)
        for number in range(5):
            node.cache.put(str(number), None, 0.0)
        assert len(node.cache) == 3

    with_discovering(tmp_path, body, cache_lifetime=200.0, negative_cache_lifetime=10.0, cache_entries=3)


@pytest.mark.setting("discovery.dht_search_interval", "discovery.dht_searches")
def test_so_many_are_looked_for_in_each_interval(tmp_path: Path) -> None:
    async def body(node: Discovering, made: OwnWorld) -> None:
        begun_s, looked_for = trio.current_time(), []

        async def whereabouts(peer_id: str) -> None:
            looked_for.append((round(trio.current_time() - begun_s), peer_id))

        node.lookup.whereabouts = whereabouts  # type: ignore[assignment, method-assign]
        with trio.move_on_after(70.0):
            await node._search_on()
        assert [at_s for at_s, _ in looked_for] == [30, 30, 60], "two, and then who had no turn yet"
        assert {peer_id for _, peer_id in looked_for} == {"x", "y", "z"}

    with_discovering(tmp_path, body, unreachable=("x", "y", "z"), dht_search_interval=30.0, dht_searches=2)


@pytest.mark.setting("discovery.dht_record_lifetime", "membership.clock_skew")
@pytest.mark.parametrize(
    ("lifetime_s", "skew_s", "age_s", "good"),
    [
        (7200.0, 300.0, 7000.0, True),
        (60.0, 300.0, 500.0, False),
        (60.0, 1000.0, -900.0, True),
        (60.0, 10.0, -100.0, False),
    ],
    ids=["young enough", "too old", "of a clock that is ahead", "too far ahead"],
)
def test_records_are_believed_for_their_lifetime(
    tmp_path: Path,
    lifetime_s: float,
    skew_s: float,
    age_s: float,
    good: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[RecordRules] = []
    monkeypatch.setattr(module, "MembersDht", lambda host, rules, settings, **_: kept.append(rules))

    async def body(node: Discovering, made: OwnWorld) -> None:
        made.merge(made.authority.enrol(peer_id_of("b"), Wish(name="b"), trio_ms()))
        node._make_dht(None)
        record = made.presence("b", round(-age_s * 1000)).wire
        try:
            kept[0].check_untrusted(dht_key(peer_id_of("b")), record, trio_ms())
        except MembershipRefused:
            assert not good
        else:
            assert good

    with_discovering(tmp_path, body, skew_s=skew_s, dht_record_lifetime=lifetime_s)


@pytest.mark.setting("discovery.mdns_interval")
def test_it_is_said_on_the_local_network_that_often(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[float] = []

    async def main() -> None:
        begun_s = trio.current_time()
        monkeypatch.setattr(
            LocalNetwork, "_say_everywhere", lambda *_: said.append(trio.current_time() - begun_s)
        )
        with trio.move_on_after(2000.0):
            await Local(mdns_interval=600.0)._speak([None])  # type: ignore[list-item]

    on_a_made_up_clock(main)
    assert len(said) == 2 + 3 and said[2] == pytest.approx(600.0, abs=5.0)


# --- the table


@pytest.mark.setting("discovery.dht_publish_interval")
def test_our_record_is_published_anew_that_often() -> None:
    async def main() -> None:
        async with tables(2, dht_publish_interval=0.1) as (a, _):
            await eventually(lambda: a.counts["dht_published"] >= 4)

    trio.run(main)


@pytest.mark.setting("discovery.dht_timeout")
def test_a_look_up_is_given_up_in_time() -> None:
    async def main() -> None:
        async with tables(2, dht_timeout=0.3) as (a, silent):
            handlers = silent.node.host.libp2p.get_mux().handlers

            async def never(stream: Any) -> None:
                await trio.sleep_forever()

            for protocol in [each for each in handlers if "kad" in str(each)]:
                handlers[protocol] = never
            a.dht._dht.value_store.store.clear()
            begun_s = trio.current_time()
            try:
                assert await a.dht.find(silent.peer_id) is None
            except DhtError as error:
                assert "0.3 s" in str(error)
            assert trio.current_time() - begun_s < 1.0

    trio.run(main)


@pytest.mark.setting("discovery.dht_backlog")
def test_so_many_that_connected_wait_to_be_taken_into_the_table() -> None:
    async def main() -> None:
        table = Table({}, dht_backlog=3)
        for _ in range(5):
            table.dht._on_connected(table.node.id)
        assert table.dht._connecting.statistics().current_buffer_used == 3

    trio.run(main)
