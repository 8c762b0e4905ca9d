"""Dials on a made-up clock: how many at once, and how addresses are tried beside each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from planner_node import Node, member, settings

from vpnd.config.live import Live
from vpnd.config.schema import P2P, Config
from vpnd.control.dialer import Dialer


class SilentHost:
    """Nobody answers; who was dialed when is kept."""

    def __init__(self) -> None:
        self.begun: list[tuple[float, str]] = []
        self.begun_s = trio.current_time()

    async def dial(self, address: str, peer_id: str) -> Any:
        self.begun.append((round(trio.current_time() - self.begun_s, 3), address))
        await trio.sleep_forever()


class Taker:
    """Takes whatever session there is."""

    def keeps_up(self, shard: int) -> bool:
        return True

    def dialed(self, session: Any, shard: int) -> bool:
        return True

    def announce(self) -> None:
        """Nobody listens."""


def with_p2p(**p2p: Any) -> Config:
    return msgspec.structs.replace(settings(), p2p=P2P(**p2p))


def played(config: Config, node: Node, then: Callable[[Live, SilentHost], Any]) -> None:
    """A dialer of `node` that has run for ten seconds; then what the test does."""

    async def main() -> None:
        live = Live(config)
        host, begun_s = SilentHost(), trio.current_time()
        dialer = Dialer(
            node.planner,
            live,
            count=lambda name: None,
            now_s=lambda: trio.current_time() - begun_s,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialer.run, host, Taker())
            await trio.sleep(10.0)
            await then(live, host)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.setting("p2p.max_dials")
def test_so_many_dials_are_under_way_and_other_settings_hold_at_once() -> None:
    config = with_p2p(max_dials=2)
    node = Node("a", *(member(f"m{number}") for number in range(5)), config=config)
    node.planner.shard_ready(0, 0.0)

    async def then(live: Live, host: SilentHost) -> None:
        assert len(host.begun) == 2
        live.take(with_p2p(max_dials=4))
        await trio.sleep(1.0)
        assert len(host.begun) == 4

    played(config, node, then)


@pytest.mark.setting("p2p.address_stagger")
@pytest.mark.parametrize("stagger_s", [0.5, 2.0])
def test_the_next_address_is_tried_when_the_one_before_had_its_head_start(stagger_s: float) -> None:
    config = with_p2p(address_stagger=stagger_s)
    addresses = tuple(f"/ip4/192.0.2.{number}/tcp/4001" for number in (1, 2, 3))
    node = Node("a", member("m", addresses=addresses), config=config)
    node.planner.shard_ready(0, 0.0)

    async def then(live: Live, host: SilentHost) -> None:
        assert host.begun == [(place * stagger_s, address) for place, address in enumerate(addresses)]

    played(config, node, then)
