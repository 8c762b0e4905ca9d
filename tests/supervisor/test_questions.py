"""What children answer, put together where it comes in parts."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from supervisor import requests
from supervisor.children import State
from supervisor.questions import Argument, Questions
from supervisor.slots import Traffic
from supervisor.statusd import StatusServer
from vpnd import statusclient
from vpnd.api import messages, parts
from vpnd.api.reports import PeerTraffic
from vpnd.config.live import Live
from vpnd.config.schema import Config, Status
from vpnd.errors import ProtocolViolation


class Child:
    """Answers a question with `answer`, in parts, as its process would; another child says the same unasked."""

    title, state, works = "control", State.UP, True

    def __init__(self, questions: Questions, answer: Any) -> None:
        self._questions, self._answer = questions, answer

    def send(self, message: messages.Message) -> None:
        serial = message.serial  # type: ignore[attr-defined]
        said = parts.split(msgspec.structs.replace(self._answer, serial=serial))
        assert len(said) > 1
        for part in said:
            self._questions.heard(self, part)
            self._questions.heard(Child(self._questions, None), part)


def test_an_answer_in_parts_is_one_answer() -> None:
    rows = tuple(PeerTraffic(peer_id=f"{number:052}", bytes_sent=number) for number in range(10_000))
    status = messages.ShardStatus(serial=0, sessions=(), traffic=rows)

    async def main() -> Any:
        questions = Questions()
        return await questions.ask(Child(questions, status), 5.0)

    assert asyncio.run(main()) == msgspec.structs.replace(status, serial=1)
    traffic = Traffic()
    for part in parts.split(status):
        traffic.told(part.traffic)
    assert traffic.of(f"{7:052}")[0] == 7


def test_an_answer_without_an_end_or_a_question_is_no_answer() -> None:
    part = messages.ShardStatus(serial=1, sessions=(), traffic=(), more=True)

    class Endless(Child):
        def send(self, message: messages.Message) -> None:
            while True:
                self._questions.heard(self, part)

    async def main() -> None:
        questions = Questions()
        with pytest.raises(ProtocolViolation, match="never asked"):
            questions.heard(Child(questions, None), part)
        with pytest.raises(ProtocolViolation, match="more than 512 parts"):
            await questions.ask(Endless(questions, None), 5.0)

    asyncio.run(main())


class Node:
    """What requests need of a node, without any process."""

    in_network = True

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._questions = Questions()
        self._control = Child(self._questions, messages.Answer(serial=0, result=json.dumps(rows).encode()))

    async def request(self, command: str, arguments: dict[str, Argument], timeout_s: float) -> bytes:
        return await self._questions.request(self._control, command, arguments, timeout_s)

    def left(self) -> None:
        raise AssertionError("nobody left")


def test_ten_thousand_members_reach_the_command(tmp_path: Path) -> None:
    rows = [
        {"name": f"member-{number}", "peer_id": f"12D3KooW{number:044}", "addresses": ["10.86.1.1", "fd00::1"],
         "routes": [], "groups": [], "state": "member", "expires_s": 2.5e6, "connected": False, "authority": False}
        for number in range(10_000)
    ]  # fmt: skip

    async def main() -> Any:
        live = Live(Config(status=Status(timeout=10.0)))
        server = StatusServer(str(tmp_path / "s"), live, requests.handlers(Node(rows), live))
        await server.start()
        try:
            return await asyncio.to_thread(statusclient.ask, tmp_path / "s", {"command": "members"}, 10.0)
        finally:
            await server.stop()

    assert asyncio.run(main()) == {"answer": rows}
