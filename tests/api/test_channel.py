"""Channels between a node's processes: the message table is enforced, nothing blocks, no descriptor is lost."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from channel_harness import MESSAGES, SAMPLES, Pair
from hypothesis import given
from hypothesis import strategies as st

from vpnd.api import aio, channel, messages
from vpnd.api import ends as channel_ends
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.api.rules import MAX_DESCRIPTORS, Message, Way
from vpnd.errors import ProtocolViolation

Ends = tuple[Channel, Channel, socket.socket]
(HANDOVER,) = [message for message in MESSAGES if isinstance(message, messages.SessionHandover)]
WAYS = sorted(messages.OPENERS)


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Control's and a shard's ends of a channel on which everything is permitted, and the socket behind the shard's."""
    pair = Pair(messages.CONTROL_TO_SHARD)
    for kind in (messages.SessionsHeld, messages.PeerKnown, messages.PeersComplete):
        pair.pass_on(kind)
    yield pair.ends["control"], pair.ends["shard"], pair.raw["shard"]
    pair.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_message_arrives_as_it_was_where_it_is_permitted_and_nowhere_else(
    way: Way, message: Message
) -> None:
    pair = Pair(way)
    if way in type(message).rule.ways:
        pair.pass_on(type(message))
    else:
        refused(pair, way, message, "is not sent this way")
    pair.close()


def refused(pair: Pair, way: Way, message: Message, why: str, more: int = 0) -> None:
    """Neither end lets it pass, and no descriptor is kept."""
    name = f"{way}: {type(message).__name__} {why}"
    with pytest.raises(ProtocolViolation, match=name):
        pair.send(way, message, more)
    before = open_descriptors()
    pair.send_raw(way, message, more)
    with pytest.raises(ProtocolViolation, match=name):
        pair.ends[way.receiver].receive()
    assert open_descriptors() == before


RULES = [(way, message) for message in MESSAGES for way in type(message).rule.ways]


@pytest.mark.parametrize(("way", "message"), RULES, ids=lambda value: str(value)[:40])
def test_a_message_that_is_early_repeated_or_carries_other_descriptors_is_refused(
    way: Way, message: Message
) -> None:
    kind = type(message)
    if kind.rule.after or (messages.OPENERS[way] and not kind.rule.first):
        early = Pair(way)
        refused(early, way, message, "came before ")
        early.close()
    pair = Pair(way)
    pair.prepare(way, kind)
    least, most, _ = kind.rule.descriptors
    if most < MAX_DESCRIPTORS:
        refused(pair, way, message, f"came with {most + 1} descriptors", more=most + 1 - least)
    pair.pass_on(kind)
    if kind.rule.first or kind.rule.once:
        refused(pair, way, message, "came a second time")
    else:
        pair.pass_on(kind)
    pair.close()


def test_a_child_that_is_ready_cannot_fail_to_start_any_more() -> None:
    pair = Pair(messages.CONTROL_TO_SUPERVISOR)
    pair.pass_on(messages.Ready)
    refused(pair, messages.CONTROL_TO_SUPERVISOR, SAMPLES[messages.Failed], "came late")
    pair.close()


def test_every_message_is_tried_here() -> None:
    assert SAMPLES.keys() == set(messages.ALL)


def test_the_table_for_readers_is_that_of_the_rules() -> None:
    text = (Path(__file__).parents[2] / "docs" / "messages.md").read_text()
    assert text == messages.table(), "run: .venv/bin/python -m vpnd.api.messages > docs/messages.md"


def test_keys_are_not_in_what_is_printed() -> None:
    assert repr(HANDOVER.session.receive_key) not in repr(HANDOVER) and "key" not in repr(HANDOVER)


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
    here, there = channel_ends.pair()
    with there:
        control = Channel(here, "control", "shard")
        there.send(data)
        try:
            received = control.receive()
            assert received is not None and isinstance(received[0], Message)
        except ProtocolViolation:
            pass
        control.close()


def test_what_is_longer_than_a_message_may_be_is_a_violation(ends: Ends) -> None:
    control, shard, raw = ends
    data = msgspec.msgpack.encode(messages.SessionWanted(peer_id="p" * channel_ends.MAX_MESSAGE_BYTES))
    raw.send(data)
    with pytest.raises(ProtocolViolation):
        control.receive()
    with pytest.raises(ProtocolViolation, match="too large"):
        shard.send(messages.SessionWanted(peer_id="p" * channel_ends.MAX_MESSAGE_BYTES))


def test_more_descriptors_than_any_message_has_are_a_violation_and_none_is_kept(ends: Ends) -> None:
    control, shard, raw = ends
    too_many = [raw.fileno()] * (MAX_DESCRIPTORS + 3)
    before = open_descriptors()
    fds = array.array("i", too_many)
    raw.sendmsg(
        [msgspec.msgpack.encode(messages.SessionWanted(peer_id="p"))],
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)],
    )
    with pytest.raises(ProtocolViolation, match="cut short"):
        control.receive()
    assert open_descriptors() == before
    with pytest.raises(ProtocolViolation, match="11 descriptors"):
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
        control.send(messages.PeerForgotten(peer_id="p"))


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
    start = SAMPLES[messages.ShardStart]
    pair = Pair(messages.SUPERVISOR_TO_SHARD)
    pair.send(messages.SUPERVISOR_TO_SHARD, start)
    message, descriptors = channel.first_message(pair.ends["shard"], messages.ShardStart)
    assert message == start and len(descriptors) == 4
    for fd in descriptors:
        os.close(fd)
    pair.ends["supervisor"].close()
    with pytest.raises(ChannelClosed):
        channel.first_message(pair.ends["shard"], messages.ShardStart)
    pair.close()
    other = Pair(messages.SUPERVISOR_TO_SHARD)
    other.send_raw(messages.SUPERVISOR_TO_SHARD, SAMPLES[messages.Stop])
    with pytest.raises(ProtocolViolation, match="Stop came before ShardStart"):
        channel.first_message(other.ends["shard"], messages.ShardStart)
    other.close()


def test_on_a_loop_messages_and_the_end_are_told_once_and_a_backlog_drains() -> None:
    async def main() -> None:
        here, there = channel_ends.pair()
        heard: list[Message] = []
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


def test_messages_that_never_stop_take_their_share_of_the_loop_and_no_more() -> None:
    """Each takes 2 ms; whoever else is on the loop has the rest of the time, and every message is heard."""

    async def main() -> None:
        here, there = channel_ends.pair()
        heard: list[Message] = []
        ended: list[Exception] = []

        def hear(message: Message, _: list[int]) -> None:
            heard.append(message)
            time.sleep(0.002)

        supervisor = aio.LoopChannel(Channel(here, "shard", "control"), hear, ended.append, 0.25)
        sender = Channel(there, "control", "shard")
        for number in range(50):
            sender.send(messages.PeerKnown(peer_id=str(number), name="n", prefixes=()))
        begun_s = time.monotonic()
        async with asyncio.timeout(20):
            while len(heard) < 50:
                await asyncio.sleep(0)
        assert time.monotonic() - begun_s > 50 * 0.002 / 0.25 * 0.8
        supervisor.close()
        sender.close()
        assert not ended

    asyncio.run(main())
