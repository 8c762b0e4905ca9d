"""A member against a real node, with what is cheap to send and dear to take; beside it another member's ping.

The member is one by its key alone: the test says libp2p's handshake for it, and then the session protocol by hand.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
from attack_tools import ATTACK_S, LONG, During, assert_unharmed, beside, dialed
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from lab import Lab, Node, mesh_of_nodes, wait_until
from lab.stranger import NOISE, Plain, Refused, Secured, honest
from simulation.packets import LEAST_BYTES, number_of, record
from stream.pair import FLOODS, OPENING

from shards.stream import spec, yamux

pytestmark = [pytest.mark.root, pytest.mark.alone]

SESSION = "/vpnd/yamux/1.0.0"
#: So much fits into one Noise message.
MESSAGE_BYTES = 65_000
#: Between two messages of a flood.
PAUSE_S = 0.004
#: An honest member's longest round trip beside a flood.
MOST_MS = 10.0
OPEN = yamux.window_update(1, 0, spec.FLAG_SYN) + yamux.data_frame(1, OPENING)


class Member(Secured):
    """A session with `target`, as `source` would have it, with one stream open."""

    def __init__(self, source: Node, target: Node) -> None:
        key = load_pem_private_key((source.state_dir / "identity.pem").read_bytes(), None)
        sock = dialed(source.namespace, target)
        Plain(sock).select(NOISE)
        super().__init__(sock, honest(key), initiator=True)  # type: ignore[arg-type]
        self.select(SESSION)
        self.send(OPEN)

    def ended(self) -> bool:
        """Whether the target has hung up; what it says is not listened to."""
        self.sock.setblocking(False)
        try:
            while data := self.sock.recv(1 << 16):
                del data
            return True
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.sock.settimeout(5.0)


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
    """Not one round trip takes long; but on a machine that others use, a few may without any attack."""
    assert_unharmed(during)
    assert during.beside is not None and during.beside.p99_ms <= MOST_MS
    assert not LONG or during.beside.max_ms <= max(MOST_MS, 2 * during.before.max_ms)


def state(node: Node, peer_id: str) -> str:
    return str(next(peer["state"] for peer in node.ask()["peers"] if peer["peer_id"] == peer_id))


def counters(node: Node) -> dict[str, int]:
    found: dict[str, int] = node.ask()["shards"][0]
    return found


def flood(member: Member, message: Callable[[int], bytes], until_s: float) -> None:
    """Send frames, as many as fit into a message, until the target hangs up."""
    number = 0
    while time.monotonic() < until_s and not member.ended():
        frames = bytearray(message(number))
        number += 1
        while len(frames) + (size := len(following := message(number))) <= MESSAGE_BYTES and size:
            frames += following
            number += 1
        try:
            member.send(bytes(frames))
        except OSError:
            return
        time.sleep(
            PAUSE_S
        )  # the attacker has its own machine elsewhere, and here it is not to take the CPU from anybody


@pytest.mark.parametrize("kinds", [[kind] for kind in FLOODS] if LONG else [list(FLOODS)], ids=str)
def test_a_flood_of_control_frames_costs_the_member_its_session(nodes: list[Node], kinds: list[str]) -> None:
    a, b, m = nodes
    before, sessions = counters(b), 0
    with beside(a, b) as during:
        end_s = time.monotonic() + ATTACK_S
        while time.monotonic() < end_s:
            try:
                member = Member(m, b)
            except (TimeoutError, Refused, OSError):
                continue
            flood(member, FLOODS[kinds[sessions % len(kinds)]], end_s)
            member.sock.close()
            sessions += 1
    after = counters(b)
    lines = re.findall(rf"session \w+ with {m.namespace.label}\b", b.log_file.read_text())
    assert len(lines) <= 3 * (1 + (time.monotonic() - begun_s) // 60), (
        "they begin, end, and streams do not open"
    )
    assert sessions > 1
    assert after["session_floods"] - before["session_floods"] >= sessions - 1
    assert_not_held_up(during)


def test_tiny_packets_take_no_more_than_their_turn(nodes: list[Node]) -> None:
    """They may be honest, so the session stays; but a thousand in one message are gone through bit by bit."""
    a, b, m = nodes
    tiny = record(number_of(m.virtual_ip), number_of(b.virtual_ip), 9, 0, LEAST_BYTES)
    frame = yamux.data_frame(1, tiny * ((MESSAGE_BYTES - 100) // len(tiny)))
    before = counters(b)
    with beside(a, b) as during:
        member = Member(m, b)
        flood(member, lambda _: frame, time.monotonic() + ATTACK_S)
        assert not member.ended()
        member.sock.close()
    after = counters(b)
    assert after["packets_received"] - before["packets_received"] > 10_000
    assert_not_held_up(during)


def test_beginnings_of_packets_cost_the_member_its_session_and_are_forgotten(nodes: list[Node]) -> None:
    """64 streams in each of many sessions, and in each stream a packet of which the last byte does not come."""
    a, b, m = nodes
    large = record(number_of(m.virtual_ip), number_of(b.virtual_ip), 9, 0, 60_000)[:-1]
    before, resident = counters(b), shard_bytes(b)
    members, most = [], 0
    with beside(a, b) as during:
        end_s = time.monotonic() + ATTACK_S
        while time.monotonic() < end_s and len(members) < 20:
            try:
                member = Member(m, b)
                members.append(member)
                for number in range(3, 123, 2):
                    member.send(
                        yamux.window_update(number, 0, spec.FLAG_SYN) + yamux.data_frame(number, OPENING)
                    )
                    member.send(yamux.data_frame(number, large))
            except (TimeoutError, Refused, OSError):
                pass
            most = max(most, shard_bytes(b))
    for member in members:
        member.sock.close()
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
