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
from attack_tools import ATTACK_S, LONG, During, arena, assert_unharmed, beside, come_in, counter, dialed
from lab import Lab, Node, mesh_of_nodes, wait_until
from lab.flooder import BARE, DATAGRAMS, RECONNECTING, TINY, Member
from lab.node import ROOT
from lab.stranger import Refused
from simulation.packets import number_of, record
from stream.pair import FLOODS, OPENING

from shards.stream import spec, yamux
from vpnd import identity
from vpnd.session import SUBNET_NODE

pytestmark = [pytest.mark.root, pytest.mark.alone]

#: An honest member's longest round trip beside a flood.
MOST_MS = 10.0
#: Of a CPU that a process has at real-time priority before Linux takes it (sched_rt_runtime_us, the fair server).
MOST_SHARE = 0.95


def member(source: Node, target: Node) -> Member:
    """`source`, which does not run, in a session with `target`."""
    return Member(source.state_dir, dialed(source.namespace, target))


#: Until a program has started.
START_S = 1.0

begun_s = time.monotonic()


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two that run, each with one shard, so that everything meets in it; and two of which only the key is used, the
    second of them a subnet node."""
    with Lab(4) as lab:
        nodes = mesh_of_nodes(lab, shards=1)
        a, b, _, old = nodes
        for peer in b.config["peers"]:
            if peer["peer_id"] == old.peer_id():
                peer["protocol"] = SUBNET_NODE
        for node in (a, b):
            node.start()
        for node in (a, b):
            node.wait_ready()
        peer = a.peer_id()
        wait_until(lambda: state(b, peer) == "connected", 15, "a and b are connected")
        yield nodes


def assert_not_held_up(during: During) -> None:
    """Not one round trip takes long, and few take half of that. What the machine does to a node's processes is not
    theirs to answer for; but of one that takes more of its CPU than the kernel lets it, the wait is its own doing."""
    assert_unharmed(during)
    assert during.share <= MOST_SHARE
    assert during.beside is not None and during.beside.max_ms <= MOST_MS + during.waited_ms
    assert during.beside.p99_ms <= MOST_MS / 2 + during.waited_ms


def state(node: Node, peer_id: str) -> str:
    return str(next(peer["state"] for peer in node.ask()["peers"] if peer["peer_id"] == peer_id))


def counters(node: Node) -> dict[str, int]:
    found: dict[str, int] = node.ask()["shards"][0]
    return found


def flood(nodes: list[Node], *kinds: str) -> list[int]:
    """m, or the subnet node, does that to b, one after the other, while the others do what they do: what the flooder
    counts of each."""
    b, m = nodes[1], nodes[3 if kinds == (BARE,) else 2]
    words = (",".join(kinds), str(m.state_dir), b.namespace.address, m.virtual_ip, b.virtual_ip)
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    program = (sys.executable, "-m", "lab.flooder", *words, str(ATTACK_S / len(kinds)))
    return [*map(int, b.lab.run(m.namespace, *program, env={"PYTHONPATH": path}).stdout.split())]


@pytest.mark.parametrize("kinds", [[kind] for kind in FLOODS] if LONG else [list(FLOODS)], ids=str)
def test_a_flood_of_control_frames_costs_the_member_its_session(nodes: list[Node], kinds: list[str]) -> None:
    a, b, m, _ = nodes
    before = counters(b)
    with beside(a, b, ATTACK_S + START_S) as during:
        sessions = flood(nodes, *kinds)
    after = counters(b)
    print(f"{sessions} sessions ended, of {kinds}")
    lines = re.findall(rf"session \w+ with {m.namespace.label}\b", b.log_file.read_text())
    assert len(lines) <= 3 * (1 + (time.monotonic() - begun_s) // 60), (
        "they begin, end, and streams do not open"
    )
    assert min(sessions) >= 1
    assert after["session_floods"] - before["session_floods"] >= sum(sessions)
    assert_not_held_up(during)


@pytest.mark.parametrize("kind", [TINY, BARE])
def test_tiny_packets_take_no_more_than_their_turn(nodes: list[Node], kind: str) -> None:
    """They may be honest, so the session stays; but a thousand in one message are gone through bit by bit."""
    a, b, *_ = nodes
    before = counters(b)
    with beside(a, b, ATTACK_S + START_S) as during:
        assert flood(nodes, kind) == [0]
    after = counters(b)
    assert after["packets_received"] - before["packets_received"] > 10_000
    assert_not_held_up(during)


@pytest.mark.parametrize("kinds", [[kind] for kind in DATAGRAMS] if LONG else [list(DATAGRAMS)], ids=str)
def test_a_members_own_datagrams_take_no_more_than_their_turn(nodes: list[Node], kinds: list[str]) -> None:
    """They open, and none of them breaks a rule."""
    a, b, *_ = nodes
    before = counters(b)
    with beside(a, b, ATTACK_S + START_S) as during:
        assert flood(nodes, *kinds) == [0] * len(kinds)
    after = counters(b)
    came = after["datagrams_received"] - before["datagrams_received"]
    print(f"{came} datagrams, {after['packets_received'] - before['packets_received']} packets")
    assert came > 10_000
    assert_not_held_up(during)


def test_sessions_that_begin_and_end_without_pause_cost_packets_nothing(nodes: list[Node]) -> None:
    """As fast as the node says its part of the handshake, which others come by meanwhile."""
    a, b, *_ = nodes
    before = counters(b)
    with beside(a, b, ATTACK_S + START_S) as during:
        (begun,) = flood(nodes, RECONNECTING)
    after = counters(b)
    print(f"{begun} sessions")
    assert begun > ATTACK_S
    for what in ("opened", "closed"):
        assert after[f"sessions_{what}"] - before[f"sessions_{what}"] >= begun - 1
    assert_not_held_up(during)


#: Handshakes of a member within a minute; how long an honest one may take beside one that goes beyond.
MOST_HANDSHAKES, SOON_S = 16, 1.0


@pytest.mark.setting("p2p.max_handshakes_per_peer")
def test_a_member_that_connects_without_end_is_refused_counted_and_named() -> None:
    limits = {"max_handshakes_per_peer": MOST_HANDSHAKES, "max_sessions_per_peer": MOST_HANDSHAKES}
    with arena(3, p2p=limits) as (a, b, m):
        m.stop()
        accepted, began_s = counter(b, "sessions_accepted"), time.monotonic()
        with beside(a, b, ATTACK_S + START_S) as during:
            flood([a, b, m], RECONNECTING)
            key = identity.read_private(a.state_dir / "identity.pem")
            assert come_in(a.namespace, b, key) < SOON_S
        assert counter(b, "sessions_accepted") - accepted <= MOST_HANDSHAKES
        refused = counter(b, "refused_handshake_rate")
        assert 1 <= refused <= time.monotonic() - began_s + 2, "then its source gets in once a second"
        assert counter(b, "refused_connect_rate") > refused
        peers = {peer["peer_id"]: peer["refused"] for peer in b.ask()["peers"]}
        assert peers == {a.peer_id(): 0, m.peer_id(): refused}
        assert f"comes too often, {refused} handshake" in b.vpnd("status").stdout
        assert b.log_file.read_text().count(f"more than {MOST_HANDSHAKES} handshakes a minute") == 1
        assert_unharmed(during)


def test_beginnings_of_packets_cost_the_member_its_session_and_are_forgotten(nodes: list[Node]) -> None:
    """64 streams in each of many sessions, and in each stream a packet of which the last byte does not come."""
    a, b, m, _ = nodes
    large = record(number_of(m.virtual_ip), number_of(b.virtual_ip), 9, 0, 60_000)[:-1]
    before, resident = counters(b), shard_bytes(b)
    members: list[Member] = []
    most = 0
    with beside(a, b, ATTACK_S + START_S) as during:
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
