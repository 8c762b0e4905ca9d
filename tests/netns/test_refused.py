"""What must not come in, on real nodes, while two members talk: nothing of theirs is lost, and every refusal has its
reason in the counters."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from lab import Lab, Node, check_logs, ping, socket_in, wait_for_answer, wait_until, within
from lab.joining import address, invite, join, machine, network_of, standing
from lab.node import P2P_PORT, ROOT
from lab.steady import SteadyFlow
from packet.builder import ip, udp

from vpnd import errors
from vpnd.membership import token as tokens

pytestmark = pytest.mark.root

PATIENCE_S = 20.0
#: More than this a member does not wait for another's datagram, whatever strangers do meanwhile.
GAP_S = 1.0
FLOOD = 500


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(4) as lab:
        yield lab


@contextlib.contextmanager
def undisturbed(sender: Node, receiver: Node) -> Iterator[None]:
    """Datagrams go from one node to the other throughout the block, and all of them arrive, in order and in time."""
    with SteadyFlow(sender.namespace, receiver.namespace, address(receiver), rate_hz=200) as flow:
        wait_until(lambda: flow.numbers, PATIENCE_S, "datagrams arrive")
        yield
    assert (flow.lost, flow.late) == (0, 0)
    assert flow.longest_gap_s() < within(GAP_S)


def counted(node: Node, name: str) -> int:
    """A counter of control, or of all drops."""
    status = node.ask()
    return int(status["control"]["counters"].get(name, 0) or status["dropped"].get(name, 0))


def closed_at_once(node: Node) -> int:
    """Connections that it would not have, or not any longer."""
    return counted(node, "refused_connect_rate") + counted(node, "refused_handshake_limit")


def wait_counted(node: Node, name: str, least: int) -> None:
    wait_until(lambda: counted(node, name) >= least, PATIENCE_S, f"{least} counted as {name}")


def multiaddr(node: Node) -> str:
    return f"/ip4/{node.namespace.address}/tcp/{P2P_PORT}"


@contextlib.contextmanager
def half_open(lab: Lab, place: int, node: Node, count: int) -> Iterator[None]:
    """Connections from the namespace `place` to a node's port that say nothing, or no more than their first word."""
    with contextlib.ExitStack() as stack:
        for number in range(count):
            sock = stack.enter_context(
                socket_in(lab.nodes[place], node.namespace.address, socket.SOCK_STREAM)
            )
            sock.connect((node.namespace.address, P2P_PORT))
            if number % 5 == 0:
                sock.send(b"\x13/multistream/1.0.0\n")
        yield


def test_a_flood_of_half_open_connections_disturbs_neither_traffic_nor_who_joins(lab: Lab) -> None:
    a, b = machine(lab, 0), machine(lab, 1)
    c = machine(lab, 2)
    a.start()
    a.wait_ready()
    join(a, b)
    with undisturbed(b, a), half_open(lab, 3, a, FLOOD):
        wait_until(lambda: closed_at_once(a) > 0, PATIENCE_S, "there are too many")
        join(a, c)
        assert standing(c) == "member"
        wait_for_answer(lab, c.namespace, address(a), PATIENCE_S)
        time.sleep(1.0)
    assert closed_at_once(a) >= FLOOD - 300
    wait_for_answer(lab, c.namespace, address(b), PATIENCE_S)
    check_logs((a, b, c))


def test_a_stranger_gets_no_session(lab: Lab) -> None:
    a, b = nodes = [machine(lab, place) for place in (0, 1)]
    a.start()
    a.wait_ready()
    join(a, b)
    stranger = machine(lab, 3)
    stranger.config |= {
        "network": {"virtual_ip": "10.86.200.1", "subnet": 16},
        "peers": [
            {
                "name": "a",
                "peer_id": a.peer_id(),
                "virtual_ip": address(a),
                "addresses": [multiaddr(a)],
            }
        ],
    }
    with undisturbed(b, a):
        stranger.start()
        stranger.wait_ready()
        assert ping(lab, stranger.namespace, address(a), count=5, interval_s=0.2).loss == 1
        wait_counted(a, "refused_unknown_peer", 1)
        (peer,) = stranger.ask()["peers"]
        assert peer["state"] != "connected" and not peer["sessions"]
        assert "list this one" in peer["last_error"]
    check_logs(nodes)


def test_a_member_sends_from_its_own_addresses_only(lab: Lab) -> None:
    a, b, c = nodes = network_of(lab)[:3]
    wait_for_answer(lab, c.namespace, address(a), PATIENCE_S)
    with undisturbed(b, a):
        lab.ip(c.namespace, "address", "add", f"{address(b)}/32", "dev", "lo")
        stolen = ("ping", "-c", "5", "-i", "0.1", "-W", "1", "-I", address(b), address(a))
        assert "100% packet loss" in lab.run(c.namespace, *stolen, check=False).stdout
        wait_counted(a, "source_not_allowed", 5)
        assert ping(lab, c.namespace, address(a), count=3).loss == 0, "it still has its own address"
        # As a router behind it, which may speak of what a has sent to c, and of nothing else
        router, before = "198.51.100.3", counted(a, "source_not_allowed")
        with socket_in(a.namespace, address(a), socket.SOCK_RAW, socket.IPPROTO_ICMP) as heard:
            for target in (address(b), "192.0.2.1", address(c)):
                about = udp((address(a), target), b"x")
                with socket_in(c.namespace, address(a), socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
                    raw.sendto(ip((router, address(a)), 1, b"\x03\x01" + bytes(6) + about), (address(a), 0))
            wait_until(
                lambda: heard.recv(2000)[28:].startswith(about), PATIENCE_S, "the error about c is heard"
            )
        assert counted(a, "source_not_allowed") == before + 2
    check_logs(nodes)


def test_a_member_that_lies_is_not_believed(lab: Lab) -> None:
    a, b, c = nodes = network_of(lab)[:3]
    wait_for_answer(lab, c.namespace, address(a), PATIENCE_S)
    network, wanted = a.ask()["network"]["network_id"], address(b)
    assert c.stop() == 0
    with undisturbed(b, a):
        words = (str(c.state_dir), multiaddr(a), a.peer_id(), network, wanted)
        path = os.pathsep.join((str(ROOT), str(Path(__file__).parents[1])))
        lab.run(c.namespace, sys.executable, "-m", "lab.liar", *words, env={"PYTHONPATH": path})
        for reason in ("rolled_back", "unknown_authority", "forged"):
            wait_counted(a, f"refused_{reason}", 1)
        for node in (a, b):
            found = {row["name"]: row for row in json.loads(node.vpnd("members", "--json").stdout)}
            assert set(found) == {"a", "b", "c", "d"} and wanted in found["b"]["addresses"]
    c.start()
    c.wait_ready()
    wait_for_answer(lab, c.namespace, address(a), PATIENCE_S)
    check_logs(nodes)


def forged(token: str) -> str:
    """The same network and authority, another secret."""
    real = tokens.parse_untrusted(token)
    return tokens.encode(msgspec.structs.replace(real, secret=bytes(len(real.secret))))


def refused(node: Node, token: str, code: int, *words: str) -> None:
    """`vpnd start --join` ends with one line, and nothing of the node is left but its identity."""
    node.write_config()
    done = node.vpnd("start", "--join", token, check=False, timeout_s=40)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("vpnd: error: ")]
    assert all(word in line for word in words), line
    assert token not in done.stderr
    assert not any(item.startswith(f"{node.namespace.label}:") for item in node.lab.leaks())
    network = node.state_dir / "network"
    assert not network.exists() or not any(network.iterdir())


def test_bad_tokens_are_refused_in_words_and_counted(lab: Lab) -> None:
    a, b, c = nodes = [machine(lab, place) for place in range(3)]
    a.start()
    a.wait_ready()
    join(a, c)
    with undisturbed(c, a):
        once = invite(a)
        soon_over = invite(a, "--expires", "1s")
        refused(b, forged(once), errors.RefusedError.exit_code, "token")
        time.sleep(1.1)
        refused(b, soon_over, errors.RefusedError.exit_code, "expired")
        typo = once[:-1] + ("0" if once[-1] != "0" else "1")
        refused(b, typo, errors.ConfigError.exit_code, "typing error")
        b.start("--join", once)
        b.wait_ready()
        wait_for_answer(lab, b.namespace, address(a), PATIENCE_S)
        counters = a.ask()["control"]["counters"]
        assert counters["refused_unknown_token"] >= 1 and counters["refused_expired_token"] >= 1
        assert b.stop() == 0
        b.vpnd("leave", "--force", check=False)
        (b.state_dir / "identity.pem").unlink()
        refused(b, once, errors.RefusedError.exit_code, "used")
        assert a.ask()["control"]["counters"]["refused_used_token"] >= 1
    assert a.stop() == 0
    refused(b, once, errors.RefusedError.exit_code, "could not be joined")
    check_logs(nodes)
