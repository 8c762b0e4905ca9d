"""Trying many ports: when, how many at once, and how many a second."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing

from vpnd.adapter import birthday
from vpnd.config.live import Live
from vpnd.config.schema import Config, Nat
from vpnd.control.common import Common
from vpnd.control.traversal import Traversal
from vpnd.endpoint import Endpoint, parse
from vpnd.nat import messages
from vpnd.nat.messages import KEPT, MOVED, RANDOM, UNKNOWN, Met

HERE, PEER = parse("10.1.0.2:40001"), parse("203.0.113.2:33949")


class Leg:
    """What is left of one after Met."""

    places = (HERE,)

    def __init__(self, mapping: str, also: bool) -> None:
        self.met = Met(str(HERE), str(PEER), mapping=mapping, birthday=also)


class World:
    """Connects nowhere, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[Endpoint, Endpoint]] = []
        self.open = self.most = 0
        monkeypatch.setattr(birthday, "reserve", lambda local, segment: local)
        monkeypatch.setattr(birthday, "connected", self.connected)

    async def connected(self, local: Any, target: Endpoint) -> Any:
        self.begun.append((local, target))
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await trio.sleep_forever()
        finally:
            self.open -= 1


def chance(ours: str, theirs: str, *, also: bool = True, **nat: Any) -> Any:
    live = Live(Config(nat=Nat(**nat)))
    common = Common(live, lambda name: None, None, trio.current_time, dice=random.Random(1))  # type: ignore[arg-type]
    traversal = Traversal("a", common, None, None, None, without=tuple)  # type: ignore[arg-type]
    traversal.mapping = ours
    return traversal._chance(Leg(theirs, also), PEER)  # type: ignore[arg-type]


@pytest.mark.setting("nat.birthday")
def test_it_is_tried_where_both_want_it_and_just_one_nat_is_symmetric() -> None:
    for ours in (KEPT, MOVED, messages.NONE):
        assert chance(ours, RANDOM, birthday=True) and chance(RANDOM, ours, birthday=True)
        assert chance(ours, KEPT, birthday=True) is None
    assert chance(RANDOM, RANDOM, birthday=True) is None and chance(UNKNOWN, RANDOM, birthday=True) is None
    assert chance(RANDOM, KEPT, birthday=True, also=False) is None and chance(RANDOM, KEPT) is None


@pytest.mark.setting("nat.birthday_ports", "nat.birthday_rate")
@pytest.mark.parametrize("ours", [RANDOM, KEPT])
def test_so_many_ports_at_once_and_so_many_a_second(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    async def main() -> None:
        by_chance = chance(
            ours, KEPT if ours == RANDOM else RANDOM, birthday=True, birthday_ports=30, birthday_rate=100
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(by_chance, None)
            await trio.sleep(0.205)
            assert len(world.begun) == 20
            await trio.sleep(2.0)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert world.most == 30 and world.open == 0
    if ours == RANDOM:  # from fresh ports to the one place
        assert set(world.begun) == {(Endpoint(HERE.ip, 0), PEER)} and len(world.begun) == 30
    else:  # from the leg's port to ports of that address, none twice
        assert {local for local, _ in world.begun} == {HERE}
        targets = {target for _, target in world.begun}
        assert {target.ip for target in targets} == {PEER.ip} and len(targets) == len(world.begun) == 220
