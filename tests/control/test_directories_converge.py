"""Ten real nodes in a network of two hundred: what one of them learns is soon known to all."""

from __future__ import annotations

import contextlib
import os
import pwd
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from control_harness import Identity
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from network_harness import USER, NetworkNode

from vpnd.config.schema import Discovery, Membership
from vpnd.membership import network as networks
from vpnd.membership.authority import Authority, Wish
from vpnd.membership.directory import Directory
from vpnd.membership.statements import Statement
from vpnd.membership.store import Store

pytestmark = [pytest.mark.root, pytest.mark.slow]

NODES = 10
MEMBERS = 200
#: What is promised of so many: until all know all, and until all know who is out.
CONVERGED_S = 10.0
REMOVED_S = 3.0
#: Starting, and dialing each other, has failed after so long.
PATIENCE_S = 30.0
#: As users have it: what converges in time does so by telling, not by comparing often.
INTERVAL_S = Membership().gossip_interval
#: Too few for everybody to be told by the source.
NEIGHBOURS = 3
#: Two sides may dial each other at once.
DIALS_PER_PEER = 3
#: Long enough for every node to look for members that are nowhere.
QUIET_S = Discovery().dht_search_interval
SEARCHES = ("dht_found", "dht_not_found", "dht_failures")


class TwoAuthorities:
    """A network that two nodes let others into while they did not see each other: each knows its half."""

    def __init__(self, first: NetworkNode, second: NetworkNode) -> None:
        self._root = Ed25519PrivateKey.generate()
        self._network = networks.create("home", self._root.public_key().public_bytes_raw(), "10.86.0.0/16")
        self._now_ms = time.time_ns() // 1_000_000
        # of one directory, so that the halves hold no address twice
        self._directory = Directory(self._network, skew_ms=0, forget_ms=0, max_members=MEMBERS)
        root, key = self._signs_with(self._root), private(second.identity)
        charter = [
            self._put(root.found(first.peer_id, self._now_ms)),
            self._put(root.grant(key.public_key().public_bytes_raw(), second.peer_id, self._now_ms)),
        ]
        known = [*charter, self._enrol(root, first), self._enrol(root, second)]
        away = MEMBERS - NODES
        self._keep(first, known + self._let_in(root, "early", away // 2), self._root)
        self._keep(second, known + self._let_in(self._signs_with(key), "late", away - away // 2), None)

    def _signs_with(self, key: Ed25519PrivateKey) -> Authority:
        return Authority(key, self._directory, lifetime_ms=86_400_000)

    def _put(self, statement: Statement) -> bytes:
        assert self._directory.merge([statement.wire], self._now_ms).accepted
        return statement.wire

    def _enrol(self, authority: Authority, node: NetworkNode) -> bytes:
        return self._put(authority.enrol(node.peer_id, Wish(name=node.name, firm=True), self._now_ms))

    def _let_in(self, authority: Authority, name: str, count: int) -> list[bytes]:
        """Members that were never seen since: nobody knows where they are."""
        wishes = (Wish(name=f"{name}-{number}", firm=True) for number in range(count))
        return [self._put(authority.enrol(Identity().peer_id, wish, self._now_ms)) for wish in wishes]

    def _keep(self, node: NetworkNode, wires: Iterable[bytes], key: Ed25519PrivateKey | None) -> None:
        """As the node's state of a run before."""
        store = Store(node.directory)
        if key is not None:
            store.save_key(key)
        store.save_statements(wires)
        store.save_network(self._network)
        store.close()
        for path in node.directory.iterdir():
            os.chown(path, pwd.getpwnam(USER).pw_uid, -1)


def private(identity: Identity) -> Ed25519PrivateKey:
    key = load_pem_private_key(identity.pem, password=None)
    assert isinstance(key, Ed25519PrivateKey)
    return key


def seconds_until(
    condition: Callable[[NetworkNode], bool], nodes: Iterable[NetworkNode], begun: float, limit_s: float
) -> float:
    """How long after `begun` it holds for all nodes, `limit_s` at most. What their shards are told counts: nobody is
    asked anything meanwhile."""
    left = list(nodes)
    while left:
        for node in left:
            node.pump()
        left = [node for node in left if not condition(node)]
        took_s = time.monotonic() - begun
        assert took_s < limit_s, {node.name: len(node.peers) for node in left}
        time.sleep(0.01)
    return took_s


def counted(nodes: Iterable[NetworkNode], *names: str) -> list[int]:
    """The sum of these counters, for each node."""
    return [sum(node.control.counter(name) for name in names) for node in nodes]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[NetworkNode]]:
    """Not started; the last one knows where the first one is. What they logged is shown when the test fails."""
    tmp_path.chmod(0o755)
    with contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(
                NetworkNode(
                    tmp_path,
                    f"node-{number}",
                    gossip_interval=INTERVAL_S,
                    neighbours=NEIGHBOURS,
                    join_timeout=PATIENCE_S,
                )
            )
            for number in range(NODES)
        ]
        for node in nodes:  # a busy machine is slow, and not away
            p2p = msgspec.structs.replace(
                node.config.p2p, dial_timeout=PATIENCE_S, connect_timeout=PATIENCE_S
            )
            node.config = msgspec.structs.replace(node.config, p2p=p2p)
        first, last = nodes[0], nodes[-1]
        bootstrap = (f"/ip4/127.0.0.1/tcp/{first.port}/p2p/{first.peer_id}",)
        last.config = msgspec.structs.replace(last.config, discovery=Discovery(bootstrap=bootstrap))
        yield nodes
        for node in nodes:
            if node.process is not None:
                ended = node.control.process.poll()
                node.kill()
                said = (line for line in node.control.stderr().splitlines() if "is a peer now" not in line)
                print(f"--- {node.name}, ended: {ended}", *said, sep="\n")


def test_all_know_all_in_seconds_and_nobody_dials_who_is_nowhere(nodes: list[NetworkNode]) -> None:
    first, *others, last = nodes
    TwoAuthorities(first, last)
    first.start()
    token = first.invite(uses=len(others))
    for node in others:
        node.launch(token)
    for node in others:
        node.arrive(PATIENCE_S)
    # itself is not among a node's peers, and of the late ones only their authority is known yet
    early = NODES + (MEMBERS - NODES) // 2
    joined = time.monotonic()
    joined_s = seconds_until(lambda node: len(node.peers) == early - 1, nodes[:-1], joined, CONVERGED_S)

    last.launch()
    last.arrive(PATIENCE_S)
    came = time.monotonic()
    news_s = seconds_until(lambda node: len(node.peers) == MEMBERS - 1, nodes, came, CONVERGED_S)
    names = {row["name"] for row in first.do("members")}
    assert len(names) == MEMBERS and all(node.members() == names for node in nodes)

    # once they have found each other; ten nodes that shake hands all at once have nothing left on two cores
    real = {node.peer_id for node in nodes}
    seconds_until(lambda node: real <= {node.peer_id, *node.sessions}, nodes, time.monotonic(), PATIENCE_S)
    asked = time.monotonic()
    gone = last.do("remove", who="early-7")["peer_id"]
    removed_s = seconds_until(lambda node: gone not in node.peers, nodes, asked, REMOVED_S)
    assert all(node.members() == names - {"early-7"} for node in nodes)

    dials, searches = counted(nodes, "dials"), counted(nodes, *SEARCHES)
    time.sleep(QUIET_S)
    print(
        f"{early} known to {NODES - 1} nodes {joined_s:.2f} s after they had joined, {MEMBERS} to {NODES} "
        f"{news_s:.2f} s after the last one had come; a removal {removed_s:.2f} s after it; dials {dials}"
    )
    assert sum(counted(nodes, "dials")) - sum(dials) <= NODES, (
        "who has sessions with all who are there, rests"
    )
    assert max(dials) <= DIALS_PER_PEER * (NODES - 1)
    for node, before, now in zip(nodes, searches, counted(nodes, *SEARCHES), strict=True):
        assert now - before <= 2 * node.config.discovery.dht_searches  # an interval may begin and end in it
        assert {peer.peer_id for peer in node.status().peers if peer.dials} <= real
    assert not any(counted(nodes, "gossip_dropped", "refused_forged", "refused_malformed"))
