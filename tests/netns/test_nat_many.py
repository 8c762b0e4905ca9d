"""Twenty members behind NATs of their own, and two relays: how soon all reach all, and what that costs when nothing is
to be done. Long: VPND_LONG_TESTS=1."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from lab import Node, check_logs, wait_until, within
from lab.joining import invite, join, machine
from lab.nat import NatLab
from lab.network import DEVICE, run_command
from lab.processes import cpu_seconds
from test_nat import RTT_MS

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.long("takes minutes"), pytest.mark.timeout(900)]

HIDDEN, RELAYS = 20, 2
#: From when the last one is ready: they start on the CPUs of one machine, some at once.
MESH_S = 15.0
READY_S, AT_ONCE = 60.0, 4
SETTLED_S, WATCHED_S = 45.0, 30.0
#: Of a node, both ways together, and of one CPU.
IDLE_BYTES_S, IDLE_SHARE = 1024, 0.01


def reached(node: Node) -> list[str]:
    """The paths to those it has a session with, one each."""
    return [row["paths"][0] for row in node.ask().get("peers", ()) if row["paths"]]


def moved_bytes(node: Node) -> int:
    names = [Path("/sys/class/net", DEVICE, "statistics", each) for each in ("rx_bytes", "tx_bytes")]
    said = run_command("ip", "netns", "exec", node.namespace.name, "cat", *map(str, names))
    return sum(map(int, said.split()))


def test_twenty_hidden_members_and_two_relays() -> None:
    with NatLab(public=RELAYS, hidden=(1,) * HIDDEN, rtt_ms=RTT_MS) as lab:
        nodes = [machine(lab, place) for place in range(RELAYS + HIDDEN)]
        nodes[0].start()
        nodes[0].wait_ready()
        for node in nodes[1:RELAYS]:
            join(nodes[0], node)
        hidden = nodes[RELAYS:]
        tokens = [invite(nodes[0]) for _ in hidden]
        begun_s = time.monotonic()
        for first in range(0, HIDDEN, AT_ONCE):
            some = slice(first, first + AT_ONCE)
            for node, token in zip(hidden[some], tokens[some], strict=True):
                node.start("--join", token)
            for node in hidden[some]:
                node.wait_ready(READY_S)
        ready_s = time.monotonic() - begun_s
        wait_until(
            lambda: all(len(reached(node)) == len(nodes) - 1 for node in hidden), READY_S, "all reach all"
        )
        mesh_s = time.monotonic() - begun_s - ready_s
        kinds = [path.partition(" ")[0] for node in hidden for path in reached(node)]
        print(
            f"all ready after {ready_s:.1f} s, full mesh {mesh_s:.1f} s later; {kinds.count('relayed')} relayed"
        )
        assert mesh_s <= within(MESH_S)

        time.sleep(SETTLED_S)
        before = [(moved_bytes(node), cpu_seconds(node.pids())) for node in hidden]
        time.sleep(WATCHED_S)
        rates = [
            (moved_bytes(node) - moved) / WATCHED_S for node, (moved, _) in zip(hidden, before, strict=True)
        ]
        shares = [
            (cpu_seconds(node.pids()) - spent) / WATCHED_S
            for node, (_, spent) in zip(hidden, before, strict=True)
        ]
        print(
            f"idle: {sum(rates) / HIDDEN:.0f} bytes/s a node, most {max(rates):.0f}; "
            f"{sum(shares) / HIDDEN:.2%} of a CPU, most {max(shares):.2%}"
        )
        assert sum(rates) / HIDDEN <= IDLE_BYTES_S and sum(shares) / HIDDEN <= IDLE_SHARE
        check_logs(nodes)
