"""`vpnd why` on real nodes: each fault is named, with its remedy, on both ends where both can know. More of them, which
take longer, in test_why_long.py."""

from __future__ import annotations

import re
import signal

import pytest
from lab import Node, running_nodes, wait_connected, wait_until
from why_tools import SETTLE_S, blamed, peer_row, walk

from vpnd.identity import load_or_create

pytestmark = pytest.mark.root

SETTINGS = {
    "health": {"interval": "1s", "idle_interval": "1s", "timeout": "700ms"},
    "status": {"why_interval": "300ms", "timeout": "2s"},
    "process": {"watchdog": "0s", "restart_max": "500ms"},
    "circuit_breaker": {"reset_timeout": "60s"},
    "p2p": {"dial_timeout": "2s", "connect_timeout": "700ms"},
}


def reloaded(node: Node) -> None:
    node.write_config()
    assert "applied" in node.ask("reload")


def well(a: Node, b: Node) -> None:
    """Every step is passed, and both ways are walked."""
    done = a.vpnd("why", f"{b.virtual_ip}:22", check=False)
    assert done.returncode == 1
    assert re.search("^remedy: start the service on b$", done.stdout, re.MULTILINE)
    assert "port stops packets: nothing listens on TCP port 22" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    for one, other in ((a, "b"), (b, "a")):
        found = walk(one, other)
        assert found.cause == "" and {step.verdict for step in found.steps} == {"ok"}
        names = "route rule device shard flow peer membership path breaker session stream queue answer"
        assert [step.name for step in found.steps] == names.split()
        assert f"{other} gets packets from here" in found.steps[-1].says
    # a stranger's address, as far as anybody knows
    assert blamed(a, "10.86.0.77", "peer").says == "no peer of this node has 10.86.0.77"


def route_missing(a: Node, b: Node) -> None:
    """Another, more specific route takes the packets; b learns of it from a."""
    a.lab.ip(a.namespace, "route", "add", f"{b.virtual_ip}/32", "via", b.namespace.address)
    try:
        step = blamed(a, "b", "route", "sends it to eth0, not to vpnd0")
        assert "ip route get" in step.remedy
        answer = blamed(b, "a", "answer", "a says of its way back: route: this machine sends it to eth0")
        assert answer.remedy.startswith("on a: take the other route away")
    finally:
        a.lab.ip(a.namespace, "route", "del", f"{b.virtual_ip}/32")
    a.lab.ip(a.namespace, "route", "add", "unreachable", f"{b.virtual_ip}/32")
    try:
        assert "no route" in blamed(a, "b", "route").says
    finally:
        a.lab.ip(a.namespace, "route", "del", "unreachable", f"{b.virtual_ip}/32")


def wrong_key(a: Node, b: Node) -> None:
    """a has another key for b: a meets somebody else, b is refused."""
    (peer,) = a.config["peers"]
    right = peer["peer_id"]
    peer["peer_id"] = load_or_create(a.lab.directory / "other.pem").peer_id
    reloaded(a)
    step = blamed(a, "b", "path")
    assert "its key is not the one that is known" in step.says and "vpnd id" in step.remedy
    assert right in blamed(b, "a", "membership").remedy
    peer["peer_id"] = right
    reloaded(a)


def not_a_member(a: Node, b: Node) -> None:
    """b does not list a."""
    peers, b.config["peers"] = b.config["peers"], []
    reloaded(b)
    step = blamed(a, "b", "membership")
    assert "does not know this node" in step.says and a.peer_id() in step.remedy
    assert "[[peers]]" in blamed(b, a.virtual_ip, "peer").remedy
    b.config["peers"] = peers
    reloaded(b)
    wait_connected([a, b], SETTLE_S)


def down_and_left_alone(a: Node, b: Node) -> None:
    """b's daemon is gone; then it is back, but a leaves it alone, and b cannot dial."""
    b.kill(signal.SIGKILL)
    b.wait_ended()
    step = blamed(a, "b", "path", "nothing listens there")
    assert "does vpnd run there" in step.remedy
    wait_until(lambda: peer_row(a, "b")["circuit"] == "open", SETTLE_S, "the circuit opens")
    (peer,) = b.config["peers"]
    peer["addresses"] = []
    b.start()
    b.wait_ready()
    step = blamed(a, "b", "breaker")
    assert "the circuit is open" in step.says and "circuit_breaker.reset_timeout" in step.remedy
    assert "p2p.listen" in blamed(b, "a", "path", "waits for its dial").remedy


def test_each_fault_is_named_with_its_remedy_on_both_ends() -> None:
    """One pair of nodes, from fault to fault."""
    with running_nodes(shards=1, settings=SETTINGS) as (a, b):
        for fault in (
            well,
            route_missing,
            wrong_key,
            not_a_member,
            down_and_left_alone,
        ):
            fault(a, b)
