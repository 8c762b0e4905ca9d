"""Cryptokey routing where networks of peers lie within each other: what a peer may send from is what it is sent."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from shards.peer.table import PeerTable, Sources
from vpnd.config.live import Live
from vpnd.config.schema import Config


class StandIn:
    """What the table touches of a peer."""

    def __init__(self, peer_id: str, name: str) -> None:
        self.peer_id, self.name = peer_id, name
        self.prefixes: tuple[str, ...] = ()
        self.sources = Sources()

    def owners_changed(self, owned: Any) -> None:
        return

    def end(self) -> None:
        return


EXIT = ("10.86.0.1/32", "fd86::1/128", "0.0.0.0/0", "::/0")
BROAD = ("10.86.0.2/32", "10.0.0.0/8")
PLAIN = ("10.86.0.3/32", "fd86::3/128")
ROUTER = ("10.86.0.4/32", "10.7.0.0/16")


def peer_table() -> PeerTable:
    return PeerTable(
        StandIn, {"no_route": 0}, Live(Config()), lambda _: None, lambda *_: None, lambda *_: None
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("peer", "source", "allowed"),
    [
        ("plain", "10.86.0.3", True),  # its own address
        ("plain", "10.86.0.4", False),  # another's
        ("plain", "192.0.2.1", False),  # from anywhere
        ("exit", "192.0.2.1", True),  # that is what an exit node is for
        ("exit", "2001:db8::1", True),
        ("exit", "10.86.0.1", True),
        ("exit", "10.86.0.3", False),  # another's, though it lies in the network of all addresses
        ("exit", "fd86::3", False),
        ("exit", "10.7.0.1", False),  # nor what another one announces
        ("broad", "10.9.0.1", True),
        ("broad", "10.86.0.3", False),  # the VPN's own subnet lies in what it announces
        ("broad", "10.7.0.1", False),  # a part is announced by another one
        ("router", "10.7.0.1", True),
        ("router", "10.9.0.1", False),
    ],
)
def test_a_peer_sends_from_what_is_sent_to_it(peer: str, source: str, allowed: bool) -> None:
    table = peer_table()
    peers = {"exit": EXIT, "broad": BROAD, "plain": PLAIN, "router": ROUTER}
    for name, prefixes in peers.items():
        table.know(name, name, prefixes)
    address = ipaddress.ip_address(source)
    known = table.get(peer)
    assert known is not None
    assert bool(known.sources.find(address.version, int(address))) == allowed


def test_what_another_gives_up_may_be_sent_from_again() -> None:
    table = peer_table()
    broad = table.know("broad", "broad", BROAD)
    table.know("plain", "plain", PLAIN)
    version, number = 4, int(ipaddress.ip_address("10.86.0.3"))
    assert not broad.sources.find(version, number)
    table.forget("plain")
    assert broad.sources.find(version, number)
