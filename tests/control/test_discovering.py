"""Who is looked for next, and how much the local network may ask of this node."""

from __future__ import annotations

import socket
from collections import Counter

import pytest
import trio

from vpnd.adapter import multicast
from vpnd.adapter.mdns import LocalNetwork
from vpnd.config.schema import Discovery
from vpnd.control.discovering import Turns
from vpnd.discovery import localnet
from vpnd.discovery.localnet import Recognizer

NETWORK_ID = bytes(range(16))


def test_everybody_has_a_turn_before_anybody_has_two() -> None:
    turns = Turns()
    taken = [*turns.next("abcde", 2), *turns.next("abcde", 2), *turns.next("abcde", 2)]
    assert taken == list("abcde")
    assert turns.next("abcde", 2) == ["a", "b"]


def test_who_comes_and_goes_changes_nobody_elses_turn() -> None:
    turns = Turns()
    assert turns.next("abc", 2) == ["a", "b"]
    assert turns.next("zabc", 2) == ["z", "c"]
    assert turns.next("b", 2) == ["b"]
    assert turns.next("ab", 1) == ["a"], "it was away in between"
    assert turns.next("", 2) == []
    turns.next("ab", 2)
    turns.clear()
    assert turns.next("ab", 1) == ["a"]


class Local(LocalNetwork):
    """What is heard, without a network."""

    def __init__(self, **settings) -> None:
        self.found_there: list[tuple[str, str]] = []
        self.counts: Counter[str] = Counter()
        super().__init__(
            NETWORK_ID,
            "id-me",
            Recognizer(NETWORK_ID, lambda: ["id-b", "id-me"], 10),
            Discovery(**settings),
            without="vpnd0",
            port_at=lambda ip: 4001,
            found=lambda peer_id, address: self.found_there.append((peer_id, address)),
            count=lambda name: self.counts.update((name,)),
        )


def answer(peer_id: str, network_id: bytes = NETWORK_ID, port: int = 4001) -> bytes:
    return localnet.answer(network_id, b"saltsalt", peer_id, port)


def test_a_member_is_where_its_message_came_from() -> None:
    local = Local()
    local._heard_untrusted(answer("id-b"), "192.0.2.7")
    assert local.found_there == [("id-b", "/ip4/192.0.2.7/tcp/4001")]


def test_ourselves_strangers_and_nonsense_are_nobody() -> None:
    local = Local()
    for message in (
        answer("id-me"),
        answer("id-stranger"),
        answer("id-b", bytes(16)),
        answer("id-b", port=0),
        localnet.MARK,
        b"",
        localnet.question(),
    ):
        local._heard_untrusted(message, "192.0.2.7")
    local._heard_untrusted(answer("id-b"), "fe80::7%eth0")  # only for its own link
    assert local.found_there == []
    assert local.counts["mdns_refused"] == 1


@pytest.mark.setting("discovery.mdns_max_messages")
def test_a_flood_is_not_read(monkeypatch) -> None:
    """On a socket of loopback: so many messages in one second, and no more."""

    async def main() -> None:
        local = Local(mdns_max_messages=10)
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        receiver.bind(("127.0.0.1", 0))
        with receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(local._listen, receiver)
                for _ in range(100):
                    sender.sendto(answer("id-b"), receiver.getsockname())
                with trio.move_on_after(5.0):
                    while sum(local.counts.values()) < 100:
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
        assert 10 <= local.counts["mdns_received"] <= 20
        assert local.counts["mdns_refused"] + local.counts["mdns_received"] == 100

    trio.run(main)


def test_a_port_that_cannot_be_had_ends_it_and_nothing_else(monkeypatch) -> None:
    def refuse(family: int, host: str, port: int) -> socket.socket:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(multicast, "_bound", refuse)
    trio.run(Local().run)
