"""One child: how long it may take for what, and when it is started again."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from supervisor.children import Child, State
from supervisor.nursery import Nursery
from supervisor.pacing import Priorities
from vpnd.api import messages
from vpnd.config.live import Live
from vpnd.config.schema import Config, Process
from vpnd.errors import ChildError

SILENT = "tests.supervisor.silent_child"
START = messages.ControlStart(config=Config(), node_name="a", peer_id="A", virtual_ip="")


class Slot:
    """A child that is told to stop and does not listen."""

    title, role, module, more_time_s = "a child", "control", SILENT, 0.0

    def begin(self) -> tuple[messages.Message, tuple[int, ...]]:
        return START, (sys.stderr.fileno(),) * 2


class Raised(Priorities):
    """Whose priority was raised."""

    def __init__(self, live: Live) -> None:
        super().__init__(live)
        self.pids: list[int] = []

    def carries_packets(self, pid: int) -> None:
        self.pids.append(pid)


def with_child(settings: Process, body: Callable[[Child[Slot], Raised], Awaitable[None]]) -> None:
    """`body` with a child that is not started, and that no process is left of."""

    async def main() -> None:
        live = Live(Config(process=settings))
        raised = Raised(live)
        child = Child(
            Slot(),
            live,
            raised,
            Nursery(live),
            on_up=lambda child: None,
            on_down=lambda child: None,
            on_message=lambda child, message: None,
        )
        try:
            await body(child, raised)
        finally:
            child._kill()
            await child._gone.wait()

    asyncio.run(main())


def test_a_child_that_comes_back_carries_packets_from_its_start_on() -> None:
    async def body(child: Child[Slot], raised: Raised) -> None:
        child._spawn()
        assert raised.pids == [], "the first start is nobody's loss"
        child._cancel_timer()
        child.state = State.UP
        await child.stop()
        child.restarts = 1
        child._spawn()
        assert raised.pids == [child.pid]

    with_child(Process(stop_timeout=0.1), body)


@pytest.mark.setting("process.ready_timeout")
def test_a_child_that_does_not_get_ready_is_an_error_in_time() -> None:
    async def body(child: Child[Slot], _: Raised) -> None:
        async with asyncio.timeout(5.0):
            with pytest.raises(ChildError, match=r"was not ready after 0\.5 s"):
                await child.start()
        assert child.pid == 0

    with_child(Process(ready_timeout=0.5), body)


@pytest.mark.setting("process.stop_timeout", "process.drain_timeout")
@pytest.mark.parametrize(
    ("settings", "drain", "most_s"),
    [
        (Process(stop_timeout=0.1, drain_timeout=30.0), False, 1.0),
        (Process(stop_timeout=0.1, drain_timeout=0.1), True, 1.0),
    ],
    ids=["stopped", "scaled away"],
)
def test_a_child_that_does_not_stop_is_killed_in_time(settings: Process, drain: bool, most_s: float) -> None:
    async def body(child: Child[Slot], _: Raised) -> None:
        child._spawn()
        child._cancel_timer()
        child.state = State.UP
        async with asyncio.timeout(most_s):
            await child.stop(drain)
        assert child.pid == 0

    with_child(settings, body)


class Waits:
    """The loop of a child that dies again and again: a clock of the test's, and the waits it asks for."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.asked: list[float] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Any:
        self.asked.append(delay_s)
        return None


def waits(settings: Process, lives_s: list[float]) -> list[float]:
    """How long it is waited before each start of a child that lives so long each time."""
    loop = Waits()

    async def body(child: Child[Slot], _: Raised) -> None:
        own, child._loop = child._loop, loop  # type: ignore[assignment]
        for life_s in lives_s:
            child._started_s = loop.now_s
            loop.now_s += life_s
            child._restart_later("it died")
        child._loop = own

    with_child(settings, body)
    return loop.asked


SETTLED = 8.0
RESTARTS = [
    (
        "longer and longer",
        Process(restart_initial=0.5, restart_max=9.0),
        [0.0] * 5,
        [0.5, 1.0, 2.0, 4.0, 8.0],
    ),
    (
        "but not longer than that",
        Process(restart_initial=0.5, restart_max=1.5),
        [0.0] * 4,
        [0.5, 1.0, 1.5, 1.5],
    ),
    (
        "one that lived long enough begins anew",
        Process(restart_initial=0.5, restart_settle=SETTLED),
        [0.0, 0.0, SETTLED, 0.0],
        [0.5, 1.0, 0.5, 1.0],
    ),
    (
        "one that did not does not",
        Process(restart_initial=0.5, restart_settle=SETTLED),
        [0.0, 0.0, SETTLED - 1, 0.0],
        [0.5, 1.0, 2.0, 4.0],
    ),
]


@pytest.mark.setting("process.restart_initial", "process.restart_max", "process.restart_settle")
@pytest.mark.parametrize(
    ("sentence", "settings", "lives_s", "expected"), RESTARTS, ids=[row[0] for row in RESTARTS]
)
def test_a_dead_child_is_started_again(sentence, settings, lives_s, expected) -> None:
    assert waits(settings, lives_s) == expected
