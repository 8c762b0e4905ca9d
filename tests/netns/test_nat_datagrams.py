"""Datagrams beside a punched session: through NATs that keep the port, and through such as take another one."""

from __future__ import annotations

import re
import time

import pytest
from lab import Node, check_logs, wait_for_answer, wait_until
from lab.joining import address, join, machine
from lab.nat import NatLab
from lab.node import P2P_PORT

pytestmark = [pytest.mark.root]

RTT_MS = 40.0
WITHIN_S = 20.0
#: Longer than the gateway remembers what nobody uses.
IDLE_S = 8.0


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


@pytest.mark.setting("carrier.keepalive")
@pytest.mark.parametrize(("keepalive", "open_"), [("1s", True), ("1h", False)])
def test_what_nobody_uses_keeps_a_nat_open_if_it_is_probed_often_enough(keepalive: str, open_: bool) -> None:
    with NatLab(hidden=(1,), rtt_ms=RTT_MS) as lab:
        lab.nat(1, "masq")
        for kind in ("timeout", "timeout_stream"):
            lab.run(lab.gateways[0], "sysctl", "-qw", f"net.netfilter.nf_conntrack_udp_{kind}=3")
        nodes = pair(lab, {"carrier": {"keepalive": keepalive}})
        time.sleep(IDLE_S)
        entries = lab.run(lab.gateways[0], "cat", "/proc/net/nf_conntrack").stdout
        assert (f"dport={P2P_PORT}" in "".join(re.findall(r".* udp .*", entries))) == open_
        for node in nodes:
            assert node.stop() == 0


@pytest.mark.setting("carrier.largest_datagram")
@pytest.mark.parametrize(("mtu", "size"), [(1400, 1372), (1500, 1472)])
def test_a_gateway_with_a_small_mtu_bounds_what_goes_out_of_it(mtu: int, size: int) -> None:
    with NatLab(hidden=(1,), rtt_ms=RTT_MS) as lab:
        lab.nat(1, "masq")
        lab.ip(lab.gateways[0], "link", "set", "wan", "mtu", str(mtu))
        nodes = pair(lab, {})
        r, a = nodes
        wait_until(lambda: a.ask()["peers"][0]["datagram_bytes"] == size, WITHIN_S, f"{size} bytes pass")
        assert datagrams(a, "r") == "used"
        for node in nodes:
            assert node.stop() == 0


def pair(lab: NatLab, settings: dict[str, dict[str, object]]) -> list[Node]:
    """A public node and one behind a gateway, which send datagrams to each other."""
    r, a = (machine(lab, place, settings) for place in range(2))
    r.start()
    r.wait_ready()
    join(r, a)
    wait_for_answer(lab, a.namespace, address(r), WITHIN_S, probe_wait_s=0.3)
    for node, other in ((a, "r"), (r, "a")):
        wait_until(lambda node=node, other=other: datagrams(node, other) == "used", WITHIN_S, "datagrams")
    return [r, a]
