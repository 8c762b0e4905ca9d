"""The command `probe`: the shard of the flow is asked, and what it says, or does not, becomes JSON."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any

import pytest

from supervisor import requests
from supervisor.pump import FlowTable
from vpnd.api.messages import ProbeAnswer
from vpnd.api.reports import SessionProbe
from vpnd.errors import ConfigError
from vpnd.packet import flow

TIMEOUT_S = 3.0
SESSION = SessionProbe(
    peer_id="B", session_id=0x3FA2, local="192.0.2.1:41234", remote="192.0.2.2:4001", rtt_ms=0.5
)
ROW = {"id": "3fa2", "peer_id": "B", "local": "192.0.2.1:41234", "remote": "192.0.2.2:4001", "rtt_ms": 0.5}


class Shards:
    """What `measure` needs of fleet and pump: so many shards, each with the same answer."""

    def __init__(self, count: int, answer: ProbeAnswer | None) -> None:
        self._up, self._answer = list(range(count)), answer
        self.questions, self.shards = self, range(count)
        self.flows = FlowTable(64)
        self.asked: list[tuple[int, str, float]] = []

    def shard_of(self, key: int) -> int:
        return self.flows.look(key, self._up) if self._up else -1

    async def probe(self, shard: int, destination: str, timeout_s: float) -> ProbeAnswer | None:
        self.asked.append((shard, destination, timeout_s))
        return self._answer


def measure(shards: Shards, request: dict[str, Any]) -> dict[str, Any]:
    return asyncio.run(requests.probe(request, shards, shards, TIMEOUT_S))  # type: ignore[arg-type]


ANSWERS = [
    ("a session", ProbeAnswer(serial=1, session=SESSION), ROW, ""),
    ("none", ProbeAnswer(serial=1, why="packets wait for one"), None, "packets wait for one"),
    ("a shard that hangs", None, None, "shard {} does not answer"),
]


@pytest.mark.parametrize("address", ["10.86.0.2", "fd00::2"])
@pytest.mark.parametrize(("sentence", "answer", "row", "why"), ANSWERS, ids=[row[0] for row in ANSWERS])
def test_the_shard_of_the_flow_is_asked(sentence, answer, row, why, address):
    shards = Shards(4, answer)
    index = flow.shard_of(flow.echo_key(ipaddress.ip_address(address)), range(4))
    told = measure(shards, {"command": "probe", "address": address})
    assert told == {"shard": index, "session": row, "why": why.format(index)}
    assert shards.asked == [(index, address, TIMEOUT_S)]


def test_without_a_shard_nobody_is_asked():
    shards = Shards(0, None)
    assert measure(shards, {"address": "10.86.0.2"}) == {
        "shard": None, "session": None, "why": "no shard is up"
    }  # fmt: skip
    assert not shards.asked


@pytest.mark.parametrize("request_", [{}, {"address": "b"}, {"address": 7}, {"address": ["10.86.0.2"]}])
def test_only_an_address_has_a_way(request_):
    with pytest.raises(ConfigError, match="address"):
        measure(Shards(1, None), request_)
