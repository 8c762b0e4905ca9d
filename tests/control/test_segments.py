"""When large segments are doubted, tried and trusted again. Time, dials and shards are the test's."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from planner_node import member, settings

from vpnd.adapter.dial import DialError
from vpnd.adapter.handoff import Detached
from vpnd.config.live import Live
from vpnd.config.schema import Session
from vpnd.control.segments import Segments
from vpnd.discovery.registry import Member


class World:
    """A peer "m", reachable or not, a way on which large segments survive or not, and shards that tell after 0.1 s."""

    def __init__(self, segments: Segments) -> None:
        self.segments = segments
        self.there, self.passes, self.shards = True, False, [0]
        self.begun_s = trio.current_time()
        self.tried: list[tuple[float, int]] = []
        self.nursery: Any = None

    async def dial(self, address: str, peer_id: str, *, small: bool) -> Detached:
        assert not small
        if not self.there:
            raise DialError("nobody is there")
        return Detached(None, os.open("/dev/null", os.O_RDONLY))  # type: ignore[arg-type]

    def dialed(self, detached: Detached, shard: int) -> int:
        self.tried.append((round(trio.current_time() - self.begun_s, 1), shard))
        self.nursery.start_soon(self._tell, len(self.tried))
        return len(self.tried)

    async def _tell(self, session_id: int) -> None:
        await trio.sleep(0.1)
        assert not self.segments.over(session_id + 100, up=True)
        assert self.segments.over(session_id, up=self.passes)
        assert not self.segments.over(session_id, up=False)

    def dialed_directly(self, peer_id: str, since_s: float) -> tuple[Member | None, list[int]]:
        return member("m"), self.shards


def played(then: Callable[[World], Awaitable[None]], **session: float) -> None:
    """A doubt about the peer, then what the test does."""
    config = msgspec.structs.replace(settings(), session=Session(**session))  # type: ignore[arg-type]

    async def main() -> None:
        segments = Segments(Live(config), trio.current_time)
        world = World(segments)
        async with trio.open_nursery() as world.nursery:
            world.nursery.start_soon(segments.run, world, world)
            segments.stuck("m", "m")
            await then(world)
            world.nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.setting("session.segment_trial", "session.segment_trial_max")
@pytest.mark.parametrize(
    ("first_s", "most_s", "tried_s"),
    [(1.0, 3600.0, [1.0, 3.1, 7.2, 15.3]), (2.0, 5.0, [2.0, 6.1, 11.2, 16.3])],
)
def test_large_segments_are_tried_less_and_less_often(
    first_s: float, most_s: float, tried_s: list[float]
) -> None:
    async def then(world: World) -> None:
        await trio.sleep(18.0)
        assert world.tried == [(at_s, 0) for at_s in tried_s]
        assert world.segments.small("m")

    played(then, segment_trial=first_s, segment_trial_max=most_s)


def test_an_outage_is_not_taken_for_large_segments_that_do_not_arrive() -> None:
    """A dial that fails is no sign either way, and the wait does not double."""

    async def then(world: World) -> None:
        world.there, world.passes = False, True
        await trio.sleep(5.0)
        assert world.segments.small("m") and not world.tried
        world.there = True
        await trio.sleep(1.2)
        assert len(world.tried) == 1 and not world.segments.small("m")

    played(then)


def test_large_segments_have_to_pass_for_every_shard() -> None:
    async def then(world: World) -> None:
        world.passes, world.shards = True, [0, 1]
        await trio.sleep(2.0)
        assert world.tried == [(1.0, 0), (1.1, 1)]
        assert not world.segments.small("m")

    played(then)


def test_where_nothing_was_dialed_there_is_nothing_to_try() -> None:
    async def then(world: World) -> None:
        world.shards = []
        await trio.sleep(10.0)
        assert world.segments.small("m") and not world.tried
        world.segments.network_changed()
        assert not world.segments.small("m")
        await trio.sleep(10.0)
        assert not world.tried

    played(then)
