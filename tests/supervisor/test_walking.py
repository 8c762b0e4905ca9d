"""`vpnd why` in the supervisor: what is asked, of whom, for how long."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from supervisor.walking import Walking
from vpnd.api.messages import WalkWanted
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.config.schema import Status as Settings
from vpnd.errors import ConfigError, VpndError
from vpnd.status import NetworkPart, NodePart, Peer, Status
from vpnd.why import LOSES, UNKNOWN, Asked, Told, Walk

PEER = Peer(name="b", peer_id="B", virtual_ip="127.0.0.1", virtual_ips=("127.0.0.1",), state="connected")


class Node:
    """A node without a shard, whose control is away: nobody but status tells anything."""

    def __init__(self, *drops: dict[str, int], interval_s: float = 0.1) -> None:
        self.drops = list(drops) or [{}]
        self.patience_s: list[float] = []
        self.sent: list[Any] = []
        self.control = SimpleNamespace(pid=7, send=self.sent.append)
        self.questions = SimpleNamespace(request=self.request)
        self.live = Live(Config(status=Settings(why_interval=interval_s)))
        self.fleet: Any = SimpleNamespace(control=self.control, questions=self.questions)
        self.pump: Any = SimpleNamespace(shard_of=lambda key: -1)
        self.walking = Walking(self.live, self.fleet, self.pump, self.status)

    async def status(self, patience_s: float) -> Status:
        self.patience_s.append(patience_s)
        drops = self.drops.pop(0) if len(self.drops) > 1 else self.drops[0]
        peer = msgspec.structs.replace(PEER, drops=drops)
        return Status(node=NodePart(shards=1), peers=(peer,))

    async def request(self, *_: object) -> bytes:
        raise VpndError("control has not answered")

    def walk(self, **request: Any) -> Walk:
        return asyncio.run(self.walking.asked(request))


@pytest.mark.setting("status.why_interval")
@pytest.mark.parametrize("interval_s", [0.1, 0.2])
def test_drops_are_looked_at_for_so_long(interval_s: float) -> None:
    node = Node(interval_s=interval_s)

    async def measured() -> float:
        begun_s = asyncio.get_running_loop().time()
        await node.walking.asked({"who": "b"})
        return asyncio.get_running_loop().time() - begun_s

    assert asyncio.run(measured()) >= interval_s * 0.99
    assert node.patience_s[0] == interval_s


def test_without_shards_and_control_status_alone_tells_who_and_why() -> None:
    walk = Node().walk(who="b")
    assert (walk.name, walk.peer_id, walk.address) == ("b", "B", "127.0.0.1")
    verdicts = {step.name: step.verdict for step in walk.steps}
    assert walk.cause == "route" and verdicts["shard"] == "stops" and verdicts["answer"] == "unknown"


def test_a_peer_that_looks_for_somebody_else_says_nothing_of_packets_from_here() -> None:
    node = Node()

    async def busy(*_: object) -> bytes:
        return msgspec.json.encode(Asked(told=Told(busy=True)))

    node.questions.request = busy
    answer = next(step for step in node.walk(who="b").steps if step.name == "answer")
    assert answer.verdict == UNKNOWN and "ask again" in answer.says


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"who": ""},
        {"who": 7},
        {"who": "b", "port": -1},
        {"who": "b", "port": 65536},
        {"who": "b", "protocol": "tcp"},
    ],
)
def test_what_is_no_question_is_refused(request_: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Node().walk(**request_)


@pytest.mark.parametrize("same", [True, False])
def test_a_peer_is_told_what_is_dropped_of_its_packets_unless_the_one_who_asked_is_gone(same: bool) -> None:
    node = Node({"queue_full": 1, "too_big": 2}, {"queue_full": 4, "too_big": 2})

    async def body() -> None:
        asking = asyncio.ensure_future(
            node.walking.asked_by_peer(WalkWanted(serial=3, peer_id="B", address=""))
        )
        await asyncio.sleep(0)
        node.control.pid += not same
        await asking

    asyncio.run(body())
    if not same:
        assert node.sent == []
        return
    (message,) = node.sent
    told = msgspec.json.decode(message.content, type=Told)
    assert message.serial == 3 and told.dropped == {"queue_full": 4, "too_big": 2}
    assert told.dropping == {"queue_full": 3, "too_big": 0}
    assert told.steps and told.cause == "route"


def test_who_has_no_address_here_is_nobodys_shards_fault() -> None:
    walk = Node().walk(who="nobody")
    assert walk.cause == "peer" and walk.address == ""
    assert "nobody" in walk.blamed().says and "vpnd members" in walk.blamed().remedy


@pytest.mark.parametrize("state", ["removed", "expired", "early"])
def test_who_is_out_of_its_network_is_told_so_whatever_else(state: str) -> None:
    node = Node()
    status = node.status

    async def out(patience_s: float) -> Status:
        network = NetworkPart(name="home", state=state)
        return msgspec.structs.replace(await status(patience_s), network=network, peers=())

    node.walking = Walking(node.live, node.fleet, node.pump, out)
    walk = node.walk(who="b")
    assert walk.cause == "membership" and "home" in walk.blamed().says and walk.blamed().remedy


def test_a_peer_that_comes_too_often_is_named() -> None:
    node = Node()
    status = node.status

    async def flooded(patience_s: float) -> Status:
        peers = (msgspec.structs.replace(PEER, refused=5),)
        return msgspec.structs.replace(await status(patience_s), peers=peers)

    node.walking = Walking(node.live, node.fleet, node.pump, flooded)
    step = next(step for step in node.walk(who="b").steps if step.name == "membership")
    assert step.verdict == LOSES and step.counters == {"handshakes refused": 5}
    assert "b comes too often" in step.says
