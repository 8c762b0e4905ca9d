"""Whole nodes whose clock is wrong: they say so, and are well within half a minute of its being set. How control judges
what it knows: tests/control/test_clocks.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab import Lab, Node, check_logs, wait_until
from lab.clocks import LIBRARY, clocks_of, set_clock
from lab.joining import address, all_reach_all, invite, machine

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime"),
    pytest.mark.long("takes minutes"),
]

SETTLE_S = 20.0
#: The promise.
HEALED_S = 30.0


@pytest.fixture
def pair() -> Iterator[tuple[Node, Node]]:
    """An authority and another machine, not started."""
    with Lab(2) as lab:
        a, b = (machine(lab, place, {"process": {"realtime": False}}) for place in range(2))
        with clocks_of([a, b]):
            yield a, b


def healthy(node: Node) -> bool:
    return node.ask().get("health") == "healthy" and not node.vpnd("status", check=False).returncode


def joined(a: Node, b: Node) -> None:
    a.start()
    a.wait_ready()
    b.start("--join", invite(a))
    b.wait_ready()
    all_reach_all([a, b], SETTLE_S)


def well(*nodes: Node) -> None:
    wait_until(lambda: all(map(healthy, nodes)), HEALED_S, "healthy")
    all_reach_all(nodes, SETTLE_S)
    check_logs(nodes)
    for node in nodes:
        assert node.stop() == 0


@pytest.mark.parametrize(
    ("offset", "says"), [("-3600", "not yet valid"), ("-20000d", "not yet valid"), ("+40d", "expired")]
)
@pytest.mark.parametrize("running", [False, True])
def test_a_member_whose_clock_is_wrong(
    pair: tuple[Node, Node], offset: str, says: str, running: bool
) -> None:
    a, b = pair
    joined(a, b)
    if not running:
        assert b.stop() == 0
    set_clock(b, offset)
    if not running:
        b.start()
    wait_until(
        lambda: says in str(b.ask().get("ailments")) or "clock" in str(b.ask().get("ailments")),
        SETTLE_S,
        "it says so",
    )
    done = b.vpnd("status", check=False)
    assert done.returncode and "clock" in done.stdout
    set_clock(b, "+0")
    well(a, b)


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("offset", ["+1d", "+40d", "+400d"])
def test_an_authority_that_starts_ahead_and_alone(
    pair: tuple[Node, Node], offset: str, running: bool
) -> None:
    """Nobody is there to tell it. What it signs meanwhile, its own membership too, is of the future later."""
    a, b = pair
    a.start()
    a.wait_ready()
    own = address(a)
    assert a.stop() == 0
    set_clock(a, offset)
    a.start()
    a.wait_ready()
    wait_until(lambda: healthy(a), SETTLE_S, "alone it is healthy")
    if not running:
        assert a.stop() == 0
    set_clock(a, "+0")
    if not running:
        a.start()
    wait_until(lambda: a.ask().get("health") == "healthy", HEALED_S, "healthy")
    b.start("--join", invite(a))
    b.wait_ready()
    assert address(a) == own
    well(a, b)
