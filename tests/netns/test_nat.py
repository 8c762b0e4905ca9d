"""Members behind NATs reach each other: by a relay at once, and directly where their NATs let them."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time

import pytest
from lab import Node, check_logs, wait_for_answer, wait_until, within
from lab.joining import address, join, machine
from lab.nat import NatLab

pytestmark = [pytest.mark.root, pytest.mark.alone]  # times are held to what is promised

#: From the start of a joining node on; an idle machine takes half of it.
REACHED_S = 10.0
DIRECT_S = 10.0
RTT_MS = 40.0
PROBE_S = 0.3
#: From the death of a relay until another one has its place; the promise, on an idle machine, is less.
REPLACED_S = 3.0
#: Between one leg and two: what is relayed goes twice as far.
DIRECT_MS = 1.5 * RTT_MS


def rtt_ms(node: Node, ip: str) -> float:
    """The best of a few pings; infinite when none was answered."""
    said = node.lab.run(node.namespace, "ping", "-c3", "-i0.1", "-W1", ip, check=False).stdout
    found = re.search(r"= ([0-9.]+)/", said)
    return float(found[1]) if found else float("inf")


def paths(node: Node, name: str) -> list[str]:
    """How the sessions of a node with a peer reach it, as status has it."""
    return next(row["paths"] for row in node.ask()["peers"] if row["name"] == name)


def counters(node: Node) -> dict[str, int]:
    return dict(node.ask()["control"]["counters"])


def test_two_behind_nats_reach_each_other_directly_or_by_a_relay() -> None:
    with NatLab(hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        r, a, b = (machine(lab, place) for place in range(3))
        r.start()
        r.wait_ready()
        join(r, a)
        begun_s = time.monotonic()
        join(r, b)
        wait_for_answer(lab, a.namespace, address(b), REACHED_S, probe_wait_s=PROBE_S)
        print(f"reached {time.monotonic() - begun_s:.2f} s after the start")
        wait_until(lambda: rtt_ms(a, address(b)) < DIRECT_MS, DIRECT_S, "they have a direct connection")
        print(f"directly {time.monotonic() - begun_s:.2f} s after the start")
        assert counters(a)["punches_won"] == counters(b)["punches_won"] == 1
        wait_until(lambda: counters(r)["relay_pairs"] == 0, DIRECT_S, "the relay is not needed any more")
        punched = re.compile(r"direct 203\.0\.113\.[12]:[0-9]+ \(punched\)")
        for node, other in ((a, "b"), (b, "a")):
            assert [bool(punched.fullmatch(path)) for path in paths(node, other)] == [True]
            assert paths(node, other)[0] in node.vpnd("status").stdout
        os.kill(a.ask()["control"]["pid"], signal.SIGKILL)  # its successor hears of it from the shards
        wait_until(lambda: a.ask().get("ready"), REACHED_S, "control is back")
        wait_until(lambda: punched.fullmatch("".join(paths(a, "b"))), REACHED_S, "control knows the path")

        assert b.stop() == 0
        for gateway in (1, 2):
            lab.nat(gateway, "fully")
        begun_s = time.monotonic()
        b.start()
        b.wait_ready()
        wait_for_answer(lab, a.namespace, address(b), REACHED_S, probe_wait_s=PROBE_S)
        print(f"reached by the relay {time.monotonic() - begun_s:.2f} s after the start")
        assert 2 * RTT_MS <= rtt_ms(b, address(a)) < 3 * RTT_MS
        assert all(path.startswith("relayed via r") for path in (*paths(a, "b"), *paths(b, "a")))
        assert counters(r)["relay_pairs"] and counters(r)["relay_bytes"]
        check_logs([r, a, b])
        for node in (b, a, r):
            assert node.stop() == 0


def test_a_relayed_session_becomes_direct_and_a_relay_may_die_while_packets_flow() -> None:
    settings = {"nat": {"upgrade_interval": "3s"}}
    with NatLab(public=2, hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        for gateway in (1, 2):
            lab.nat(gateway, "fully")
        r, s, a, b = (machine(lab, place, settings) for place in range(4))
        r.start()
        r.wait_ready()
        for node in (s, a, b):
            join(r, node)
        wait_for_answer(lab, a.namespace, address(b), REACHED_S, probe_wait_s=PROBE_S)
        wait_until(lambda: len(counters(a)) and paths(a, "b"), REACHED_S, "a says how it reaches b")
        relay = {"r": r, "s": s}[paths(a, "b")[0].split()[2]]

        sent = Pings(a, address(b), count=150, interval_s=0.05)
        time.sleep(2.0)
        relay.kill()
        gap_s = sent.longest_gap_s()
        print(f"{gap_s:.2f} s without an answer when the relay died")
        assert gap_s <= within(REPLACED_S)
        wait_until(
            lambda: f"via {relay.namespace.label}" not in " ".join(paths(a, "b")),
            REACHED_S,
            "another one is their relay",
        )

        for node in (a, b):  # what they began, their successors go on with
            os.kill(node.ask()["control"]["pid"], signal.SIGKILL)
        for node, other in ((a, "b"), (b, "a")):
            wait_until(lambda node=node: node.ask().get("ready"), REACHED_S, "control is back")
            wait_until(lambda node=node, other=other: paths(node, other), REACHED_S, "it knows the sessions")
            assert all(path.startswith("relayed") for path in paths(node, other))
        wait_until(
            lambda: "punch" in " ".join((*paths(a, "b"), *paths(b, "a"))), REACHED_S, "a direct one is tried"
        )

        sent = Pings(a, address(b), count=600, interval_s=0.02)
        for gateway in (1, 2):
            lab.nat(gateway, "masq")
        assert sent.sequence() == list(range(1, 601))
        wait_until(lambda: rtt_ms(a, address(b)) < DIRECT_MS, DIRECT_S, "they have a direct connection")
        for node in (b, a, s if relay is r else r):
            assert node.stop() == 0


class Pings:
    """Echo requests that a node sends, and their answers."""

    def __init__(self, node: Node, ip: str, *, count: int, interval_s: float) -> None:
        command = ("ping", "-n", "-D", "-i", str(interval_s), "-c", str(count), "-W", "2", ip)
        self._process = node.lab.spawn(node.namespace, *command, output=subprocess.PIPE)

    def _answers(self) -> list[tuple[float, int]]:
        """When each came, and of which request."""
        said, _ = self._process.communicate()
        return [
            (float(at_s), int(number))
            for at_s, number in re.findall(r"^\[([0-9.]+)\] .*icmp_seq=(\d+)", said, re.M)
        ]

    def longest_gap_s(self) -> float:
        """Between two answers."""
        times = [at_s for at_s, _ in self._answers()]
        return max(later - sooner for sooner, later in itertools.pairwise(times))

    def sequence(self) -> list[int]:
        """The requests that were answered, in the order of their answers."""
        return [number for _, number in self._answers()]
