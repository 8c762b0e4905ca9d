"""A node of the system that vpnd is rebuilt from, and vpnd: both ways, for as long as streams come and go."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foreign import Unavailable, go_programs, write_key
from lab import Lab, Node, check_logs, goodput_bps, iperf3, ping, settled, wait_for_answer, wait_until
from lab.node import P2P_PORT

from vpnd import peerid

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

PATIENCE_S = 20.0
#: Its sender closes a stream that was idle for 10 s when it looks, every 20 s.
OVER_IDLE_S = 31.0
LEAST_BPS = 150e6
DEVICE = "tun0"
OURS, THEIRS, FOREIGN = "10.86.0.1", "10.86.0.2", "10.86.0.99"


class SubnetNode:
    """The Go program in the second namespace of a lab, with a device of its own."""

    def __init__(self, lab: Lab, program: Path) -> None:
        self.lab, self.namespace, self._program = lab, lab.nodes[1], program
        self._key = Ed25519PrivateKey.generate()
        self.peer_id = peerid.from_public_key(self._key.public_key().public_bytes_raw())
        self.log = lab.directory / "subnetnode.log"
        self.multiaddr = f"/ip4/{self.namespace.address}/tcp/{P2P_PORT}"
        lab.run(self.namespace, "ip", "tuntap", "add", DEVICE, "mode", "tun")
        lab.ip(self.namespace, "addr", "add", f"{THEIRS}/16", "dev", DEVICE)
        lab.ip(self.namespace, "link", "set", DEVICE, "mtu", "1400", "up")

    def start(self, node: Node) -> subprocess.Popen[str]:
        """Run it, with `node` as its one peer."""
        peer = f"{OURS}=/ip4/{node.namespace.address}/tcp/{P2P_PORT}/p2p/{node.peer_id()}"
        key = str(write_key(self._key, self.lab.directory))
        command = (str(self._program), key, self.multiaddr, DEVICE, peer)
        process = self.lab.spawn(self.namespace, *command, output=self.log)
        wait_until(lambda: self.log.exists() and "ready" in self.log.read_text(), PATIENCE_S, "it is ready")
        return process

    def said(self, word: str) -> int:
        """How often it has said that."""
        return self.log.read_text().splitlines().count(word)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def pair(lab: Lab) -> tuple[Node, SubnetNode]:
    """vpnd, started, and the other, ready to be started."""
    try:
        other = SubnetNode(lab, go_programs() / "subnetnode")
    except Unavailable as error:
        pytest.skip(str(error))
    node = Node(lab, lab.nodes[0])
    node.config = {
        "network": {"virtual_ip": OURS, "subnet": 16},
        "p2p": {"listen": [f"/ip4/{node.namespace.address}/tcp/{P2P_PORT}"]},
        "worker": {"shards": 2},
        "peers": [
            {
                "name": "old",
                "peer_id": other.peer_id,
                "virtual_ip": THEIRS,
                "addresses": [other.multiaddr],
                "protocol": "subnet-node",
            }
        ],
    }
    node.start()
    node.wait_ready()
    return node, other


def books_are_exact(node: Node) -> None:
    books = settled(node)["books"]
    assert (books["out"]["difference"], books["in"]["difference"]) == (0, 0)


def test_both_ping_each_other_across_idle_closings(pair: tuple[Node, SubnetNode], lab: Lab) -> None:
    node, other = pair
    other.start(node)
    wait_for_answer(lab, other.namespace, OURS, PATIENCE_S)
    wait_for_answer(lab, node.namespace, THEIRS, PATIENCE_S)
    for pause_s in (OVER_IDLE_S, OVER_IDLE_S, 0.0):
        assert ping(lab, node.namespace, THEIRS, count=3, interval_s=0.2).loss == 0
        assert ping(lab, other.namespace, OURS, count=3, interval_s=0.2).loss == 0
        time.sleep(pause_s)
    assert other.said("closed") >= 1 and other.said("opened") >= 2
    assert not other.said("bad length")
    books_are_exact(node)
    check_logs([node])


def test_tcp_goes_both_ways_at_a_good_rate(pair: tuple[Node, SubnetNode], lab: Lab) -> None:
    node, other = pair
    other.start(node)
    wait_for_answer(lab, node.namespace, THEIRS, PATIENCE_S)
    there = goodput_bps(iperf3(lab, node.namespace, other.namespace, THEIRS, seconds=5))
    back = goodput_bps(iperf3(lab, other.namespace, node.namespace, OURS, seconds=5))
    print(f"to the subnet node {there / 1e6:.0f} Mbit/s, from it {back / 1e6:.0f} Mbit/s")
    assert min(there, back) >= LEAST_BPS
    books_are_exact(node)
    check_logs([node])


def test_foreign_sources_do_not_come_in(pair: tuple[Node, SubnetNode], lab: Lab) -> None:
    node, other = pair
    other.start(node)
    wait_for_answer(lab, other.namespace, OURS, PATIENCE_S)
    before = node.ask()["dropped"]["source_not_allowed"]
    lab.ip(other.namespace, "addr", "add", f"{FOREIGN}/32", "dev", "lo")
    stolen = ("ping", "-c", "10", "-i", "0.1", "-w", "3", "-I", FOREIGN, OURS)
    assert "100% packet loss" in lab.run(other.namespace, *stolen, check=False).stdout
    assert node.ask()["dropped"]["source_not_allowed"] >= before + 10
    books_are_exact(node)


def test_who_cannot_be_dialed_dials(pair: tuple[Node, SubnetNode], lab: Lab) -> None:
    node, other = pair
    assert node.stop() == 0
    node.config["peers"][0]["addresses"] = []
    node.config["worker"]["shards"] = 1
    node.start()
    node.wait_ready()
    other.start(node)
    wait_for_answer(lab, other.namespace, OURS, PATIENCE_S)
    wait_for_answer(lab, node.namespace, THEIRS, PATIENCE_S)
    check_logs([node])


def test_it_comes_back_after_the_other_is_started_again(pair: tuple[Node, SubnetNode], lab: Lab) -> None:
    node, other = pair
    process = other.start(node)
    wait_for_answer(lab, node.namespace, THEIRS, PATIENCE_S)
    process.kill()
    process.wait()
    other.start(node)
    wait_for_answer(lab, node.namespace, THEIRS, PATIENCE_S)
    wait_for_answer(lab, other.namespace, OURS, PATIENCE_S)
    check_logs([node])
