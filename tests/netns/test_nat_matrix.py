"""Every kind of NAT against every other: who reaches whom, how, and how soon. Long: VPND_LONG_TESTS=1."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from lab import Node, check_logs, wait_for_answer, wait_until, within
from lab.joining import address, join, machine
from lab.nat import NatLab
from test_nat import DIRECT_MS, RTT_MS, paths, rtt_ms

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.long("takes minutes"),
    pytest.mark.timeout(600),
]

RUNS = 10
#: The promises, from the start on: to the first answer, and to the direct path. Who can be dialed is there sooner.
REACHED_S, DIRECT_S, DIALED_S = 2.0, 2.5, 1.5
PATIENCE_S = 15.0
PROBE_S = 0.3
KEEP = ("masq", "eim", "fw")
#: One kind, the other, whether unasked packets are answered with a reset, whether a direct path is to be had.
CELLS = [
    *((one, other, reset, True) for one in KEEP for other in KEEP for reset in (False, True)),
    ("cone", "fully", False, True),
    ("cone", "masq", False, True),
    ("masq", "fully", False, False),
    ("fully", "fully", False, False),
    *(("block", other, False, False) for other in ("masq", "fully", "block")),
]


class World(NamedTuple):
    """r is public; a runs behind gateway 1, b is started behind gateway 2 again and again, and c behind gateway 1."""

    lab: NatLab
    r: Node
    a: Node
    b: Node
    c: Node


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with NatLab(hidden=(2, 1), rtt_ms=RTT_MS) as lab:
        r, a, c, b = (machine(lab, place) for place in range(4))
        r.start()
        r.wait_ready()
        for node in (a, b, c):
            join(r, node)
        for node in (b, c):
            assert node.stop() == 0
        yield World(lab, r, a, b, c)
        check_logs([r, a, b, c])


class Times(NamedTuple):
    """Seconds from the start of a node until it is ready, has an answer, and has it directly."""

    ready: float
    reached: float
    direct: float


def started(node: Node, peer: Node, *, direct: bool) -> Times:
    """Start `node`, and see how it reaches `peer`. It runs then."""
    name, virtual, begun_s = peer.namespace.label, address(peer), time.monotonic()

    def directly() -> bool:
        return any(path.startswith("direct") for path in paths(node, name))

    node.start()
    node.wait_ready()
    ready_s = time.monotonic() - begun_s
    wait_for_answer(node.lab, node.namespace, virtual, PATIENCE_S, probe_wait_s=PROBE_S)
    reached_s = time.monotonic() - begun_s
    if not direct:
        time.sleep(2.0)
        both = *paths(node, name), *paths(peer, node.namespace.label)
        assert len(both) >= 2 and all(path.startswith("relayed via r") for path in both)
        assert rtt_ms(node, virtual) < 3 * RTT_MS
        return Times(ready_s, reached_s, float("nan"))
    wait_until(directly, PATIENCE_S, "they have a direct connection")
    direct_s = time.monotonic() - begun_s
    wait_until(lambda: rtt_ms(node, virtual) < DIRECT_MS, PATIENCE_S, "packets go by it")
    return Times(ready_s, reached_s, direct_s)


def judge(cell: str, runs: list[Times], reached_s: float = REACHED_S, direct_s: float = DIRECT_S) -> None:
    """One line of medians and maxima; all are to hold the promise."""
    figures = "; ".join(
        f"{name} {statistics.median(column):.2f}, {max(column):.2f} s"
        for name, column in zip(Times._fields, zip(*runs, strict=True), strict=True)
    )
    after = [run.reached - run.ready for run in runs]
    print(f"{cell}: {len(runs)} runs (median, most): {figures}; {max(after):.2f} s from ready to reached")
    assert max(run.reached for run in runs) <= within(reached_s)
    assert not any(run.direct > within(direct_s) for run in runs)  # no number where none is to be had


@pytest.mark.parametrize(("one", "other", "reset", "direct"), CELLS)
def test_two_reach_each_other(world: World, one: str, other: str, reset: bool, direct: bool) -> None:
    world.lab.nat(1, one, reset=reset)
    world.lab.nat(2, other, reset=reset)
    runs = []
    for _ in range(RUNS):
        runs.append(started(world.b, world.a, direct=direct))
        assert world.b.stop() == 0
    judge(f"{one} x {other}{', resets' if reset else ''}", runs)


def test_two_in_one_local_network_and_one_elsewhere(world: World) -> None:
    for gateway in (1, 2):
        world.lab.nat(gateway, "masq")
    runs = []
    for _ in range(RUNS):
        runs.append(started(world.c, world.a, direct=True))
        assert all("10.1.0." in path for path in paths(world.c, "a"))
        assert world.c.stop() == 0
    judge("same local network, same port", runs, DIALED_S, DIALED_S)


@pytest.mark.parametrize("kind", ["masq", "fully", "block"])
def test_who_can_be_reached_is(world: World, kind: str) -> None:
    world.lab.nat(2, kind)
    runs = []
    for _ in range(RUNS):
        runs.append(started(world.b, world.r, direct=True))
        assert world.b.stop() == 0
    judge(f"public x {kind}", runs, DIALED_S, DIALED_S)
