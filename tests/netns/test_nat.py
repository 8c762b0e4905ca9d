"""Members behind NATs reach each other: by a relay at once, and directly where their NATs let them."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
from lab import Node, check_logs, wait_for_answer, wait_until
from lab.joining import address, join, machine
from lab.nat import NatLab

pytestmark = pytest.mark.root

#: From the start of a joining node on; an idle machine takes half of it.
REACHED_S = 10.0
DIRECT_S = 10.0
RTT_MS = 40.0
PROBE_S = 0.3
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
