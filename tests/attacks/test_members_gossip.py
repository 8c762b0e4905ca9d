"""A member against the others of its network, with what it may say and ask there: where it is, and where others are."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean

import msgspec
import pytest
from attack_tools import ATTACK_S, LONG, assert_unharmed, beside, dialed, say
from lab import Lab, Namespace, Node, check_logs, wait_until
from lab.joining import address, all_reach_all, join, machine
from lab.network import DEVICE
from lab.node import P2P_PORT, ROOT
from lab.sockets import inside
from lab.stranger import NOISE, Plain, Refused, Secured, honest
from libp2p.kad_dht.pb.kademlia_pb2 import Message as TableMessage

from vpnd import identity, why
from vpnd.config.schema import Nat
from vpnd.nat import messages as meeting
from vpnd.peerid import from_public_key

pytestmark = [pytest.mark.root, pytest.mark.alone]  # round trips are compared

SETTLE_S = 20.0
#: What a node that is told may send to a third party: a dial at once, those of its backoff, and then one in each
#: retry.max_interval.
MOST_SYNS = 15
#: By how much longer a status may take meanwhile, on average; so often it is looked at.
LONGER_S = 0.2
STATUSES = 5
LOOK_UPS = 24
NOBODY = from_public_key(bytes(32))
ETH_P_IP, SYN, ACK = 0x0800, 0x02, 0x10


class Syns:
    """Counts the SYNs that come to a namespace, by who sends them. A context manager."""

    def __init__(self, namespace: Namespace, device: str = DEVICE) -> None:
        with inside(namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
            self._socket.bind((device, ETH_P_IP))
        self._socket.settimeout(0.1)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.sources: list[str] = []

    def __enter__(self) -> Syns:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                packet, where = self._socket.recvfrom(128)
            except TimeoutError:
                continue
            flags = packet[(packet[0] & 15) * 4 + 13]
            if (
                where[2] == socket.PACKET_HOST
                and packet[9] == socket.IPPROTO_TCP
                and flags & (SYN | ACK) == SYN
            ):
                self.sources.append(socket.inet_ntoa(packet[12:16]))


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Two that run, and a third of which only the key is used; in the fourth namespace nobody is a member."""
    with Lab(4) as lab:
        a, b, c = nodes = [machine(lab, place) for place in range(3)]
        a.start()
        a.wait_ready()
        join(a, b)
        join(a, c)
        all_reach_all(nodes, SETTLE_S)
        assert c.stop() == 0
        yield nodes
        check_logs([a, b])


def move(nodes: list[Node], target: Node, victim: Namespace, pause_s: float) -> None:
    """c tells `target` all the time that it is somewhere else at the victim's, as long as an attack takes."""
    lab, c = target.lab, nodes[2]
    where = f"/ip4/{target.namespace.address}/tcp/{P2P_PORT}"
    network = nodes[0].ask()["network"]["network_id"]
    words = (str(c.state_dir), where, target.peer_id(), network, victim.address, str(ATTACK_S), str(pause_s))
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parents[1])))
    lab.run(c.namespace, sys.executable, "-m", "lab.mover", *words, env={"PYTHONPATH": path}, check=False)


def test_a_third_party_is_hardly_knocked_at(nodes: list[Node]) -> None:
    """Nodes that are told dial it no oftener than a peer that is away, and nothing that is on their own machine."""
    a, b, _ = nodes
    victim = a.lab.nodes[3]
    before = a.ask()["control"]["counters"]["gossip_received"]
    inside_a, inside_b = Syns(a.namespace, "lo"), Syns(b.namespace, "lo")
    with Syns(victim) as syns, inside_a, inside_b, beside(b, a, address=address(a)) as during:
        move(nodes, a, victim, 0.05)
        time.sleep(0.5)
    print(f"{len(syns.sources)} SYNs of {sorted(set(syns.sources))}")
    received = a.ask()["control"]["counters"]["gossip_received"] - before
    assert received > 10 * ATTACK_S / 2, "it has moved"
    assert inside_a.sources == inside_b.sources == []
    for node in (a, b):
        assert syns.sources.count(node.namespace.address) <= MOST_SYNS * max(1.0, ATTACK_S / 15)
    assert_unharmed(during)


def test_a_flood_of_gossip_holds_up_nobody(nodes: list[Node]) -> None:
    """As fast as the other reads: packets do not notice, and who asks control is answered."""
    a, b, _ = nodes
    waits: list[float] = []
    flooding = threading.Thread(target=move, args=(nodes, a, a.lab.nodes[3], 0.0))
    with beside(b, a, address=address(a)) as during:
        flooding.start()
        while flooding.is_alive():
            waits.append(status_s(a))
            time.sleep(0.1)
    print(f"a status took {max(waits):.2f} s at most")
    assert max(waits) < 5.0
    assert_unharmed(during)


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


def ask_table(member: Secured) -> None:
    """As many look-ups at once as it has streams for, each for a key of its own."""
    member.select("/yamux/1.0.0")
    for number in range(LOOK_UPS):
        message = TableMessage(type=TableMessage.FIND_NODE, key=os.urandom(32))
        say(member, 2 * number + 1, "/ipfs/kad/1.0.0", message.SerializeToString())
    time.sleep(0.1)


def ask_why(member: Secured) -> None:
    """All of it, up to the walk that the supervisor makes."""
    member.select(why.PROTOCOL)
    question = msgspec.json.encode(why.Question(address="10.86.0.1"))
    member.send(framed(b"") + framed(bytes(why.LARGE)) + framed(question))
    member.receive(4)


def ask_to_be_dialed(member: Secured) -> None:
    """At any port of its own machine."""
    member.select(meeting.REACH)
    member.send(framed(meeting.encode(meeting.Reach(os.urandom(meeting.TOKEN_BYTES), 9))))
    member.receive(4)


def ask_to_meet(member: Secured) -> None:
    """Somebody who waits for nobody here."""
    member.select(meeting.MEET)
    member.send(framed(meeting.encode(meeting.Meet(os.urandom(meeting.TOKEN_BYTES), NOBODY))))
    member.receive(4)


QUESTIONS = [ask_table, ask_why, ask_to_be_dialed, ask_to_meet]


@pytest.mark.parametrize("questions", [[one] for one in QUESTIONS] if LONG else [QUESTIONS])
def test_questions_without_end_hold_up_nobody(
    nodes: list[Node], questions: list[Callable[[Secured], None]]
) -> None:
    """A member asks on one connection after the other, as fast as it is answered; it is itself what is dialed then."""
    a, b, c = nodes
    key = identity.read_private(c.state_dir / "identity.pem")
    asked, before, waits = 0, [status_s(a) for _ in range(STATUSES)], []
    with Syns(c.namespace) as syns, beside(b, a, address=address(a)) as during:
        end_s = time.monotonic() + ATTACK_S
        while time.monotonic() < end_s:
            with contextlib.suppress(Refused, OSError), dialed(c.namespace, a) as sock:
                Plain(sock).select(NOISE)
                questions[asked % len(questions)](Secured(sock, honest(key), initiator=True))
                asked += 1
            if asked % STATUSES == 0:
                waits.append(status_s(a))
    print(
        f"{asked} times; a status took {mean(waits):.3f} s, {mean(before):.3f} s without; {len(syns.sources)} SYNs"
    )
    assert asked >= STATUSES
    assert mean(waits) < mean(before) + LONGER_S
    most = Nat().max_reach_questions + MOST_SYNS * max(1.0, ATTACK_S / 15)
    assert syns.sources.count(a.namespace.address) <= most
    assert_unharmed(during)


def status_s(node: Node) -> float:
    """How long its control, which is asked for its part, takes for a status."""
    begun_s = time.monotonic()
    wait_until(lambda: node.ask()["control"]["answers"], SETTLE_S, "control answers")
    return time.monotonic() - begun_s
