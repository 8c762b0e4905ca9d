"""Gossip between a few nodes: what is sent for which difference, and what a bad neighbour can do."""

from __future__ import annotations

import pytest
from gossip_net import Net
from hypothesis import given, settings
from hypothesis import strategies as st
from membership_world import NETWORK, NOW, World, directory, membership, peer, presence, public

from vpnd.membership import messages, network
from vpnd.membership.gossip import Gossip
from vpnd.membership.messages import Announce, Buckets, Entries, Statements, Summary, Wants
from vpnd.membership.refusal import REASONS, MembershipRefused


def filled(net: Net, node: str, *statements) -> None:
    net.directories[node].merge([one.wire for one in statements], NOW)


def test_equal_directories_exchange_one_small_message():
    net = Net("ab")
    for node in "ab":
        filled(net, node, membership("x"), membership("y"))
    net.connect("a", "b")
    net.run()
    assert net.messages == 1 and net.bytes < 50


def test_a_comparison_makes_two_directories_equal():
    net = Net("ab")
    filled(net, "a", membership("x"), membership("y"), presence("x"), membership("old", serial=1))
    filled(net, "b", membership("z"), membership("old"))
    net.connect("a", "b")
    net.run()
    assert net.equal() and len(net.directories["b"].members(NOW)) == 4
    assert net.refused == [], "finding out who has the newer one is no offence"


def test_news_goes_on_at_once_and_not_back():
    net = Net("abc")
    net.connect("a", "b")
    net.connect("b", "c")
    net.run()
    net.messages = 0
    net.publish("a", membership("x"))
    net.run()
    assert net.equal() and net.messages == 2


def test_much_news_is_named_and_each_neighbour_gets_it_once():
    net = Net("abcd", push_bytes=100)
    for one, other in ("ab", "ac", "bd", "cd"):
        net.connect(one, other)
    net.run()
    net.bytes = 0
    news = [membership(f"x{number}") for number in range(20)]
    net.publish("a", *news)
    net.run()
    assert net.equal()
    size = sum(len(one.wire) for one in news)
    assert size * 3 < net.bytes < size * 3.6, "d has two neighbours that have it and asks one"


def test_a_statement_that_came_too_early_is_understood_after_a_comparison():
    world = World()
    world.grant("second")
    world.enrol("x", by="second")
    net = Net("ab")
    net.connect("a", "b")
    net.run()
    filled(net, "a", *world.said)
    net.now_ms += net.request_ms
    net.deliver("a", "b", messages.encode(Statements((world.said[-1].wire,))))
    net.run()
    assert net.equal() and net.directories["b"].find(peer("x"), NOW)


def test_a_member_that_moves_all_the_time_is_not_passed_on_all_the_time():
    net = Net("abc")
    net.connect("a", "b")
    net.connect("b", "c")
    net.publish("a", membership("x"))
    net.run()
    for step in range(10):
        net.publish("a", presence("x", NOW + step))
        net.run()
    assert net.gossips["c"] and net.received["c"] < 5
    net.round()
    net.round()
    assert net.equal(), "the comparison carries what was not pushed"


def test_what_a_member_says_soon_after_is_passed_on_when_its_time_has_come():
    """The last of it, once, and before the next comparison."""
    net = Net("abc")
    net.connect("a", "b")
    net.connect("b", "c")
    net.publish("a", membership("x"))
    net.round()
    for step in range(3):
        net.publish("a", presence("x", NOW + step))
    net.run()
    assert not net.equal()
    gossip = net.gossips["a"]
    due_ms = gossip.next_timer_ms()
    assert net.now_ms < due_ms <= net.now_ms + net.presence_ms
    net.now_ms = due_ms - 1
    assert not gossip.tick(net.now_ms).send
    net.now_ms = due_ms
    for name in "ab":
        net.tick(name)
        net.run()
    assert net.equal()
    assert gossip.next_timer_ms() > due_ms


def test_a_refused_statement_is_not_asked_for_again():
    net = Net("ab")
    net.directories["b"] = directory(max_members=1)
    net.gossips["b"] = net.gossip("b")
    filled(net, "a", membership("x"), membership("y"))
    net.connect("a", "b")
    net.run()
    assert net.refused == ["directory_full"]
    for _ in range(5):
        net.round()
    assert net.refused == ["directory_full"]


def test_a_node_of_another_network_is_known_at_once():
    net = Net("ab")
    other = network.create("other", public("root"), "10.86.0.0/16")
    net.directories["b"] = directory(of=other)
    net.gossips["b"] = net.gossip("b")
    net.connect("a", "b")
    with pytest.raises(MembershipRefused) as caught:
        net.run()
    assert caught.value.reason == "wrong_network"


def test_messages_after_the_connection_ended_have_no_effect():
    net = Net("ab")
    net.connect("a", "b")
    net.gossips["b"].disconnected("a")
    outcome = net.gossips["b"].receive_untrusted(
        "a", messages.encode(Statements((membership("x").wire,))), NOW
    )
    assert not outcome.send and not outcome.accepted


def test_the_timer_is_the_next_comparison_or_expiry():
    held = directory()
    gossip = Gossip(
        held, interval_ms=5000, push_bytes=0, request_ms=1, presence_ms=1, choose=lambda names: names[0]
    )
    gossip.tick(NOW)
    assert gossip.next_timer_ms() == NOW + 5000
    gossip.publish([membership("x", expires_ms=NOW + 1)], NOW)
    held.advance(NOW)
    assert gossip.next_timer_ms() == NOW + 5000
    late = held.next_expiry_ms() - 1
    gossip.tick(late)
    assert gossip.next_timer_ms() == late + 1
    assert [one.name for one in gossip.tick(late + 1).changes.removed] == ["x"]


SAMPLES = [
    Summary(1, NETWORK.id, bytes(16)),
    Buckets(bytes(range(256)) * 8),
    Entries(b"\x01\x02", bytes(32)),
    Announce(bytes(16)),
    Wants(bytes(8)),
    Statements((membership("x").wire, b"junk")),
]


@pytest.mark.parametrize("message", SAMPLES, ids=[type(one).__name__ for one in SAMPLES])
def test_messages_read_back_as_themselves(message):
    assert messages.parse_untrusted(messages.encode(message)) == message


@pytest.mark.parametrize(
    ("what", "data", "reason"),
    [
        ("longer than any message", bytes(messages.MAX_MESSAGE + 1), "too_long"),
        ("cut within an entry", messages.encode(Announce(bytes(17))), "malformed"),
        ("of another version", messages.encode(Summary(2, NETWORK.id, bytes(16))), "malformed"),
        ("with too few buckets", messages.encode(Buckets(bytes(8))), "malformed"),
    ],
)
def test_a_message_outside_its_limits_is_refused(what, data, reason):
    with pytest.raises(MembershipRefused) as caught:
        messages.parse_untrusted(data)
    assert caught.value.reason == reason


def hit(data: bytes) -> None:
    net = Net("ab")
    filled(net, "a", membership("x"))
    net.connect("a", "b")
    try:
        outcome = net.gossips["a"].receive_untrusted("b", data, NOW)
    except MembershipRefused as refusal:
        assert refusal.reason in REASONS
    else:
        assert all(reason in REASONS for reason in outcome.refused)
        assert all(len(sent) <= messages.MAX_MESSAGE for _, sent in outcome.send)


@given(st.binary(max_size=200))
def test_random_bytes_from_a_neighbour(data):
    hit(data)


@settings(max_examples=200)
@given(st.data())
def test_mutated_messages_from_a_neighbour(data):
    wire = bytearray(messages.encode(data.draw(st.sampled_from(SAMPLES))))
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    hit(bytes(wire[: data.draw(st.integers(0, len(wire)))]))


def test_pages_stay_within_the_limit_and_lose_nothing():
    pieces = [number.to_bytes(16) for number in range(10_000)]
    pages = messages.pages(pieces, Announce)
    assert all(len(page) <= messages.MAX_MESSAGE for page in pages)
    assert b"".join(messages.parse_untrusted(page).entries for page in pages) == b"".join(pieces)
    wires = [bytes([number % 256]) * 1000 for number in range(300)]
    pages = messages.statement_pages(wires)
    assert all(len(page) <= messages.MAX_MESSAGE for page in pages)
    assert [wire for page in pages for wire in messages.parse_untrusted(page).wires] == wires
    buckets = [(number, bytes(1600)) for number in range(256)]
    pages = messages.bucket_pages(buckets)
    assert all(len(page) <= messages.MAX_MESSAGE for page in pages)
    assert b"".join(messages.parse_untrusted(page).buckets for page in pages) == bytes(range(256))
