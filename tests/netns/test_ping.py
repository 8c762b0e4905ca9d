"""`vpnd ping` between real nodes: through the tunnel, past a firewall, to a peer that is down."""

from __future__ import annotations

import json
import re
import signal
import subprocess

import pytest
from lab import Node, running_nodes, settled, wait_until

pytestmark = pytest.mark.root

#: As long as an answer is waited for; a busy machine answers sooner.
TIMEOUT_S = 0.7
SETTINGS = {"health": {"interval": "10s", "timeout": f"{TIMEOUT_S}s"}}
DROP_PINGS = (
    "add table inet lab_ping; add chain inet lab_ping in { type filter hook input priority 0; };"
    "add rule inet lab_ping in meta l4proto icmp drop"
)


def packets_through(node: Node) -> int:
    count: int = settled(node)["peers"][0]["packets_sent"]
    return count


def through_the_tunnel(a: Node, b: Node) -> None:
    """It names a session there is, and its echoes are packets of the tunnel."""
    before = packets_through(a), packets_through(b)
    said = json.loads(a.vpnd("ping", "b", "-c", "6", "-i", "0", "--json").stdout)
    assert (said["name"], said["address"], said["received"], said["loss"]) == ("b", b.virtual_ip, 6, 0)
    for trip in said["pings"]:
        session = trip["session"]
        assert session["rtt_ms"] > 0 and trip["nodes_ms"] == max(0.0, trip["rtt_ms"] - session["rtt_ms"])
        ends = [session["local"], session["remote"]]
        assert re.fullmatch(rf"{a.namespace.address}:\d+", ends[0])
        assert re.fullmatch(rf"{b.namespace.address}:\d+", ends[1])
        assert " ".join(ends) in established(a), "it is a connection there is"
        assert trip["shard"] in (0, 1)
    assert packets_through(a) - before[0] == packets_through(b) - before[1] == 6


def established(node: Node) -> str:
    """The node's TCP connections, each as `local remote`."""
    told = node.lab.run(node.namespace, "ss", "-Htn", "state", "established").stdout
    return "\n".join(" ".join(line.split()[2:4]) for line in told.splitlines())


def broken_off(a: Node) -> None:
    """Ctrl-C ends it with the sums, and its exit code."""
    process = a.lab.spawn(
        a.namespace, *a.command, "ping", "b", "-i", "0.05", "-c", "10000", output=subprocess.PIPE, env=a.env
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert lines[0].startswith(f"PING b ({a.config['peers'][0]['virtual_ip']}) through shard ")
    assert re.search(r"^(\d+) sent, \1 came back, 0% lost; min [\d.]+ ms, avg ", rest, re.MULTILINE)


def unwrapped(text: str) -> str:
    """A line that goes on in the next, indented one, is one again."""
    return re.sub(r"\n +", " ", text).rstrip()


def past_a_firewall(a: Node, b: Node) -> None:
    """The session answers, the echo does not: that is said, and is no success."""
    b.lab.run(b.namespace, "nft", DROP_PINGS)
    try:
        done = a.vpnd("ping", "b", "-c", "2", "-i", "0", check=False)
    finally:
        b.lab.run(b.namespace, "nft", "delete table inet lab_ping")
    assert done.returncode == 1
    assert re.search(rf"^2  no answer within {TIMEOUT_S} s   session [\d.]+ ms$", done.stdout, re.MULTILINE)
    told = f"the session to b answers, {b.virtual_ip} does not: a firewall, on b or here, drops pings"
    assert unwrapped(done.stdout).endswith(told)


def past_a_middle_that_drops_large_packets(a: Node, b: Node) -> None:
    """Small packets come through, which alone says nothing; the sweep says which do not."""
    rule = DROP_PINGS.replace("meta l4proto icmp", "iifname vpnd0 ip length > 1200")
    b.lab.run(b.namespace, "nft", rule)
    try:
        assert a.vpnd("ping", "b", "-c", "1").returncode == 0
        done = a.vpnd("ping", "b", "--sweep", check=False)
    finally:
        b.lab.run(b.namespace, "nft", "delete table inet lab_ping")
    assert done.returncode == 1
    assert unwrapped(done.stdout).startswith("packets to b of 1200 bytes come through, larger ones do not")
    assert "up to the MTU of the VPN" in unwrapped(a.vpnd("ping", "b", "--sweep").stdout)


def past_the_tunnel(a: Node, b: Node) -> None:
    """Another route of this machine takes the packets: nothing comes back, and that is why."""
    a.lab.ip(a.namespace, "route", "add", f"{b.virtual_ip}/32", "via", b.namespace.address)
    try:
        done = a.vpnd("ping", "b", "-c", "1", check=False)
    finally:
        a.lab.ip(a.namespace, "route", "del", f"{b.virtual_ip}/32")
    assert unwrapped(done.stdout).startswith(
        f"note: this machine sends to {b.virtual_ip} from {a.namespace.address}, not through vpnd0"
    )


def down(a: Node, b: Node) -> None:
    """A peer that is gone: no session, its state and last error, no daemon."""
    b.kill(signal.SIGKILL)
    b.wait_ended()
    wait_until(lambda: not a.ask()["peers"][0]["sessions"], 10, "its sessions are gone")
    done = a.vpnd("ping", "b", "-c", "1", check=False)
    assert done.returncode == 1
    head, line, sums, state, daemon = unwrapped(done.stdout).splitlines()
    assert re.fullmatch(r"PING b \(.*\) through shard [01], no session", head)
    assert re.search("no session: (packets wait for one|its circuit is open, packets are dropped)$", line)
    assert sums == "1 sent, 0 came back, 100% lost"
    assert state.startswith("b is ") and "refused" in state
    assert daemon.startswith("its daemon does not answer: ") and "refused" in daemon


def test_ping_tells_what_the_tunnel_does_and_why_it_does_not() -> None:
    """One pair of nodes, from well to gone."""
    with running_nodes(settings=SETTINGS) as (a, b):
        through_the_tunnel(a, b)
        broken_off(a)
        past_a_firewall(a, b)
        past_a_middle_that_drops_large_packets(a, b)
        past_the_tunnel(a, b)
        down(a, b)
