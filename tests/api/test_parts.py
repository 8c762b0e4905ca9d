"""Statuses and answers of networks of any size: in parts that a channel carries, and put together again."""

from __future__ import annotations

import socket

import pytest
from channel_harness import Pair

from vpnd.api import ends, messages, parts, rules
from vpnd.api.reports import PeerReport, PeerTraffic
from vpnd.errors import ProtocolViolation

#: What Linux allows an unprivileged process by default (net.core.wmem_max), as getsockopt doubles it.
DEFAULT_BUFFER = 212_992


def control_status(peers: int) -> messages.ControlStatus:
    rows = tuple(
        PeerReport(
            name=f"member-{number}",
            peer_id=f"12D3KooW{number:044}",
            addresses=("/ip4/192.168.100.100/tcp/4001", "/ip4/203.0.113.100/tcp/4001"),
            state="waiting",
            last_error="/ip4/192.168.100.100/tcp/4001: no connection within 1.5 s",
        )
        for number in range(peers)
    )
    return messages.ControlStatus(serial=3, listen=("/ip4/127.0.0.1/tcp/1",), peers=rows, connections=2)


def shard_status(peers: int) -> messages.ShardStatus:
    rows = tuple(PeerTraffic(peer_id=f"12D3KooW{number:044}", bytes_sent=number) for number in range(peers))
    return messages.ShardStatus(serial=4, sessions=(), traffic=rows)


def answer(members: int) -> messages.Answer:
    return messages.Answer(serial=5, result=bytes(range(250)) * members)


@pytest.mark.parametrize("peers", [0, 1, 20_000])
@pytest.mark.parametrize(
    "make, who", [(control_status, "control"), (shard_status, "shard"), (answer, "control")]
)
def test_one_of_any_size_arrives(make, who: str, peers: int) -> None:
    status = make(peers)
    way = rules.Way(who, "supervisor")
    pair = Pair(way)
    pair.prepare(way, type(status))
    pair.raw[who].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, DEFAULT_BUFFER)
    sender, receiver = pair.ends[who], pair.ends["supervisor"]
    if peers == 20_000:
        with pytest.raises(ProtocolViolation):
            sender.send(status)
    got = []
    for part in parts.split(status):
        sender.send(part)
        while (received := receiver.receive()) is not None:
            got.append(received[0])
            sender.flush()
    assert [part.more for part in got] == [True] * (len(got) - 1) + [False]
    assert parts.joined(got) == status
    pair.close()


@pytest.mark.root
def test_the_longest_message_passes_whatever_the_machine_allows_others() -> None:
    ours, theirs = ends.pair()
    with ours, theirs:
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * ends.MAX_MESSAGE_BYTES
