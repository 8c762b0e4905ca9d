"""What a peer is told that asks why its packets do not arrive."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import trio
import trio.testing

from vpnd import why
from vpnd.adapter.framing import read_message_untrusted, write_message
from vpnd.api.messages import WalkTold, WalkWanted
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.control.common import Common
from vpnd.control.explaining import Explaining
from vpnd.logs import Seldom


class End:
    """One end of a connection within the test, as libp2p reads and writes it."""

    def __init__(self, stream: trio.StapledStream[Any, Any]) -> None:
        self.write = stream.send_all
        self.read: Callable[[int], Any] = stream.receive_some


async def asked(explaining: Explaining, peer_id: str) -> why.Told:
    """What a peer of this id is told."""
    ours, theirs = map(End, trio.testing.memory_stream_pair())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(explaining.serve_untrusted, theirs, peer_id)
        for message in (b"", bytes(why.LARGE), msgspec.json.encode(why.Question(address="10.86.0.1"))):
            await write_message(ours, message)
            said = await read_message_untrusted(ours, why.MAX_MESSAGE)
    return why.said_untrusted(said, why.Told)


def test_one_is_answered_at_a_time_and_others_are_told_so() -> None:
    wanted: list[Any] = []
    told: dict[str, why.Told] = {}

    async def ask(explaining: Explaining, peer_id: str) -> None:
        told[peer_id] = await asked(explaining, peer_id)

    async def main() -> None:
        live = Live(Config())
        seldom = Seldom(logging.getLogger(), live, trio.current_time)
        common = Common(live, lambda name: None, seldom, trio.current_time)
        explaining = Explaining(common, None, None, None, wanted.append)  # type: ignore[arg-type]
        for serial, (first, second) in enumerate((("a", "b"), ("c", "d")), 1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, explaining, first)
                await trio.testing.wait_all_tasks_blocked()
                await ask(explaining, second)
                explaining.told(WalkTold(serial=serial, content=msgspec.json.encode(why.Told(cause="route"))))

    trio.run(main)
    assert wanted == [
        WalkWanted(serial=serial, peer_id=peer_id, address="10.86.0.1")
        for serial, peer_id in enumerate(("a", "c"), 1)
    ]
    assert {peer_id: (each.busy, each.cause) for peer_id, each in told.items()} == {
        "a": (False, "route"), "b": (True, ""), "c": (False, "route"), "d": (True, ""),
    }  # fmt: skip
