"""Nodes as a whole: killed ones, stopped ones. VPND_KILL_SEED repeats what is killed."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from lab import (
    Node,
    SteadyFlow,
    children,
    ping,
    process_tree,
    running_nodes,
    settled,
    unharmed,
    wait_connected,
    wait_until,
)
from lab.network import run_command

pytestmark = [pytest.mark.root, pytest.mark.timeout(900), pytest.mark.long("takes minutes")]

SEED = int(os.environ.get("VPND_KILL_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
KILLS = 10
#: Well again after a process was killed, which may be a whole node that starts anew, or goes on after it was stopped.
WELL_S = 30.0
STOPPED_S = 60.0


def healthy(node: Node) -> bool:
    return node.ask().get("health") == "healthy"


def reaches(one: Node, ip: str) -> bool:
    return ping(one.lab, one.namespace, ip, count=2, interval_s=0.2).loss < 1


def test_whatever_is_killed_comes_back_and_nothing_is_left() -> None:
    dice = random.Random(SEED)
    print(f"VPND_KILL_SEED={SEED}")
    with running_nodes() as nodes:
        a, b = nodes
        with (
            SteadyFlow(a.namespace, b.namespace, b.virtual_ip) as there,
            SteadyFlow(b.namespace, a.namespace, a.virtual_ip) as back,
            unharmed([b]),
        ):
            for _ in range(KILLS):
                name = dice.choice([*children(a.ask())])
                os.kill(children(a.ask())[name]["pid"], signal.SIGKILL)
                killed_s = time.monotonic()
                if name == "supervisor":
                    a.wait_ended()
                    wait_until(lambda: not left_of(a), 10.0, f"nothing is left, but {left_of(a)}")
                    a.start()
                wait_connected(nodes, WELL_S)
                wait_until(
                    lambda: all(map(healthy, nodes)) and reaches(a, b.virtual_ip), WELL_S, "both are well"
                )
                print(f"{name}: well {time.monotonic() - killed_s:.1f} s later")
            moving(there)
            moving(back)
        for node in nodes:
            settled(node)


def left_of(node: Node) -> list[str]:
    """What a node that was killed has left on its machine."""
    name = node.namespace.name
    found = [f"process {pid}" for pid in run_command("ip", "netns", "pids", name).split()]
    for what in (("ip", "link", "show", "vpnd0"), ("nft", "list", "table", "inet", "vpnd_vpnd0")):
        if not node.lab.run(node.namespace, *what, check=False).returncode:
            found.append(" ".join(what))
    return found


def moving(flow: SteadyFlow) -> None:
    before = len(flow.numbers)
    wait_until(lambda: len(flow.numbers) > before, 5.0, "packets flow")


@pytest.mark.parametrize("what", ["shard 0", "control", "supervisor", "all"])
def test_a_process_that_is_stopped_for_a_minute_is_told_and_the_node_well_after_it(what: str) -> None:
    with running_nodes(shards=1) as nodes:
        a, b = nodes
        rows = children(a.ask())
        pids = process_tree(a.pids()) if what == "all" else [rows[what]["pid"]]
        with SteadyFlow(b.namespace, a.namespace, a.virtual_ip, rate_hz=50) as flow:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            stopped_s = time.monotonic()
            told = ""
            try:
                wait_until(lambda: said(a), 15.0, "it is told")
                told = said(a)
                if what == "all":
                    wait_until(lambda: not healthy(b), 15.0, "the other one misses it")
                time.sleep(max(0.0, stopped_s + STOPPED_S - time.monotonic()))
            finally:
                for pid in pids:
                    try:
                        os.kill(pid, signal.SIGCONT)
                    except ProcessLookupError:
                        pass  # was killed, and another one is in its place
            over_s = time.monotonic()
            wait_connected(nodes, WELL_S)
            wait_until(lambda: all(map(healthy, nodes)) and reaches(b, a.virtual_ip), WELL_S, "both are well")
            print(f"{what}: {told}; well {time.monotonic() - over_s:.1f} s after")
            moving(flow)
        after = a.ask()
        restarts = after["control"]["restarts"] + after["shards"][0]["restarts"]
        assert restarts == (what in ("shard 0", "control")), "who was only held up is not killed"
        for node in nodes:
            settled(node)


def said(node: Node) -> str:
    """What `vpnd status` says of a node that is not healthy, in a line."""
    done = node.vpnd("status", check=False, timeout_s=30.0)
    if not done.returncode:
        return ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return next((line for line in lines if "NOT HEALTHY" in line), lines[0]).strip()
