"""Strangers against the datagrams of real nodes: what they make up, send again, change, or send as somebody else.

Whose keys they are nobody knows; so none is answered, each is counted, and honest members' datagrams, which have the
same socket, come through beside them.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from attack_tools import ATTACK_S, LONG, arena, assert_unharmed, beside, stranger_of
from lab import Namespace, Node, inside, ping, wait_until
from lab.network import DEVICE
from lab.node import P2P_PORT

pytestmark = [pytest.mark.root, pytest.mark.alone]  # round trips are compared

#: Everything in datagrams, the pings beside the attack too.
SETTINGS = {"choice": "datagrams", "least_rtt": "0ms"}
RATE_HZ = 20_000
BATCH = 200
ETH_P_IP = 0x0800
#: Receiver and counter stand in front of what is sealed.
HEADER = struct.Struct("!IQ")
FAR_AHEAD = 1 << 24


class Seen(NamedTuple):
    """A datagram on the wire."""

    source: tuple[str, int]
    target: tuple[str, int]
    body: bytes


class Wire:
    """What is sent and received by UDP at a namespace's device."""

    def __init__(self, namespace: Namespace) -> None:
        with inside(namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
            self._socket.bind((DEVICE, ETH_P_IP))
        self._socket.settimeout(0.2)

    def datagrams(self, count: int = 1 << 20, seconds: float = 5.0) -> Iterator[Seen]:
        """So many, or those until nothing has come for a moment, or the time is over."""
        end_s = time.monotonic() + seconds
        while count and time.monotonic() < end_s:
            try:
                packet = self._socket.recv(1 << 16)
            except TimeoutError:
                return
            head = (packet[0] & 15) * 4
            if packet[9] == socket.IPPROTO_UDP:
                ports = struct.unpack_from("!HH", packet, head)
                ends = [socket.inet_ntoa(packet[at : at + 4]) for at in (12, 16)]
                yield Seen((ends[0], ports[0]), (ends[1], ports[1]), packet[head + 8 :])
                count -= 1


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with arena(2, carrier=SETTINGS) as nodes:
        for node in nodes:
            wait_until(
                lambda node=node: node.ask()["peers"][0]["datagrams"] == "used", 15, "datagrams arrive"
            )
        yield nodes


Attack = tuple[Callable[[Seen], Seen], str, bool]


def made_up(seen: Seen) -> Seen:
    return seen._replace(body=os.urandom(4) + seen.body[4:])


def again(seen: Seen) -> Seen:
    return seen


def changed(seen: Seen) -> Seen:
    receiver, _ = HEADER.unpack_from(seen.body)
    return seen._replace(body=HEADER.pack(receiver, FAR_AHEAD) + seen.body[HEADER.size :])


#: How they are made, as what they are counted, and whether they are sent in the peer's name.
ATTACKS = [(made_up, "unknown", False), (again, "replayed", True), (changed, "forged", False)]
if LONG:
    ATTACKS += [(make, counted, not as_the_peer) for make, counted, as_the_peer in ATTACKS]


@pytest.mark.parametrize("attacks", [[one] for one in ATTACKS] if LONG else [ATTACKS])
def test_datagrams_of_strangers_are_counted_unanswered_and_cost_members_nothing(
    nodes: list[Node], attacks: list[Attack]
) -> None:
    a, b = nodes
    source = stranger_of(a)
    wire, here = Wire(b.namespace), Wire(source)
    ping(a.lab, a.namespace, b.virtual_ip, count=50)
    caught = [one for one in wire.datagrams() if one.target == (b.namespace.address, P2P_PORT)][:40]
    assert len(caught) == 40
    sent, before = {}, counts(b)
    with beside(a, b) as during:
        for make, counted, as_the_peer in attacks:
            sent[counted] = shower(source, list(map(make, caught)), as_the_peer, ATTACK_S / len(attacks))
    after = counts(b)
    came = {counted: after[counted] - before[counted] for counted in sent}
    print(f"sent {sent}, counted {came}")
    assert all(came[counted] > 0.9 * count for counted, count in sent.items())
    assert not [one for one in here.datagrams() if one.source == (b.namespace.address, P2P_PORT)]
    assert b.ask()["peers"][0]["datagrams"] == "used"
    assert_unharmed(during)


def shower(source: Namespace, bad: list[Seen], as_the_peer: bool, seconds: float) -> int:
    """Send them again and again: how many."""
    with inside(source):
        kind = (socket.SOCK_RAW, socket.IPPROTO_RAW) if as_the_peer else (socket.SOCK_DGRAM, 0)
        sock = socket.socket(socket.AF_INET, *kind)
    ready = [with_headers(one) if as_the_peer else one.body for one in bad]
    targets = [(one.target[0], 0) if as_the_peer else one.target for one in bad]
    begun_s, sent = time.monotonic(), 0
    with sock:
        while time.monotonic() < begun_s + seconds:
            for number in range(sent, sent + BATCH):
                sock.sendto(ready[number % len(ready)], targets[number % len(ready)])
            sent += BATCH
            time.sleep(max(0.0, begun_s + sent / RATE_HZ - time.monotonic()))
    return sent


def with_headers(one: Seen) -> bytes:
    """An IPv4 packet in the name of who sent it; UDP may do without a sum."""
    udp = struct.pack("!HHHH", one.source[1], one.target[1], 8 + len(one.body), 0) + one.body
    ends = socket.inet_aton(one.source[0]) + socket.inet_aton(one.target[0])
    return struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, socket.IPPROTO_UDP, 0) + ends + udp


def counts(node: Node) -> dict[str, int]:
    """What its shards have refused of datagrams."""
    shards = node.ask()["shards"]
    return {
        name: sum(shard[f"datagrams_{name}"] for shard in shards)
        for name in ("unknown", "replayed", "forged")
    }
