"""Ways that become better while packets flow, and the odd ones: IPv6 behind firewalls, and holes made by chance. Long:
VPND_LONG_TESTS=1."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from lab import Node, check_logs, wait_for_answer, wait_until, within
from lab.joining import address, join, machine
from lab.nat import NatLab
from lab.network import Namespace, run_command
from test_nat import DIRECT_MS, PROBE_S, REACHED_S, RTT_MS, Pings, paths, rtt_ms
from test_port_maps import forwarded, reach

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.long("takes minutes"), pytest.mark.timeout(400)]

SOON = {"reach_delay": "300ms", "reach_interval": "2s", "upgrade_interval": "2s", "map_retry": "1s"}
#: A router's program starts, says so, and is asked.
MAPPED_AGAIN_S = 3.0
#: From the start of a node on, its NAT being asked about among it.
BY_CHANCE_S = 8.0
PACKETS, INTERVAL_S = 1500, 0.02


def sees(node: Node, name: str, path: str) -> bool:
    """Whether all sessions of the node with that peer are by such a path."""
    found = paths(node, name)
    return bool(found) and all(re.fullmatch(path, each) for each in found)


def restarted(lab: NatLab, gateway: int) -> None:
    """The router's program starts again, and has forgotten all ports it gave."""
    lab.routers[gateway].send_signal(signal.SIGTERM)
    lab.routers[gateway].wait()
    lab.nat(gateway, "masq")
    lab.map_ports(gateway)


def test_a_port_of_the_router_takes_the_place_of_a_hole_and_comes_back_when_it_starts_again() -> None:
    with NatLab(hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        r, a, b = (machine(lab, place, {"nat": {**SOON, "map_ports": False}}) for place in range(3))
        r.start()
        r.wait_ready()
        for node in (a, b):
            join(r, node)
        wait_for_answer(lab, b.namespace, address(a), REACHED_S, probe_wait_s=PROBE_S)
        wait_until(lambda: sees(b, "a", r".*\(punched\)"), REACHED_S, "they have punched")
        sent = Pings(b, address(a), count=PACKETS, interval_s=INTERVAL_S)
        lab.map_ports(1)
        a.config["nat"]["map_ports"] = True
        a.write_config()
        a.vpnd("reload")
        for node, other in ((b, "a"), (a, "b")):
            wait_until(
                lambda node=node, other=other: sees(node, other, r"direct 203\.0\.113\.\d:\d+"),
                REACHED_S,
                "b has dialed a",
            )
        assert sees(b, "a", r"direct 203\.0\.113\.1:4001")
        assert sent.sequence() == list(range(1, PACKETS + 1)), "nothing was lost or overtaken"

        restarted(lab, 1)
        begun_s = time.monotonic()
        wait_until(lambda: forwarded(lab, 1) == ["10.1.0.2:4001"], MAPPED_AGAIN_S, "a has its port again")
        print(f"mapped again {time.monotonic() - begun_s:.2f} s after the router was back")
        assert reach(a)["port_map"]
        check_logs([r, a, b])


def test_the_local_network_takes_the_place_of_a_relay_when_it_lets_them_through() -> None:
    with NatLab(hidden=(2, 1), rtt_ms=RTT_MS) as lab:
        r, a, c = (machine(lab, place, {"nat": SOON}) for place in range(3))
        ports = [f"to-{node.namespace.label}" for node in (a, c)]
        for port in ports:
            run_command(*lab_in(lab.gateways[0]), "bridge", "link", "set", "dev", port, "isolated", "on")
        r.start()
        r.wait_ready()
        for node in (a, c):
            join(r, node)
        wait_for_answer(lab, c.namespace, address(a), REACHED_S, probe_wait_s=PROBE_S)
        assert sees(c, "a", "relayed via r.*")
        sent = Pings(c, address(a), count=PACKETS, interval_s=INTERVAL_S)
        for port in ports:
            run_command(*lab_in(lab.gateways[0]), "bridge", "link", "set", "dev", port, "isolated", "off")
        for node, other in ((c, "a"), (a, c.namespace.label)):
            wait_until(
                lambda node=node, other=other: sees(node, other, r"direct 10\.1\.0\.\d:\d+"),
                2 * REACHED_S,
                "they are near",
            )
        assert sent.sequence() == list(range(1, PACKETS + 1)), "nothing was lost or overtaken"
        spread = (
            r.ask()["control"]["to_direct"],
            a.ask()["control"]["to_direct"],
            c.ask()["control"]["to_direct"],
        )
        assert sum(sum(each["buckets"]) for each in spread) == 1
        check_logs([r, a, c])


def lab_in(namespace: Namespace) -> tuple[str, ...]:
    return "ip", "netns", "exec", namespace.name


def test_firewalls_in_front_of_ipv6_are_punched() -> None:
    with NatLab(hidden=(1, 1), rtt_ms=RTT_MS, ipv6=True) as lab:
        for gateway in (1, 2):
            lab.nat(gateway, "fully")  # nothing to be had by IPv4
        r, a, b = (
            machine(
                lab, place, {"nat": SOON, "p2p": {"listen": ["/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001"]}}
            )
            for place in range(3)
        )
        r.start()
        r.wait_ready()
        for node in (a, b):
            join(r, node)
        begun_s = time.monotonic()
        wait_for_answer(lab, b.namespace, address(a), REACHED_S, probe_wait_s=PROBE_S)
        punched = r"direct \[2001:db8:[12]::2\]:\d+ \(punched\)"
        for node, other in ((b, "a"), (a, "b")):
            wait_until(
                lambda node=node, other=other: sees(node, other, punched), REACHED_S, "they have punched"
            )
        print(f"IPv6 punched {time.monotonic() - begun_s:.2f} s after it was ready")
        assert rtt_ms(b, address(a)) < DIRECT_MS
        check_logs([r, a, b])


def entries(namespace: Namespace) -> int:
    """What the gateway keeps in mind."""
    file = Path("/proc/sys/net/netfilter/nf_conntrack_count")
    return int(run_command(*lab_in(namespace), "cat", str(file)))


@pytest.mark.setting("nat.birthday")
def test_many_ports_make_a_hole_where_one_nat_is_symmetric() -> None:
    with NatLab(public=2, hidden=(1, 1), rtt_ms=RTT_MS) as lab:  # two see what a NAT makes of ports
        settings = {"nat": {"birthday": True}}
        r, s, a, b = (machine(lab, place, settings) for place in range(4))
        r.start()
        r.wait_ready()
        for node in (s, a, b):
            join(r, node)
        assert b.stop() == 0
        for kinds in (("masq", "fully"), ("masq", "fully"), ("fully", "masq")):
            for gateway, kind in enumerate(kinds, 1):
                lab.nat(gateway, kind)
            a.vpnd("netcheck")
            assert reach(a)["mapping"] == ("kept" if kinds[0] == "masq" else "random")
            before = [entries(gateway) for gateway in lab.gateways]
            begun_s = time.monotonic()
            b.start()
            b.wait_ready()
            ready_s = time.monotonic() - begun_s
            wait_until(lambda: sees(b, "a", r".*\(punched\)"), 3 * BY_CHANCE_S, "they have punched")
            took_s = time.monotonic() - begun_s
            grown = [entries(gateway) - was for gateway, was in zip(lab.gateways, before, strict=True)]
            print(
                f"{kinds[0]} x {kinds[1]}: punched {took_s:.2f} s after the start, "
                f"ready {ready_s:.2f}; {grown} new entries in gateways"
            )
            assert took_s <= within(BY_CHANCE_S) and max(grown) < 4 * 500 + 256
            wait_until(lambda: rtt_ms(b, address(a)) < DIRECT_MS, REACHED_S, "packets go by it")
            assert b.stop() == 0
        check_logs([r, s, a, b])
