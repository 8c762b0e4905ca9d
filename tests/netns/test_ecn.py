"""Marks of congestion (ECN) through real nodes: what programs say of their packets is on the datagrams that carry them,
and what a router on the way marks comes to the programs."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from lab import Lab, Namespace, Node, inside, running_nodes, wait_until

pytestmark = [pytest.mark.root]

NOT_CAPABLE, CAPABLE, MARKED = 0, 2, 3
PORT = 7000
SETTINGS = {"carrier": {"choice": "auto", "least_rtt": "0ms"}}
#: As many datagrams as go out in one system call, and one.
COUNTS = (20, 1)


def test_marks_of_the_way_arrive_where_they_are_heeded() -> None:
    with running_nodes(shards=1, settings=SETTINGS) as (a, b):
        for node in (a, b):
            wait_until(lambda node=node: state(node) == "used", 15, "datagrams arrive")
        assert arrives(a, b, CAPABLE) == {CAPABLE} and arrives(a, b, NOT_CAPABLE) == {NOT_CAPABLE}
        with router(a.lab, b.namespace) as marked:
            assert arrives(a, b, NOT_CAPABLE) == {NOT_CAPABLE} and marked() == 0
            assert arrives(a, b, CAPABLE) == {MARKED}
            assert 0 < marked() <= b.ask()["shards"][0]["datagrams_marked"]


def state(node: Node) -> str:
    return str(node.ask()["peers"][0]["datagrams"])


def arrives(a: Node, b: Node, bits: int) -> set[int]:
    """ECN bits of what comes of packets that are sent with these."""
    with inside(a.namespace):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with inside(b.namespace):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender, receiver:
        receiver.bind((b.virtual_ip, PORT))
        receiver.settimeout(5.0)
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, bits)
        seen = set()
        for count in COUNTS:
            for _ in range(count):
                sender.sendto(bytes(1000), (b.virtual_ip, PORT))
            for _ in range(count):
                _, ((_, _, tos),), _, _ = receiver.recvmsg(2000, 100)
                seen.add(tos[0] & 3)
        return seen


@contextmanager
def router(lab: Lab, namespace: Namespace) -> Iterator[Callable[[], int]]:
    """Inside the block a router in front of a namespace marks what may be marked: gives a function, how many."""
    rules = (
        "add table ip lab_ecn;"
        " add chain ip lab_ecn incoming { type filter hook input priority -300 ; };"
        " add rule ip lab_ecn incoming iifname eth0 meta l4proto udp ip ecn ect0 counter ip ecn set ce"
    )
    lab.run(namespace, "nft", rules)

    def marked() -> int:
        listed = lab.run(namespace, "nft", "list", "table", "ip", "lab_ecn").stdout
        found = re.search(r"counter packets (\d+)", listed)
        assert found
        return int(found[1])

    try:
        yield marked
    finally:
        lab.run(namespace, "nft", "delete table ip lab_ecn")
