"""Peers of other makers of libp2p and a real node: what a member can do, and what a stranger cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foreign import Foreign
from lab import Lab, Node, check_logs, pair_of_nodes, wait_until
from lab.joining import network_of
from lab.node import P2P_PORT

from vpnd import __version__
from vpnd.identity import read_private

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

#: as long as the longest wait between two dials of a neighbour, and a dial
PATIENCE_S = 60.0
RECONNECTS = 300


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@contextlib.contextmanager
def in_place_of(node: Node, command: tuple[str, ...], listen: str = "none") -> Iterator[Foreign]:
    """A peer with the identity of a node, which does not run."""
    key = read_private(node.state_dir / "identity.pem")
    with contextlib.closing(Foreign(command, key, node.lab.directory, listen, node.namespace)) as peer:
        assert peer.peer_id == node.peer_id()
        yield peer


def multiaddr(node: Node) -> str:
    return f"/ip4/{node.namespace.address}/tcp/{P2P_PORT}/p2p/{node.peer_id()}"


def counter(node: Node, name: str) -> int:
    return int(node.ask()["control"]["counters"][name])


def test_a_member_connects_identifies_pings_and_asks_the_table(lab: Lab, command: tuple[str, ...]) -> None:
    a, b = network_of(lab)
    assert b.stop() == 0
    with in_place_of(b, command) as peer:
        peer.do("connect", address=multiaddr(a))
        said = peer.do("identify", address=multiaddr(a))
        assert said["agent"] == f"vpnd/{__version__}"
        assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/ipfs/kad/1.0.0"} <= set(said["protocols"])
        assert any(f"{a.namespace.address}/tcp/{P2P_PORT}" in address for address in said["addresses"])
        assert peer.do("ping", address=multiaddr(a), times=20)["worst_ms"] < 1000
        assert a.peer_id() in peer.do("kad", address=multiaddr(a))["closest"]
    check_logs([a])


def test_a_node_dials_a_member_of_another_make(lab: Lab, command: tuple[str, ...]) -> None:
    a, b = network_of(lab, {"discovery": {"mdns": False}})
    wait_until(lambda: a.ask()["peers"][0]["addresses"], PATIENCE_S, "a knows where b is")
    assert b.stop() == 0
    with in_place_of(b, command, f"/ip4/{b.namespace.address}/tcp/{P2P_PORT}") as peer:
        # Nobody listens there, so only what the node has dialed carries the pings. It dials for sessions, too,
        # and hangs up when it hears that this is not vpnd: that is not the one.
        nowhere = f"/ip4/{a.namespace.address}/tcp/1/p2p/{a.peer_id()}"

        def carried() -> bool:
            return "error" not in peer.ask("ping", address=nowhere, times=5)

        wait_until(carried, PATIENCE_S, "a dials for its own protocols")
    check_logs([a])


def test_a_configured_peer_of_another_make_is_called_what_it_is(lab: Lab, command: tuple[str, ...]) -> None:
    a, b = pair_of_nodes(lab, shards=1)
    with in_place_of(b, command, f"/ip4/{b.namespace.address}/tcp/{P2P_PORT}"):
        a.start()
        a.wait_ready()

        def error() -> str:
            (row,) = a.ask()["peers"]
            return str(row["last_error"])

        wait_until(error, PATIENCE_S, "a dial has failed")
        assert "libp2p" in error() and "not vpnd" in error()


def test_a_stranger_is_refused_and_leaves_nothing(lab: Lab, command: tuple[str, ...]) -> None:
    (a, b) = network_of(lab)
    assert b.stop() == 0
    stranger = Foreign(command, Ed25519PrivateKey.generate(), lab.directory, namespace=b.namespace)
    with contextlib.closing(stranger) as peer:
        before = counter(a, "refused_unknown_peer")
        # The handshake ends on the dialer's side first; that it was refused shows when it wants something.
        assert "error" in peer.ask("ping", address=multiaddr(a), times=1)
        assert "error" in peer.ask("kad", address=multiaddr(a))
        wait_until(lambda: counter(a, "refused_unknown_peer") > before, PATIENCE_S, "counted")
        assert a.ask()["control"]["connections"] == 0
    check_logs([a])


@pytest.mark.slow
def test_a_member_comes_and_goes_three_hundred_times(lab: Lab, command: tuple[str, ...]) -> None:
    a, b = network_of(lab)
    assert b.stop() == 0
    with in_place_of(b, command) as peer:
        for _ in range(10):
            peer.do("reconnect", address=multiaddr(a), times=RECONNECTS // 10)
        assert counter(a, "refused_connection_limit") == 0
    wait_until(lambda: a.ask()["control"]["connections"] == 0, PATIENCE_S, "all of them are gone")
    check_logs([a])
