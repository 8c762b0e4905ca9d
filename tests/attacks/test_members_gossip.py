"""A member against the others of its network, with what it may say there: where it is, as often as it likes."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attack_tools import ATTACK_S, assert_unharmed, beside
from lab import Lab, Namespace, Node, check_logs, wait_until
from lab.joining import address, all_reach_all, join, machine
from lab.network import DEVICE
from lab.node import P2P_PORT, ROOT
from lab.sockets import inside

pytestmark = [pytest.mark.root, pytest.mark.alone]  # round trips are compared

SETTLE_S = 20.0
#: What a node that is told may send to a third party: a dial at once, those of its backoff, and then one in each
#: retry.max_interval.
MOST_SYNS = 15
ETH_P_IP, SYN, ACK = 0x0800, 0x02, 0x10


class Syns:
    """Counts the SYNs that come to a namespace, by who sends them. A context manager."""

    def __init__(self, namespace: Namespace) -> None:
        with inside(namespace):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
            self._socket.bind((DEVICE, ETH_P_IP))
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
    """Nodes that are told dial it no oftener than a peer that is away.

    That nobody dials what is on its own machine is seen by `test_what_others_say_leads_to_no_service_of_this_machine`.
    """
    a, b, _ = nodes
    victim = a.lab.nodes[3]
    before = a.ask()["control"]["counters"]["gossip_received"]
    with Syns(victim) as syns, beside(b, a, address=address(a)) as during:
        move(nodes, a, victim, 0.05)
        time.sleep(0.5)
    print(f"{len(syns.sources)} SYNs of {sorted(set(syns.sources))}")
    received = a.ask()["control"]["counters"]["gossip_received"] - before
    assert received > 10 * ATTACK_S / 2, "it has moved"
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
            begun_s = time.monotonic()
            wait_until(lambda: a.ask()["control"]["answers"], SETTLE_S, "control answers")
            waits.append(time.monotonic() - begun_s)
            time.sleep(0.1)
    print(f"a status took {max(waits):.2f} s at most")
    assert max(waits) < 5.0
    assert_unharmed(during)
