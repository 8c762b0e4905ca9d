"""What goes through two nodes comes out the same, whatever the two differ in."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator

import pytest
from lab import Node, drops, iperf3, ping, received_bytes, running_nodes, settled, tcp_transfer, udp_flow

pytestmark = pytest.mark.root

MEBIBYTE = 1 << 20
#: What a variant does to the configurations.
Change = Callable[[list[Node]], None]
#: Streams fill whatever queue there is and learn their rate from what it drops.
CONGESTION = {"tun_queue_full", "ring_full", "queue_full"}


def ipv6(nodes: list[Node]) -> None:
    """The same two nodes with addresses of IPv6 inside the tunnel."""
    for place, node in enumerate(nodes, start=1):
        node.config["network"] |= {"virtual_ip": f"fd86::{place}", "subnet": 64, "routes": ["fd86::/64"]}
        for peer in node.config["peers"]:
            peer["virtual_ip"] = f"fd86::{3 - place}"


def only_first(table: str, **keys: object) -> Change:
    def change(nodes: list[Node]) -> None:
        nodes[0].config.setdefault(table, {}).update(keys)

    return change


def mtus(nodes: list[Node]) -> None:
    nodes[0].config["network"]["mtu"] = 9000
    nodes[0].config["session"] = {"cipher": "chachapoly"}
    nodes[1].config["network"]["mtu"] = 576


def one_shard(nodes: list[Node]) -> None:
    nodes[0].config["worker"]["shards"] = 1
    nodes[0].config["network"]["coalesce_udp"] = False


VARIANTS: dict[str, Change | None] = {
    "two equal nodes": None,
    "IPv6 inside the tunnel": ipv6,
    "one without superpackets": only_first("network", offloads=False),
    "one with one shard and without merged datagrams": one_shard,
    "one with an mtu of 9000 and ChaCha20-Poly1305 only, one with an mtu of 576": mtus,
}


@pytest.fixture(scope="module", params=list(VARIANTS.values()), ids=list(VARIANTS))
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Node, Node]]:
    with running_nodes(change=request.param) as (a, b):
        yield a, b
        for node in (a, b):
            assert set(drops(settled(node))) <= CONGESTION


def test_pings_of_any_size_are_answered(pair: tuple[Node, Node]) -> None:
    for one, other in (pair, pair[::-1]):
        for size in (16, 56, 1372, 1373, 10_000, 65_000):
            answer = ping(one.lab, one.namespace, other.virtual_ip, count=5, size=size)
            assert answer.loss == 0, f"{size} bytes from {one.namespace.label}"


def test_streams_carry_every_byte_in_both_directions(pair: tuple[Node, Node]) -> None:
    for one, other in (pair, pair[::-1]):
        for reverse in (False, True):
            tcp_transfer(one.namespace, other.namespace, other.virtual_ip, 24 * MEBIBYTE, reverse=reverse)


def test_a_tunnel_of_the_kernels_within_carries_every_byte(pair: tuple[Node, Node]) -> None:
    """The checksum that is left to fill in is the innermost one."""
    ends = pair, pair[::-1]
    try:
        for place, (one, other) in enumerate(ends, start=1):
            link = ("type", "vxlan", "id", "5", "dstport", "4789")
            link += ("local", one.virtual_ip, "remote", other.virtual_ip)
            one.lab.ip(one.namespace, "link", "add", "vx0", *link)
            one.lab.ip(one.namespace, "addr", "add", f"10.99.0.{place}/24", "dev", "vx0")
            one.lab.ip(one.namespace, "link", "set", "vx0", "mtu", "450", "up")
        for one, other in ends:
            place = ends.index((other, one)) + 1
            tcp_transfer(one.namespace, other.namespace, f"10.99.0.{place}", MEBIBYTE)
    finally:
        for one in pair:
            one.lab.ip(one.namespace, "link", "del", "vx0")


def test_datagrams_of_a_flow_stay_in_order(pair: tuple[Node, Node]) -> None:
    a, b = pair
    for one, other in ((a, b), (b, a)):
        for size in (1200, 100):
            run = udp_flow(one.namespace, other.namespace, other.virtual_ip, count=2000, size=size)
            assert (run.late, run.twice, run.damaged) == (0, 0, 0)
            assert run.received == run.sent


def test_many_streams_at_once_keep_their_own_bytes(pair: tuple[Node, Node]) -> None:
    a, b = pair

    def one_flow(number: int) -> float:
        return tcp_transfer(a.namespace, b.namespace, b.virtual_ip, 2 * MEBIBYTE, reverse=bool(number % 2))

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert len(list(pool.map(one_flow, range(24)))) == 24


def test_an_ordinary_tool_measures_through_it(pair: tuple[Node, Node]) -> None:
    a, b = pair
    assert (
        received_bytes(iperf3(a.lab, a.namespace, b.namespace, b.virtual_ip, flows=8, seconds=1)) > MEBIBYTE
    )
