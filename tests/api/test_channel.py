"""Channels between a node's processes: the message table is enforced, nothing blocks, no descriptor is lost."""

from __future__ import annotations

import array
import asyncio
import itertools
import os
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.api import aio, channel, messages, reports
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.api.permitted import PERMITTED
from vpnd.config.schema import Config
from vpnd.errors import ProtocolViolation

Ends = tuple[Channel, Channel, socket.socket]
REPORT = reports.SessionReport(
    peer_id="p", session_id=7, initiator=True, state="up", rtt_ms=None, streams=1, bytes_sent=1,
    bytes_received=2, packets_sent=3, packets_received=4, queued_bytes=0, age_s=1.5,
)  # fmt: skip
PROBE = reports.SessionProbe(
    peer_id="p", session_id=1 << 47, local="192.0.2.1:40001", remote="[2001:db8::2]:4001", rtt_ms=None
)
PEER_REPORT = reports.PeerReport(name="b", peer_id="p", addresses=("/ip4/1.2.3.4/tcp/1",), state="dialing")
OWN = reports.OwnAddresses(
    network="home", label="a", addresses=("10.86.0.1", "fd00::1"), subnets=("10.86.0.0/16", "fd00::/64")
)
#: One of each.
MESSAGES: list[messages.Message] = [
    messages.ControlStart(config=Config(), node_name="n", peer_id="p", virtual_ip="10.0.0.1"),
    messages.ShardStart(config=Config(), index=1, own=("10.0.0.1/32",), tun_offloads=3),
    messages.Ready(listen=("/ip4/1.2.3.4/tcp/1",)),
    messages.Failed(kind="MachineError", error="no"),
    messages.Reconfigure(config=Config()),
    messages.NetworkChanged(reason="r", addresses=("10.1.2.3",)),
    messages.OwnChanged(own=OWN),
    messages.OwnPrefixes(own=("10.86.0.1/32",)),
    messages.RoutesKnown(routes=("192.0.2.0/24",)),
    messages.NameSockets(udp=2),
    messages.Request(serial=1, command="members", arguments={"name": "b", "uses": 1}),
    messages.Answer(serial=1, result=b"[]"),
    messages.Stop(drain=True),
    messages.ShardArrived(index=0),
    messages.ShardLeft(index=0),
    messages.ControlArrived(),
    messages.StatusRequest(serial=9),
    messages.ControlStatus(serial=9, listen=(), peers=(PEER_REPORT,), connections=2),
    messages.ShardStatus(serial=9, sessions=(REPORT,), traffic=(reports.PeerTraffic(peer_id="p"),)),
    messages.ProbeRequest(serial=9, destination="fd00::2"),
    messages.ProbeAnswer(serial=9, session=PROBE, why="no answer within 2 s"),
    messages.PeerKnown(peer_id="p", name="b", prefixes=("10.0.0.2/32",)),
    messages.PeerForgotten(peer_id="p"),
    messages.PeerCircuit(peer_id="p", state="open"),
    messages.PeerDialed(peer_id="p"),
    messages.PeersComplete(),
    messages.SessionHandover(
        session_id=1 << 47, peer_id="p", initiator=False, cipher="aesgcm", send_key=bytes(32), send_nonce=0,
        receive_key=bytes(range(32)), receive_nonce=2, leftover=b"x",
    ),
    messages.SessionsHeld(sessions=((1, "p", True),)),
    messages.SessionUp(session_id=1, peer_id="p"),
    messages.SessionDown(session_id=1, peer_id="p", reason="gone"),
    messages.SessionWanted(peer_id="p"),
    messages.OwnersAsked(networks=("10.86.0.0/16",)),
    messages.OwnerWanted(address=0x0A560002),
]  # fmt: skip
(HANDOVER,) = [message for message in MESSAGES if isinstance(message, messages.SessionHandover)]
(START,) = [message for message in MESSAGES if isinstance(message, messages.ShardStart)]
WAYS = sorted(PERMITTED)


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Control's and a shard's ends, and the raw socket behind the shard's."""
    here, there = channel.pair()
    control, shard = Channel(here, "control", "shard"), Channel(there, "shard", "control")
    yield control, shard, there
    control.close()
    shard.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_where_it_is_permitted_and_nowhere_else(
    message: messages.Message,
) -> None:
    permitted = 0
    for sender, receiver in WAYS:
        here, there = channel.pair()
        one, other = Channel(here, sender, receiver), Channel(there, receiver, sender)
        if type(message) in PERMITTED[sender, receiver]:
            one.send(message)
            assert other.receive() == (message, [])
            permitted += 1
        else:
            with pytest.raises(ProtocolViolation, match="not sent this way"):
                one.send(message)
            here.send(msgspec.msgpack.encode(message))
            with pytest.raises(ProtocolViolation, match="not permitted"):
                other.receive()
        one.close()
        other.close()
    assert permitted


def test_every_message_has_a_way_and_is_tried_here() -> None:
    assert {type(message) for message in MESSAGES} == set(itertools.chain(*PERMITTED.values()))


def test_keys_are_not_in_what_is_printed() -> None:
    assert repr(HANDOVER.receive_key) not in repr(HANDOVER) and "key" not in repr(HANDOVER)


NONSENSE = [
    ("random bytes", b"\xc1\xff\x00garbage"),
    ("an empty map", msgspec.msgpack.encode({})),
    ("an unknown message", msgspec.msgpack.encode({"type": "Surrender"})),
    ("a message without its fields", msgspec.msgpack.encode({"type": "SessionUp"})),
    ("a field of another type", msgspec.msgpack.encode({"type": "SessionWanted", "peer_id": 7})),
    ("half a message", msgspec.msgpack.encode(MESSAGES[-1])[:-3]),
    ("a message and more", msgspec.msgpack.encode(MESSAGES[-1]) + b"x"),
]


@pytest.mark.parametrize(("what", "data"), NONSENSE, ids=[row[0] for row in NONSENSE])
def test_nonsense_is_a_violation_and_its_descriptors_are_closed(what: str, data: bytes, ends: Ends) -> None:
    control, _, raw = ends
    before = open_descriptors()
    socket.send_fds(raw, [data], [raw.fileno(), raw.fileno()])
    with pytest.raises(ProtocolViolation):
        control.receive()
    assert open_descriptors() == before


@given(st.binary(min_size=1, max_size=200))
def test_whatever_comes_is_a_message_or_a_violation(data: bytes) -> None:
    here, there = channel.pair()
    with there:
        control = Channel(here, "control", "shard")
        there.send(data)
        try:
            received = control.receive()
            assert received is not None and isinstance(received[0], messages.Message)
        except ProtocolViolation:
            pass
        control.close()


def test_what_is_longer_than_a_message_may_be_is_a_violation(ends: Ends) -> None:
    control, shard, raw = ends
    data = msgspec.msgpack.encode(messages.SessionWanted(peer_id="p" * channel.MAX_MESSAGE_BYTES))
    raw.send(data)
    with pytest.raises(ProtocolViolation):
        control.receive()
    with pytest.raises(ProtocolViolation, match="too large"):
        shard.send(messages.SessionWanted(peer_id="p" * channel.MAX_MESSAGE_BYTES))


def test_more_descriptors_than_any_message_has_are_a_violation_and_none_is_kept(ends: Ends) -> None:
    control, shard, raw = ends
    too_many = [raw.fileno()] * (channel.MAX_DESCRIPTORS + 3)
    before = open_descriptors()
    fds = array.array("i", too_many)
    raw.sendmsg(
        [msgspec.msgpack.encode(messages.SessionWanted(peer_id="p"))],
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)],
    )
    with pytest.raises(ProtocolViolation, match="cut short"):
        control.receive()
    assert open_descriptors() == before
    with pytest.raises(ProtocolViolation, match="too large"):
        shard.send(messages.SessionWanted(peer_id="p"), tuple(too_many))


def test_a_descriptor_arrives_as_a_duplicate_that_no_child_inherits(ends: Ends) -> None:
    control, shard, _ = ends
    read_end, write_end = os.pipe()
    control.send(HANDOVER, (write_end,))
    os.close(write_end)
    received = shard.receive()
    assert received is not None
    (descriptor,) = received[1]
    assert not os.get_inheritable(descriptor)
    os.write(descriptor, b"through")
    os.close(descriptor)
    assert os.read(read_end, 100) == b"through"
    os.close(read_end)


def test_nothing_to_receive_is_none_and_an_end_is_an_error(ends: Ends) -> None:
    control, shard, _ = ends
    assert control.receive() is None
    shard.send(messages.SessionWanted(peer_id="last words"))
    shard.close()
    received = control.receive()
    assert received == (messages.SessionWanted(peer_id="last words"), [])
    with pytest.raises(ChannelClosed):
        control.receive()
    with pytest.raises(ChannelClosed):
        control.send(messages.PeersComplete())


def test_a_full_channel_queues_in_order_with_descriptors_and_never_blocks(ends: Ends) -> None:
    control, shard, _ = ends
    before = open_descriptors()
    name = "n" * 50_000
    sent = 0
    read_end, write_end = os.pipe()
    while not control.backlog:
        control.send(messages.PeerKnown(peer_id=str(sent), name=name, prefixes=()))
        sent += 1
    control.send(HANDOVER, (write_end,))
    os.close(write_end)  # the queue has one of its own
    received = []
    while True:
        got = shard.receive()
        if got is None:
            if not control.backlog:
                break
            control.flush()
            continue
        received.append(got)
    assert [message.peer_id for message, _ in received[:-1]] == [str(number) for number in range(sent)]
    assert received[-1][0] == HANDOVER
    os.close(received[-1][1][0])
    os.close(read_end)
    assert open_descriptors() == before


def test_closing_forgets_what_waits_and_its_descriptors(ends: Ends) -> None:
    control, _, raw = ends
    before = open_descriptors()
    while not control.backlog:
        control.send(messages.PeerKnown(peer_id="p", name="n" * 50_000, prefixes=()))
    control.send(HANDOVER, (raw.fileno(),))
    assert open_descriptors() == before + 1
    control.close()
    assert open_descriptors() == before - 1


def test_a_child_waits_for_its_first_message_and_takes_no_other() -> None:
    here, there = channel.pair()
    supervisor, shard = Channel(here, "supervisor", "shard"), Channel(there, "shard", "supervisor")
    supervisor.send(START)
    assert channel.first_message(shard, messages.ShardStart) == (START, [])
    supervisor.send(messages.Stop())
    with pytest.raises(ProtocolViolation, match="Stop came before ShardStart"):
        channel.first_message(shard, messages.ShardStart)
    supervisor.close()
    with pytest.raises(ChannelClosed):
        channel.first_message(shard, messages.ShardStart)
    shard.close()


def test_on_a_loop_messages_and_the_end_are_told_once_and_a_backlog_drains() -> None:
    async def main() -> None:
        here, there = channel.pair()
        heard: list[messages.Message] = []
        ended: list[Exception] = []
        control = aio.LoopChannel(
            Channel(here, "control", "shard"), lambda message, _: heard.append(message), ended.append
        )
        shard = aio.LoopChannel(
            Channel(there, "shard", "control"), lambda message, _: heard.append(message), ended.append
        )
        said = [messages.PeerKnown(peer_id=str(n), name="n" * 50_000, prefixes=()) for n in range(200)]
        for message in said:
            control.send(message)
        async with asyncio.timeout(20):
            while len(heard) < 200:
                await asyncio.sleep(0)
        assert heard == said
        shard.close()
        shard.close()
        async with asyncio.timeout(20):
            while not ended:
                await asyncio.sleep(0)
        assert len(ended) == 1 and control.closed
        control.send(messages.PeersComplete())
        assert len(ended) == 1

    asyncio.run(main())
