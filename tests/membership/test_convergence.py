"""200 nodes, 1,000 members: what it takes until all know all, and until all know who is out."""

from __future__ import annotations

import gc
import random

import pytest
from gossip_net import Net
from membership_world import NETWORK, key, membership, peer, public

from vpnd.membership.statements import Removal, sign

NODES = [f"n{number}" for number in range(200)]
DEGREE = 4
#: One node of so many has news at the start.
PER_SOURCE = 10


@pytest.fixture(autouse=True)
def no_collector():
    """Some million objects, none of them garbage: looking through them again and again doubles the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def statements():
    return [
        membership(f"m{number}", addresses=(f"10.86.{1 + number // 250}.{1 + number % 250}",))
        for number in range(1000)
    ]


def connected_net(dice: random.Random) -> Net:
    """Each node has dialed `DEGREE` / 2 random others, the one before it among them, so that all hang together."""
    net = Net(NODES)
    for place, node in enumerate(NODES):
        others = {NODES[place - 1]} | set(dice.sample(NODES, DEGREE // 2 - 1))
        for other in sorted(others - {node}):
            net.connect(node, other)
    return net


def test_directories_converge_in_bounded_hops_and_bytes(statements):
    dice = random.Random(7)
    net = connected_net(dice)
    net.run()
    net.hops = net.bytes = net.messages = 0
    for place, node in enumerate(NODES[::PER_SOURCE]):
        net.publish(node, *statements[place :: len(NODES) // PER_SOURCE])
    net.run()
    assert all(len(held.index) == 1000 for held in net.directories.values())
    assert net.equal()
    # what reaches 200 nodes with four neighbours each in a few hops; a hop is half a round trip
    assert net.hops <= 25
    total = sum(len(one.wire) for one in statements) * len(NODES)
    assert net.bytes < 3.5 * total

    removed = dice.sample(range(1000), 10)
    net.hops = net.bytes = 0
    for number in removed:
        body = Removal(
            network=NETWORK.id, signer=public("root"), peer_id=peer(f"m{number}"), issued_ms=net.now_ms
        )
        net.publish(dice.choice(NODES), sign(key("root"), body))
    net.run()
    assert net.hops <= 25
    for held in net.directories.values():
        assert len(held.members(net.now_ms)) == 990
        assert not any(held.find(peer(f"m{number}"), net.now_ms) for number in removed)

    net.bytes = 0
    net.round()
    assert net.bytes < 100 * len(NODES), "an interval without news costs each node a hundred bytes"
    assert net.refused == []
