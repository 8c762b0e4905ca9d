"""The registry of peers and the names of their records."""

from __future__ import annotations

import pytest

from vpnd.config.schema import Peer
from vpnd.discovery.records import MAX_KEY_BYTES, dht_key
from vpnd.discovery.registry import Member, PeerRegistry

PEER_ID = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


@pytest.mark.parametrize(
    ("virtual_ip", "prefix"), [("10.86.0.2", "10.86.0.2/32"), ("fd00::2", "fd00::2/128")]
)
def test_a_peer_may_use_its_own_address_alone(virtual_ip: str, prefix: str) -> None:
    registry = PeerRegistry([Peer(name="b", peer_id=PEER_ID, virtual_ip=virtual_ip)])
    found = registry.find(PEER_ID)
    assert found is not None and found.prefixes == (prefix,)
    assert registry.members() == (found,)
    assert registry.find(PEER_ID[:-1]) is None


def test_the_peer_id_behind_an_address_is_cut_off() -> None:
    address = "/ip4/192.0.2.1/tcp/4001"
    registry = PeerRegistry(
        [Peer(name="b", peer_id=PEER_ID, virtual_ip="10.86.0.2", addresses=(f"{address}/p2p/{PEER_ID}",))]
    )
    assert registry.members()[0].addresses == (address,)


def test_another_list_says_what_is_different_and_holds_at_once() -> None:
    def peer(number: int, *, name: str = "", at: str = "192.0.2.1") -> Peer:
        return Peer(
            name=name or f"p{number}",
            peer_id=f"id{number}",
            virtual_ip=f"10.86.0.{number}",
            addresses=(f"/ip4/{at}/tcp/4001",),
        )

    def names(members: tuple[Member, ...]) -> list[str]:
        return [member.name for member in members]

    registry = PeerRegistry([peer(1), peer(2), peer(3), peer(4)])
    assert not registry.replace([peer(4), peer(3), peer(2), peer(1)]), "the order says nothing"
    change = registry.replace([peer(5), peer(1), peer(2, name="other"), peer(3, at="192.0.2.2")])
    assert names(change.added) == ["p5"] and names(change.removed) == ["p4"]
    assert [(before.name, after.name) for before, after in change.changed] == [("p2", "other"), ("p3", "p3")]
    assert change.changed[1][1].addresses == ("/ip4/192.0.2.2/tcp/4001",)
    assert registry.find("id4") is None and registry.find("id5") == change.added[0]


def test_keys_of_the_distributed_table_are_short_enough_to_be_found() -> None:
    assert len(dht_key(PEER_ID).encode()) <= MAX_KEY_BYTES < len(f"/vpn/mapping/{PEER_ID}")
    assert dht_key(PEER_ID) != dht_key(PEER_ID[:-1] + "M")
