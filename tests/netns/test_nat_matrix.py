"""Every kind of NAT against every other: who reaches whom, how, and how soon. Long: VPND_LONG_TESTS=1."""

from __future__ import annotations

import os
import time

import pytest
from lab import check_logs, wait_for_answer, wait_until
from lab.joining import address, join, machine
from lab.nat import NatLab
from test_nat import DIRECT_MS, RTT_MS, paths, rtt_ms

# Not marked root: there these must not be skipped, and here they are, but for who asks for them.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("VPND_LONG_TESTS" not in os.environ, reason="takes minutes; VPND_LONG_TESTS=1"),
]

#: The promises are 2 s and 2.5 s from the start on, on an idle machine.
REACHED_S, DIRECT_S = 15.0, 15.0
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


@pytest.mark.parametrize(("one", "other", "reset", "direct"), CELLS)
def test_two_reach_each_other(one: str, other: str, reset: bool, direct: bool) -> None:
    with NatLab(hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        lab.nat(1, one, reset=reset)
        lab.nat(2, other, reset=reset)
        r, a, b = (machine(lab, place) for place in range(3))
        r.start()
        r.wait_ready()
        join(r, a)
        ready_s = join(r, b)
        begun_s = time.monotonic() - ready_s
        wait_for_answer(lab, b.namespace, address(a), REACHED_S, probe_wait_s=PROBE_S)
        reached_s = time.monotonic() - begun_s
        if direct:
            wait_until(lambda: rtt_ms(b, address(a)) < DIRECT_MS, DIRECT_S, "they have a direct connection")
            direct_s = time.monotonic() - begun_s
        else:
            time.sleep(2.0)
            assert all(path.startswith("relayed via r") for path in (*paths(a, "b"), *paths(b, "a")))
            assert rtt_ms(b, address(a)) < 3 * RTT_MS
            direct_s = float("nan")
        print(f"{one} x {other}: ready {ready_s:.2f} s, reached {reached_s:.2f} s, direct {direct_s:.2f} s")
        check_logs([r, a, b])
