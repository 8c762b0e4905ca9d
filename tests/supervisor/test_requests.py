"""Commands on their way from the status socket to control: what is passed on, what is refused, what is added."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from supervisor import requests
from vpnd.config.live import Live
from vpnd.config.schema import Config, Status
from vpnd.errors import RefusedError, VpndError

TIMEOUT_S = 3.0
SETTINGS = Live(Config(status=Status(timeout=TIMEOUT_S)))


class Node:
    """What requests need of a node."""

    def __init__(self, answer: object, *, in_network: bool = True) -> None:
        self._answer = answer
        self.in_network = in_network
        self.asked: list[tuple[str, dict[str, Any], float]] = []
        self.has_left = False

    async def request(self, command: str, arguments: dict[str, Any], timeout_s: float) -> bytes:
        self.asked.append((command, arguments, timeout_s))
        if isinstance(self._answer, Exception):
            raise self._answer
        return json.dumps(self._answer).encode()

    def left(self) -> None:
        self.has_left = True


def ask(node: Node, request: dict[str, Any]) -> Any:
    async def main() -> Any:
        answer = await requests.handlers(node, SETTINGS)[request["command"]](request)
        await asyncio.sleep(0)
        return msgspec.json.decode(msgspec.json.encode(answer))

    return asyncio.run(main())


ASKED = [
    # (sentence, request, arguments passed on, patience)
    ("nothing but the command", {"command": "members"}, {}, TIMEOUT_S),
    ("its own arguments", {"command": "remove", "who": "b", "patience_s": 9}, {"who": "b"}, 9.0),
    ("nothing that is not its own", {"command": "remove", "who": "b", "ip": "x", "command2": 1}, {"who": "b"}, 3.0),
    ("what is absent as absent", {"command": "invite", "name": None, "uses": 2}, {"name": None, "uses": 2}, 3.0),
    ("a ping between controls", {"command": "ping", "who": "b", "count": 1}, {"who": "b", "count": 1}, 3.0),
    ("no patience without end", {"command": "members", "patience_s": 1e9}, {}, TIMEOUT_S),
    ("no patience that is none", {"command": "members", "patience_s": "long"}, {}, TIMEOUT_S),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "request_", "arguments", "patience_s"), ASKED, ids=[row[0] for row in ASKED]
)
def test_what_is_passed_on(what, request_, arguments, patience_s):
    node = Node([1])
    assert ask(node, request_) == {"answer": [1]}
    assert node.asked == [(request_["command"], arguments, patience_s)]


@pytest.mark.parametrize("value", ["x" * 5000, ["a"], {"a": 1}], ids=["long", "a list", "a table"])
def test_an_argument_is_a_short_word_or_a_number(value):
    node = Node({})
    with pytest.raises(VpndError, match="who: must be"):
        ask(node, {"command": "remove", "who": value})
    assert not node.asked


@pytest.mark.parametrize("command", sorted(requests.MEMBERSHIP))
def test_a_static_node_has_no_membership(command):
    node = Node({}, in_network=False)
    with pytest.raises(VpndError, match="in no network"):
        ask(node, {"command": command})
    assert not node.asked


@pytest.mark.parametrize("command", sorted(requests.LOOKUP))
def test_a_static_node_has_peers_to_look_for(command):
    node = Node({}, in_network=False)
    ask(node, {"command": command})
    assert node.asked[0][0] == command


def test_a_refusal_is_the_callers():
    node = Node(RefusedError("no"))
    with pytest.raises(RefusedError, match="no"):
        ask(node, {"command": "leave"})
    assert not node.has_left


def test_the_node_ends_when_it_has_left():
    node = Node({})
    ask(node, {"command": "leave"})
    assert node.has_left
