"""How many neighbours a node keeps, for how long, and how much may wait for one: settings of [membership]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from own_world import NobodyAnswers, OwnWorld, on_a_made_up_clock, trio_ms

from vpnd.config.live import Live
from vpnd.config.schema import Retry
from vpnd.control.gossiping import Gossiping


class Stream:
    """Nothing comes, and nothing that is written goes out."""

    async def read(self, most: int = -1) -> bytes:
        await trio.sleep_forever()
        return b""

    async def write(self, data: bytes) -> None:
        await trio.sleep_forever()

    async def reset(self) -> None:
        """Gone."""


class SilentHost(NobodyAnswers):
    """Whoever is dialed takes the stream."""

    async def open_stream(self, addresses: object, peer_id: str, protocol: str) -> Any:
        self.dialed.append((trio.current_time(), peer_id))
        return Stream()


def gossiping(made: OwnWorld, live: Live | None = None) -> Gossiping:
    return Gossiping(
        made.own,
        made.common(live),
        act=lambda outcome: None,
        not_admitted=lambda: None,
    )


def gossips_for(path: Path, seconds: float, **settings: Any) -> tuple[SilentHost, OwnWorld]:
    """Beside ten members who listen and say nothing, for so long."""
    made, host = OwnWorld(path, now_ms=trio_ms, **settings), SilentHost()

    async def main() -> None:
        await made.enter()
        for number in range(10):
            made.enrol(f"m{number}")
        neighbours = gossiping(made)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbours.run, host)
            await trio.sleep(seconds)
            made.counts["neighbours"] = len(neighbours.neighbours())
            for neighbour in neighbours.neighbours():
                neighbours.send([(neighbour, bytes(100_000))] * 3)
            nursery.cancel_scope.cancel()

    on_a_made_up_clock(main)
    return host, made


def test_who_could_not_be_dialed_is_tried_again_when_the_waits_are_others(tmp_path: Path) -> None:
    async def main() -> None:
        made, host = OwnWorld(tmp_path, now_ms=trio_ms), NobodyAnswers()
        await made.enter()
        made.enrol("b")
        made.config = msgspec.structs.replace(
            made.config, retry=Retry(initial_interval=1e6, max_interval=1e6)
        )
        live = Live(made.config)
        neighbours = gossiping(made, live)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbours.run, host)
            await trio.sleep(100.0)
            before = len(host.dialed)
            live.take(
                msgspec.structs.replace(made.config, retry=Retry(initial_interval=1.0, max_interval=1.0))
            )
            await trio.sleep(100.0)
            nursery.cancel_scope.cancel()
        assert before == 1 and len(host.dialed) > 50

    on_a_made_up_clock(main)


@pytest.mark.setting("membership.neighbours")
@pytest.mark.parametrize("neighbours", [3, 5])
def test_so_many_neighbours_are_kept(tmp_path: Path, neighbours: int) -> None:
    _, made = gossips_for(tmp_path, 1.0, neighbours=neighbours)
    assert made.counts["neighbours"] == neighbours


@pytest.mark.setting("membership.neighbour_rotation")
def test_one_neighbour_is_exchanged_that_often(tmp_path: Path) -> None:
    host, made = gossips_for(tmp_path, 35.0, neighbours=2, neighbour_rotation=10.0)
    assert made.counts["neighbours"] == 2 and len(host.dialed) == 2 + 3


@pytest.mark.setting("membership.gossip_queue")
@pytest.mark.parametrize(("queue_bytes", "dropped"), [(1 << 17, 2), (1 << 18, 1), (1 << 23, 0)])
def test_so_much_waits_for_a_neighbour_that_does_not_read(
    tmp_path: Path, queue_bytes: int, dropped: int
) -> None:
    _, made = gossips_for(tmp_path, 1.0, neighbours=1, gossip_queue=queue_bytes)
    assert made.counts["gossip_dropped"] == dropped
