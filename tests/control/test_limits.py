"""What one connection may cost control, with each limit and without it: a stranger's first message, and a member's
streams and bytes."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import trio
from control_nodes import Node, eventually, running
from libp2p.protocol_muxer import multiselect_communicator
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.utils import encode_uvarint, read_delim
from multiaddr import Multiaddr

from vpnd.adapter import host
from vpnd.adapter.dial import DialError, NotAdmitted

PROTOCOL = "/test/1"
FRAME = 1 << 16
Monkey = pytest.MonkeyPatch


@pytest.mark.parametrize("guarded", [True, False])
def test_a_stranger_cannot_announce_a_message_of_any_length(guarded: bool, monkeypatch: Monkey) -> None:
    # whatever is set while this runs is taken back at the end
    monkeypatch.setattr(multiselect_communicator, "read_delim", read_delim)
    if not guarded:
        monkeypatch.setattr(host, "limit_negotiation", lambda: None)

    async def main() -> None:
        node = Node(handshake_timeout=60.0)
        async with running(node):
            stream = await trio.open_tcp_stream("127.0.0.1", node.port)
            closed = False
            with trio.move_on_after(5.0 if guarded else 1.0):
                try:
                    await stream.send_all(encode_uvarint(1 << 30))
                    for _ in range(64):
                        await stream.send_all(bytes(FRAME))
                    while await stream.receive_some():
                        pass
                    closed = True
                except trio.BrokenResourceError:
                    closed = True
            assert closed == guarded
            await stream.aclose()

    trio.run(main)


async def connection(member: Node, node: Node) -> Any:
    """A stream of the member's that nobody reads on the other side."""
    node.host.serve(PROTOCOL, lambda stream: trio.sleep_forever(), 60.0)
    return await member.host.open_stream((node.address,), node.peer_id, PROTOCOL)


@pytest.mark.setting("p2p.max_unread_per_connection")
@pytest.mark.parametrize("guarded", [True, False])
def test_a_member_cannot_send_beyond_all_windows(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(host, "bound_all", lambda *settings: None)

    async def main() -> None:
        member, node = Node(), Node(max_unread_per_connection=1 << 20)
        async with running(member, node):
            stream = await connection(member, node)
            muxed = stream.muxed_conn
            header = struct.pack("!BBHII", 0, 0, 0, stream.muxed_stream.stream_id, FRAME)
            try:
                for _ in range(64):
                    await muxed._write_frame(header + bytes(FRAME))
            except Exception:
                assert guarded
            if guarded:
                await eventually(lambda: node.connections == 0)
                return
            (held,) = node.host.swarm.get_connections(member.id)
            await eventually(lambda: sum(map(len, held.muxed_conn.stream_buffers.values())) == 64 * FRAME)

    trio.run(main)


@pytest.mark.setting("p2p.max_streams_per_connection")
@pytest.mark.parametrize("guarded", [True, False])
def test_a_member_cannot_open_any_number_of_streams(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(host, "bound_all", lambda *settings: None)

    async def main() -> None:
        member, node = Node(), Node(max_streams_per_connection=16)
        async with running(member, node):
            stream = await connection(member, node)
            muxed = stream.muxed_conn
            try:
                for number in range(1001, 1201, 2):
                    await muxed._write_frame(struct.pack("!BBHII", 0, 1, 1, number, 0))
            except Exception:
                assert guarded
            if guarded:
                await eventually(lambda: node.connections == 0)
                return
            (held,) = node.host.swarm.get_connections(member.id)
            await eventually(lambda: len(held.muxed_conn.streams) > 100)

    trio.run(main)


def test_who_is_removed_during_its_handshake_gets_no_connection() -> None:
    async def main() -> None:
        member, node = Node(), Node()
        node.members = {member.peer_id}
        async with running(member, node):
            raw = await member.host._tcp.dial(Multiaddr(node.address))
            session = await member.host.swarm.upgrader.upgrade_security(raw, True, node.id)
            await trio.sleep(0.2)  # until the other side waits for the choice of a muxer
            node.members = set()
            await MultiselectClient().select_one_of([YAMUX], MultiselectCommunicator(session), 5)
            await eventually(lambda: node.counts["refused_unknown_peer"] == 1)
            assert node.connections == 0

    trio.run(main)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_connection_made_as_its_peer_is_removed_is_good_for_nothing(
    guarded: bool, monkeypatch: Monkey
) -> None:
    if not guarded:
        monkeypatch.setattr(host.Host, "_members_only", lambda self: self.swarm.common_stream_handler)

    async def main() -> None:
        member, node = Node(), Node()
        node.members = {member.peer_id}
        async with running(member, node):
            await member.connect(node)
            await eventually(lambda: node.connections == 1)
            node.members = set()  # and nobody closes what it has
            if not guarded:
                await connection(member, node)
                return
            with pytest.raises(DialError):
                await connection(member, node)
            await eventually(lambda: node.connections == 0)
            await eventually(lambda: member.connections == 0)
            assert node.counts["refused_unknown_peer"]
            with pytest.raises(NotAdmitted):
                await connection(member, node)

    trio.run(main)


def test_a_connection_that_comes_while_others_of_its_peer_are_closed_is_closed_too() -> None:
    async def main() -> None:
        member, node = Node(), Node()
        async with running(member, node):
            await member.connect(node)
            await eventually(lambda: node.connections == 1)
            (held,) = node.host.swarm.get_connections(member.id)
            stock = held.close

            async def close() -> None:
                await stock()
                await member.connect(node)
                await eventually(lambda: node.connections == 1)

            held.close = close
            await node.host.disconnect(member.peer_id)
            await eventually(lambda: node.connections == 0)

    trio.run(main)


def test_who_is_removed_while_it_is_dialed_is_left() -> None:
    async def main() -> None:
        node, other = Node(), Node()
        node.members = {other.peer_id}
        async with running(node, other):
            other.host.serve(PROTOCOL, lambda stream: trio.sleep_forever(), 60.0)
            stock = node.host.swarm.upgrade_outbound_raw_conn

            async def upgrade(raw: Any, peer_id: Any) -> Any:
                made = await stock(raw, peer_id)
                node.members = set()
                return made

            node.host.swarm.upgrade_outbound_raw_conn = upgrade
            with pytest.raises(DialError, match="not a member any more"):
                await node.host.open_stream((other.address,), other.peer_id, PROTOCOL)
            await eventually(lambda: node.connections == other.connections == 0)

    trio.run(main)


async def fail() -> None:
    raise RuntimeError("what libp2p says when it does not like a connection's end")


@pytest.mark.parametrize("close", [trio.sleep_forever, fail])
def test_a_peer_that_does_not_let_itself_be_closed_is_cut_off(close: Any, monkeypatch: Monkey) -> None:
    async def main() -> None:
        member, node = Node(), Node()
        async with running(member, node):
            await connection(member, node)
            (held,) = node.host.swarm.get_connections(member.id)
            monkeypatch.setattr(held, "close", close)
            with trio.fail_after(5.0):  # process.stop_timeout is 2 s
                await node.host.disconnect(member.peer_id)
            monkeypatch.undo()
            await eventually(lambda: node.connections == 0)
            await eventually(lambda: member.connections == 0)
            assert held.muxed_conn.event_shutting_down.is_set()

    trio.run(main)
