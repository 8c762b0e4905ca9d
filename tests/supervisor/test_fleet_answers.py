"""What children answer, put together where it comes in parts."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

from supervisor import requests
from supervisor.children import State
from supervisor.fleet import Fleet
from supervisor.statusd import StatusServer
from supervisor.traffic import Traffic
from vpnd import statusclient
from vpnd.api import messages, parts
from vpnd.api.reports import PeerTraffic


def test_an_answer_in_parts_is_one_answer() -> None:
    rows = tuple(PeerTraffic(peer_id=f"{number:052}", bytes_sent=number) for number in range(10_000))
    status = messages.ShardStatus(serial=5, sessions=(), traffic=rows)
    said = parts.split(status)
    assert len(said) > 1

    async def main() -> Any:
        fleet = Fleet.__new__(Fleet)  # without any process
        answer = asyncio.get_running_loop().create_future()
        fleet._answers, fleet._parts = {("shard 0", 5): answer}, {}
        for part in said:
            assert not answer.done()
            fleet._on_answer("shard 0", part)
            fleet._on_answer("shard 1", part)  # nobody asked that one
        assert fleet._parts.keys() == {("shard 0", 5)}
        return await answer

    assert asyncio.run(main()) == status
    traffic = Traffic()
    for part in said:
        traffic.told(part.traffic)
    assert traffic.of(f"{7:052}")["bytes_sent"] == 7


class Control:
    """Answers every request of its fleet with the members, in parts, as the process would."""

    title = "control"
    state = State.UP

    def __init__(self, fleet: Fleet, rows: list[dict[str, Any]]) -> None:
        self._fleet, self._rows = fleet, rows

    def send(self, message: messages.Message) -> None:
        assert isinstance(message, messages.Request)
        said = parts.split(messages.Answer(serial=message.serial, result=json.dumps(self._rows).encode()))
        assert len(said) > 10
        for part in said:
            self._fleet._on_answer(self.title, part)


class Node:
    """What requests need of a node, of a fleet without any process."""

    in_network = True

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._fleet = Fleet.__new__(Fleet)
        self._fleet._loop = asyncio.get_running_loop()
        self._fleet._answers, self._fleet._parts, self._fleet._serials = {}, {}, itertools.count(1)
        self._fleet.control = Control(self._fleet, rows)
        self.request = self._fleet.request


def test_ten_thousand_members_reach_the_command(tmp_path: Path) -> None:
    rows = [
        {"name": f"member-{number}", "peer_id": f"12D3KooW{number:044}", "addresses": ["10.86.1.1", "fd00::1"],
         "routes": [], "groups": [], "state": "member", "expires_s": 2.5e6, "connected": False, "authority": False}
        for number in range(10_000)
    ]  # fmt: skip

    async def main() -> Any:
        server = StatusServer(str(tmp_path / "s"), 10.0, requests.handlers(Node(rows), 10.0))
        await server.start()
        try:
            return await asyncio.to_thread(statusclient.ask, tmp_path / "s", {"command": "members"}, 10.0)
        finally:
            await server.stop()

    assert asyncio.run(main()) == {"answer": rows}
