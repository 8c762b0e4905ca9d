"""Datagrams beside a punched session: through NATs that keep the port, and through such as take another one."""

from __future__ import annotations

import pytest
from lab import Node, check_logs, wait_for_answer, wait_until
from lab.joining import address, join, machine
from lab.nat import NatLab

pytestmark = [pytest.mark.root]

RTT_MS = 40.0
WITHIN_S = 20.0


def datagrams(node: Node, name: str) -> str:
    return str(next(row["datagrams"] for row in node.ask()["peers"] if row["name"] == name))


@pytest.mark.parametrize(
    "kinds",
    [
        ("eim", "masq"),
        *(
            pytest.param(kinds, marks=pytest.mark.long("one more"))
            for kinds in (("masq", "masq"), ("eim", "eim"))
        ),
    ],
)
def test_datagrams_go_through_both_nats_beside_the_punched_session(kinds: tuple[str, str]) -> None:
    with NatLab(hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        for gateway, kind in enumerate(kinds, 1):
            lab.nat(gateway, kind)
        r, a, b = (machine(lab, place) for place in range(3))
        r.start()
        r.wait_ready()
        for node in (a, b):
            join(r, node)
            wait_until(
                lambda node=node: datagrams(node, "r") == "used", WITHIN_S, "datagrams reach the public one"
            )
        wait_for_answer(lab, a.namespace, address(b), WITHIN_S, probe_wait_s=0.3)
        for node, other in ((a, "b"), (b, "a")):
            wait_until(
                lambda node=node, other=other: datagrams(node, other) == "used", WITHIN_S, "and each other"
            )
        check_logs([r, a, b])
        for node in (b, a, r):
            assert node.stop() == 0
