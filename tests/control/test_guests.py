"""What strangers may do where somebody may join: ask one question, and nothing else, however many they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from control_nodes import Node, eventually, running
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.utils import encode_delim
from multiaddr import Multiaddr

from vpnd.adapter.dial import DialError, NotAdmitted
from vpnd.adapter.guests import ENROL, INTRODUCE, QUESTIONS, Question
from vpnd.config.schema import Membership

MAX_REQUEST = 64


def desk(max_connects_per_source: int = 250, **membership: object) -> Node:
    """A node without members that answers everybody with what they said, backwards."""
    p2p = {"handshake_timeout": 60.0, "max_connects_per_source": max_connects_per_source}
    node = Node(members=set(), membership=Membership(**membership), **p2p)
    node.host.desk.open(
        *(
            Question(one, lambda peer_id, data: data[::-1], lambda peer_id: True, MAX_REQUEST)
            for one in QUESTIONS
        )
    )
    return node


async def ask(stranger: Node, node: Node, request: bytes) -> bytes:
    return await stranger.host.ask((node.address,), node.peer_id, request, MAX_REQUEST)


def test_a_stranger_asks_and_gets_nothing_else() -> None:
    async def main() -> None:
        stranger, node = Node(), desk()
        async with running(stranger, node):
            assert await ask(stranger, node, b"abc") == b"cba"
            assert await ask(stranger, node, b"") == b""
            # no data session, no libp2p connection
            with pytest.raises(DialError):
                await stranger.host.dial(node.address, node.peer_id)
            with pytest.raises(NotAdmitted):
                await stranger.host.open_stream((node.address,), node.peer_id, "/ipfs/id/1.0.0")
            await eventually(lambda: node.counts["refused_unknown_peer"] == 2)
            assert not node.taken and node.connections == 0
            # a question that is too long is not even read
            with pytest.raises(DialError):
                await ask(stranger, node, bytes(MAX_REQUEST + 1))

    trio.run(main)


def test_a_member_asks_too_and_keeps_everything_else() -> None:
    async def main() -> None:
        member, node = Node(), desk()
        node.members = {member.peer_id}
        async with running(member, node):
            assert await ask(member, node, b"abc") == b"cba"
            (await member.host.dial(node.address, node.peer_id)).close()
            assert len(node.taken) == 1
            stream = await member.host.open_stream((node.address,), node.peer_id, "/ipfs/ping/1.0.0")
            await stream.reset()

    trio.run(main)


def test_nobody_comes_in_where_nobody_may_ask() -> None:
    async def main() -> None:
        stranger, node = Node(), Node(members=set())
        async with running(stranger, node):
            with pytest.raises(NotAdmitted):
                await ask(stranger, node, b"abc")
            enrol = Question(ENROL, lambda peer_id, data: data, lambda peer_id: False, MAX_REQUEST)
            node.host.desk.open(enrol)
            with pytest.raises(NotAdmitted):
                await ask(stranger, node, b"abc")
            assert node.counts == {"refused_unknown_peer": 2}
            # one question that it may ask does not open the other
            introduce = Question(INTRODUCE, lambda peer_id, data: data * 2, lambda peer_id: True, MAX_REQUEST)
            node.host.desk.open(enrol, introduce)
            with pytest.raises(NotAdmitted):
                await ask(stranger, node, b"abc")
            await eventually(lambda: node.counts == {"refused_unknown_peer": 3})
            to = (node.address,), node.peer_id
            assert await stranger.host.ask(*to, b"abc", MAX_REQUEST, INTRODUCE) == b"abcabc"

    trio.run(main)


@pytest.mark.parametrize("let_in", [True, False])
def test_who_is_turned_away_introduces_itself_and_dials_once_more(let_in: bool) -> None:
    async def main() -> None:
        stranger, node = Node(), desk()
        asked: list[tuple[tuple[str, ...], str]] = []

        async def introduce(addresses: Sequence[str], peer_id: str) -> bool:
            asked.append((tuple(addresses), peer_id))
            if let_in:
                node.members = {stranger.peer_id}
            return let_in

        stranger.host.introduce_by(introduce)
        async with running(stranger, node):
            to = (node.address,), node.peer_id
            for dial in (
                lambda: stranger.host.dial(node.address, node.peer_id),
                lambda: stranger.host.open_stream(*to, "/ipfs/ping/1.0.0"),
            ):
                node.members = set()
                if let_in:
                    await dial()
                else:
                    with pytest.raises(NotAdmitted):
                        await dial()
            assert asked == [to, to] and len(node.taken) == let_in

    trio.run(main)


async def sit(stranger: Node, node: Node, question: str) -> Any:
    """Become a guest, and say nothing, as long as what is returned is kept."""
    raw = await stranger.host._tcp.dial(Multiaddr(node.address))
    session = await stranger.host.swarm.upgrader.upgrade_security(raw, True, node.id)
    await MultiselectClient().select_one_of([question], MultiselectCommunicator(session), 5)
    return session


@pytest.mark.setting("membership.max_guests", "membership.guest_timeout")
@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        # silent guests in greater number than are let in: the first ones go
        ({"max_guests": 4, "guest_timeout": 60.0}, 8),
        # or they go because their time is over
        ({"max_guests": 64, "guest_timeout": 0.5}, 0),
    ],
)
def test_silent_guests_keep_nobody_from_asking(settings: dict[str, float], counted: int) -> None:
    async def main() -> None:
        stranger, other, node = Node(), Node(), desk(**settings)
        async with running(stranger, other, node):
            sitting = [await sit(stranger, node, question) for question in (ENROL, INTRODUCE) * 6]
            assert await ask(other, node, b"abc") == b"cba"
            assert node.counts["refused_guest_limit"] >= counted
            await eventually(lambda: len(node.host.desk._guests) <= settings["max_guests"])
            if not counted:
                await eventually(lambda: not node.host.desk._guests)
            assert len(sitting) == 12

    trio.run(main)


def test_a_flood_of_half_open_connections_keeps_nobody_from_asking() -> None:
    async def main() -> None:
        stranger, node = (
            Node(),
            desk(max_connects_per_source=1000),
        )  # who asks comes from where the flood does
        async with running(stranger, node):
            flood = [await trio.open_tcp_stream("127.0.0.1", node.port) for _ in range(500)]
            for stream in flood[:100]:  # and some that begin to speak
                await stream.send_all(encode_delim(b"/multistream/1.0.0"))
            assert await ask(stranger, node, b"abc") == b"cba"
            await eventually(lambda: node.counts["refused_handshake_limit"] >= 200)
            for stream in flood:
                await stream.aclose()

    trio.run(main)
