"""A member against a real node, with what is cheap to send and dear to take; beside it another member's ping.

The member is one by its key alone: the test says libp2p's handshake for it, and then the session protocol by hand.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator

import pytest
from attack_tools import ATTACK_S, LONG, During, assert_unharmed, beside, dialed
from lab import Lab, Node, mesh_of_nodes, wait_until
from lab.flooder import TINY, Member
from lab.node import ROOT
from lab.stranger import Refused
from simulation.packets import number_of, record
from stream.pair import FLOODS, OPENING

from shards.stream import spec, yamux

pytestmark = [pytest.mark.root, pytest.mark.alone]

#: An honest member's longest round trip beside a flood.
MOST_MS = 10.0


def member(source: Node, target: Node) -> Member:
    """`source`, which does not run, in a session with `target`."""
    return Member(source.state_dir, dialed(source.namespace, target))


begun_s = time.monotonic()


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two that run, each with one shard, so that everything meets in it; and one of which only the key is used."""
    with Lab(3) as lab:
        nodes = mesh_of_nodes(lab, shards=1)
        a, b, _ = nodes
        for node in (a, b):
            node.start()
        for node in (a, b):
            node.wait_ready()
        peer = a.peer_id()
        wait_until(lambda: state(b, peer) == "connected", 15, "a and b are connected")
        yield nodes


def assert_not_held_up(during: During) -> None:
    """Not one round trip takes long, but for what the node's processes wait for a CPU where other programs want it too:
    from a shard that a flood keeps busy the kernel takes it for 50 ms in each second then (the fair server, or
    sched_rt_runtime_us)."""
    assert_unharmed(during)
    assert during.beside is not None and during.beside.max_ms <= MOST_MS + during.waited_ms


def state(node: Node, peer_id: str) -> str:
    return str(next(peer["state"] for peer in node.ask()["peers"] if peer["peer_id"] == peer_id))


def counters(node: Node) -> dict[str, int]:
    found: dict[str, int] = node.ask()["shards"][0]
    return found


def flood(nodes: list[Node], kind: str, seconds: float) -> int:
    """m does that to b, while the others do what they do: how many of its sessions b has ended."""
    _, b, m = nodes
    words = (kind, str(m.state_dir), b.namespace.address, m.virtual_ip, b.virtual_ip, str(seconds))
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = b.lab.run(m.namespace, sys.executable, "-m", "lab.flooder", *words, env={"PYTHONPATH": path})
    return int(done.stdout)


@pytest.mark.parametrize("kinds", [[kind] for kind in FLOODS] if LONG else [list(FLOODS)], ids=str)
def test_a_flood_of_control_frames_costs_the_member_its_session(nodes: list[Node], kinds: list[str]) -> None:
    a, b, m = nodes
    before = counters(b)
    with beside(a, b) as during:
        sessions = [flood(nodes, kind, ATTACK_S / len(kinds)) for kind in kinds]
    after = counters(b)
    print(f"{sessions} sessions ended, of {kinds}")
    lines = re.findall(rf"session \w+ with {m.namespace.label}\b", b.log_file.read_text())
    assert len(lines) <= 3 * (1 + (time.monotonic() - begun_s) // 60), (
        "they begin, end, and streams do not open"
    )
    assert min(sessions) >= 1
    assert after["session_floods"] - before["session_floods"] >= sum(sessions)
    assert_not_held_up(during)


def test_tiny_packets_take_no_more_than_their_turn(nodes: list[Node]) -> None:
    """They may be honest, so the session stays; but a thousand in one message are gone through bit by bit."""
    a, b, _ = nodes
    before = counters(b)
    with beside(a, b) as during:
        assert not flood(nodes, TINY, ATTACK_S)
    after = counters(b)
    assert after["packets_received"] - before["packets_received"] > 10_000
    assert_not_held_up(during)


def test_beginnings_of_packets_cost_the_member_its_session_and_are_forgotten(nodes: list[Node]) -> None:
    """64 streams in each of many sessions, and in each stream a packet of which the last byte does not come."""
    a, b, m = nodes
    large = record(number_of(m.virtual_ip), number_of(b.virtual_ip), 9, 0, 60_000)[:-1]
    before, resident = counters(b), shard_bytes(b)
    members: list[Member] = []
    most = 0
    with beside(a, b) as during:
        end_s = time.monotonic() + ATTACK_S
        while time.monotonic() < end_s and len(members) < 20:
            try:
                sender = member(m, b)
                members.append(sender)
                for number in range(3, 123, 2):
                    sender.send(
                        yamux.window_update(number, 0, spec.FLAG_SYN) + yamux.data_frame(number, OPENING)
                    )
                    sender.send(yamux.data_frame(number, large))
            except (TimeoutError, Refused, OSError):
                pass
            most = max(most, shard_bytes(b))
    for sender in members:
        sender.sock.close()
    after = counters(b)
    assert after["session_floods"] > before["session_floods"]
    assert most - resident < 100 << 20, "sessions have buffers, of a megabyte or two"
    wait_until(lambda: shard_bytes(b) - resident < 20 << 20, 10, "they are forgotten")
    assert_unharmed(during)


def shard_bytes(node: Node) -> int:
    """Memory of its shard."""
    pid = node.ask()["shards"][0]["pid"]
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096
