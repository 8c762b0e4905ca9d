"""Announced networks on a real kernel: what is routed, what is refused, who goes around it, and what stays behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from supervisor.network import killswitch
from supervisor.network.announced import AnnouncedRoutes
from supervisor.network.policy import Place, PolicyTable
from supervisor.network.routes import NetworkSetup
from supervisor.network.tun import Tun
from vpnd.api.messages import RoutesKnown
from vpnd.config.schema import Config, Network, Process

pytestmark = pytest.mark.root

USER = 65534
TABLE, PRIORITY = 7669, 5300
INTERNET = "198.51.100.7"


def ip(name: str, *arguments: str) -> str:
    return subprocess.run(["ip", "-n", name, *arguments], check=True, capture_output=True, text=True).stdout


def rules(name: str) -> list[str]:
    """Everything but what every namespace has."""
    lines = ip(name, "rule").splitlines() + ip(name, "-6", "rule").splitlines()
    return sorted(line for line in lines if line.partition(":")[0] not in ("0", "32766", "32767"))


def device_to(name: str, address: str, user: int = 0) -> str:
    """Where the kernel sends a packet of a user; "" for nowhere."""
    command = ["ip", "-n", name, "route", "get", address, "uid", str(user)]
    words = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return words[words.index("dev") + 1] if "dev" in words else ""


@pytest.fixture
def machine(namespaces, entered) -> Iterator[str]:
    """A machine with a LAN, a default route and an open TUN tn0 of 10.86.0.1/16."""
    name = namespaces[0]
    ip(name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", namespaces[1])
    ip(namespaces[1], "link", "set", "eth0", "up")
    ip(name, "addr", "add", "192.168.4.2/24", "dev", "eth0")
    ip(name, "addr", "add", "2001:db8:4::2/64", "dev", "eth0", "nodad")
    ip(name, "link", "set", "eth0", "up")
    ip(name, "route", "add", "default", "via", "192.168.4.1")
    ip(name, "-6", "route", "add", "default", "via", "2001:db8:4::1")
    with entered(name), Tun.open("tn0", 1400, False):
        NetworkSetup().apply("tn0", 1400, ["10.86.0.1/16", "fd86::1/64"], [], 500)
        yield name


def table() -> PolicyTable:
    return PolicyTable(Place("tn0", TABLE, PRIORITY, USER))


def routed(
    known: RoutesKnown,
    *later: RoutesKnown,
    allow_overlap: bool = False,
    hold: bool = False,
    look=lambda: None,
) -> list[str]:
    """Apply one after the other, look, take back; the warnings there were then."""
    routes = AnnouncedRoutes("tn0", table(), allow_overlap=allow_overlap, hold=hold)
    for each in (known, *later):
        routes.known = each
        problems = routes.make_true()
    look()
    warnings = [*problems, *routes.hints]
    routes.undo(hold=False)
    return warnings


def test_an_announced_network_goes_into_the_tunnel_but_not_for_its_own_sockets(machine: str) -> None:
    def look() -> None:
        assert device_to(machine, "10.9.0.1") == "tn0"
        assert device_to(machine, "10.9.0.1", USER) == "eth0"
        assert device_to(machine, "2001:db8:9::1") == "tn0"
        assert device_to(machine, "2001:db8:9::1", USER) == "eth0"
        assert device_to(machine, INTERNET) == "eth0"

    assert routed(RoutesKnown(routes=("10.9.0.0/24", "2001:db8:9::/48")), look=look) == []
    assert rules(machine) == []
    assert device_to(machine, "10.9.0.1") == "eth0"


def test_what_is_announced_no_longer_is_taken_back(machine: str) -> None:
    def look() -> None:
        assert device_to(machine, "10.9.0.1") == "eth0"
        assert device_to(machine, "10.8.0.1") == "tn0"
        assert len(rules(machine)) == 2

    both = RoutesKnown(routes=("10.9.0.0/24", "2001:db8:9::/48"))
    assert routed(both, RoutesKnown(routes=("10.8.0.0/24",)), look=look) == []


def test_a_network_of_the_machine_is_not_taken(machine: str) -> None:
    def look() -> None:
        assert device_to(machine, "192.168.4.9") == "eth0"
        assert device_to(machine, "10.9.0.1") == "tn0"

    known = RoutesKnown(routes=("192.168.4.0/25", "10.9.0.0/24"))
    (warning,) = routed(known, look=look)
    assert "192.168.4.0/25" in warning
    assert "192.168.4.2 of eth0" in warning

    def look_again() -> None:
        # it is there, but the machine's own route is looked at first
        assert device_to(machine, "192.168.4.9") == "eth0"
        assert "192.168.4.0/25" in ip(machine, "route", "show", "table", str(TABLE))

    assert routed(known, allow_overlap=True, look=look_again) == []


def test_with_an_exit_node_all_but_the_machines_own_networks_goes_there(machine: str) -> None:
    def look() -> None:
        assert device_to(machine, INTERNET) == "tn0"
        assert device_to(machine, INTERNET, USER) == "eth0"
        assert device_to(machine, "192.168.4.9") == "eth0"
        assert device_to(machine, "10.86.3.3") == "tn0"
        assert device_to(machine, "2001:db8:7::1") == "tn0"
        assert device_to(machine, "2001:db8:4::9") == "eth0"

    both = RoutesKnown(routes=("0.0.0.0/0", "::/0"), exit_peer="someone")
    assert [line for line in routed(both, look=look) if "strict" not in line] == []
    assert device_to(machine, INTERNET) == "eth0"
    assert rules(machine) == []


def test_a_family_that_the_exit_node_does_not_carry_goes_nowhere(machine: str) -> None:
    def look() -> None:
        assert device_to(machine, INTERNET) == "tn0"
        assert device_to(machine, "2001:db8:7::1") in ("", "lo")
        assert device_to(machine, "2001:db8:7::1", USER) == "eth0"
        assert device_to(machine, "2001:db8:4::9") == "eth0"

    routed(RoutesKnown(routes=("0.0.0.0/0",), exit_peer="someone"), look=look)
    assert rules(machine) == []
    assert ip(machine, "-6", "route", "show", "table", str(TABLE)) == ""


def leave_behind(machine: str) -> None:
    """As a node that was killed does, and one of another user before it."""
    wanted = [ip_network("0.0.0.0/0"), ip_network("10.9.0.0/24")]
    assert table().set(wanted, [ip_network("::/0")]) == []
    for family in ("-4", "-6"):
        ip(machine, family, "rule", "add", "not", "uidrange", "1-1", "priority", "5301", "lookup", str(TABLE))
    assert len(rules(machine)) == 6


def test_what_a_killed_node_left_is_cleared_at_the_next_start(machine: str) -> None:
    leave_behind(machine)
    assert table().set([]) == []
    assert rules(machine) == []
    assert device_to(machine, INTERNET) == "eth0"
    assert device_to(machine, "2001:db8:7::1") == "eth0"
    assert table().set([]) == []


def test_the_janitors_commands_take_away_what_one_node_left(machine: str) -> None:
    ip(machine, "rule", "add", "priority", "5302", "lookup", "main")
    assert table().set([ip_network("0.0.0.0/0")], [ip_network("::/0")]) == []
    script = "\n".join(killswitch.cleanup_commands(Config(), in_network=True))
    subprocess.run(["ip", "netns", "exec", machine, "sh", "-c", script], check=False, capture_output=True)
    assert [rule.partition(":")[0] for rule in rules(machine)] == ["5302"], "another's rule stays"
    assert device_to(machine, INTERNET) == "eth0"
    assert device_to(machine, "2001:db8:7::1") == "eth0"


def test_a_device_that_has_gone_leaves_no_rules(machine: str, entered) -> None:
    kept = table()
    assert kept.set([ip_network("10.9.0.0/24")]) == []
    ip(machine, "link", "delete", "tn0")
    assert kept.set([]) == []
    assert rules(machine) == []


SYSCTLS = [
    # (sentence, sysctls, announced by us, routed, words of the warnings)
    ("a node that announces nothing need not forward", {"net/ipv4/ip_forward": 0}, (), (), []),
    ("one that announces has to", {"net/ipv4/ip_forward": 0}, ("10.9.0.0/24",), (), ["net.ipv4.ip_forward=1"]),
    ("and does", {"net/ipv4/ip_forward": 1}, ("10.9.0.0/24",), (), []),
    (
        "from the tunnel above all",
        {"net/ipv4/ip_forward": 1, "net/ipv4/conf/tn0/forwarding": 0},
        ("10.9.0.0/24",),
        (),
        ["net.ipv4.conf.tn0.forwarding=1"],
    ),
    ("a kernel that does not say is not judged", {}, ("10.9.0.0/24",), (), []),
    (
        "IPv6 has a switch of its own",
        {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 0},
        ("2001:db8::/32", "10.9.0.0/24"),
        (),
        ["net.ipv6.conf.all.forwarding=1"],
    ),
    ("a strict filter on an interface", {"net/ipv4/conf/all/rp_filter": 0, "net/ipv4/conf/eth0/rp_filter": 1},
     (), ("0.0.0.0/0",), ["rp_filter=2"]),
    ("on a dotted one", {"net/ipv4/conf/all/rp_filter": 0, "net/ipv4/conf/eth0.7/rp_filter": 1},
     (), ("0.0.0.0/0",), ["rp_filter=2"]),
    ("made loose for all", {"net/ipv4/conf/all/rp_filter": 2, "net/ipv4/conf/eth0/rp_filter": 1},
     (), ("0.0.0.0/0",), []),
    ("no matter without an exit node", {"net/ipv4/conf/all/rp_filter": 1}, (), ("10.9.0.0/24",), []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "ours", "others", "words"), [row[1:] for row in SYSCTLS], ids=[row[0] for row in SYSCTLS]
)
def test_what_keeps_it_from_working_is_said(
    tmp_path: Path, values: dict[str, int], ours: tuple[str, ...], others: tuple[str, ...], words: list[str]
) -> None:
    for path, value in values.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{value}\n")

    place = Place("tn0", TABLE, PRIORITY, os.getuid())
    routes = AnnouncedRoutes("tn0", PolicyTable(place), allow_overlap=False, proc_sys=tmp_path)
    routes.advertised, routes.known = ours, RoutesKnown(routes=others)
    warnings = routes.obstacles()
    assert bool(routes.withheld) == any("forward" in word for word in words)
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


def test_refused_rules_are_told(machine: str) -> None:
    bad = PolicyTable(Place("tn0", TABLE, PRIORITY, USER))
    ip(machine, "link", "set", "tn0", "down")
    (problem,) = bad.set([ip_network("10.9.0.0/24")])
    assert "10.9.0.0/24" in problem
    ip(machine, "link", "set", "tn0", "up")
    assert bad.set([ip_network("10.9.0.0/24")]) == [], "and it is tried again"
    assert device_to(machine, "10.9.0.1") == "tn0"


@pytest.mark.setting("network.route_table", "network.rule_priority")
def test_table_and_priority_are_those_of_the_settings(machine: str) -> None:
    network = Network(interface="tn0", route_table=7700, rule_priority=6100)
    assert (
        PolicyTable(killswitch.place(Config(network=network, process=Process(user="nobody")))).set(
            [ip_network("10.9.0.0/24")]
        )
        == []
    )
    assert "10.9.0.0/24 dev tn0" in ip(machine, "route", "show", "table", "7700")
    found = [line.split(":")[0] for line in ip(machine, "rule").splitlines()]
    assert {"6100", "6101"} <= set(found)


#: What another program does to the rules and routes of a running node.
CHANGES = [
    "ip rule del priority 5300",
    "ip rule del priority 5301",
    "ip rule flush; ip rule add priority 32766 lookup main",
    "ip -6 rule flush; ip -6 rule add priority 32766 lookup main",
    f"ip route flush table {TABLE}",
    f"ip -6 route flush table {TABLE}",
    f"ip route del default dev tn0 table {TABLE}",
    f"ip route del unreachable default table {TABLE}",
    f"ip route replace default via 192.168.4.1 table {TABLE}",
    f"ip -6 route replace default via 2001:db8:4::1 table {TABLE}",
    f"ip rule add not uidrange 7-7 priority 5301 lookup {TABLE}",
    f"ip route add 203.0.113.0/24 via 192.168.4.1 table {TABLE}",
    "ip link set tn0 down; ip link set tn0 up",
]


@pytest.mark.parametrize("change", CHANGES)
def test_rules_and_routes_that_somebody_changed_are_mended(machine: str, change: str) -> None:
    def shown() -> list[str]:
        routes = [ip(machine, family, "route", "show", "table", str(TABLE)) for family in ("-4", "-6")]
        return [*rules(machine), *(line for each in routes for line in sorted(each.splitlines()))]

    wanted = [ip_network("0.0.0.0/0"), ip_network("10.9.0.0/24"), ip_network("2001:db8:9::/48")]
    assert table().set(wanted, hold=True) == []
    before = shown()
    subprocess.run(["ip", "netns", "exec", machine, "sh", "-c", change], check=True)
    assert shown() != before or "down" in change
    assert table().set(wanted, hold=True) == []
    assert shown() == before


def test_a_kill_switch_needs_no_device(machine: str) -> None:
    wanted = [ip_network("0.0.0.0/0")]
    assert table().set(wanted, hold=True) == []
    assert table().holds()
    assert device_to(machine, INTERNET) == "tn0"
    ip(machine, "link", "delete", "tn0")
    for _ in range(2):
        assert device_to(machine, INTERNET) == ""
        assert device_to(machine, INTERNET, USER) == "eth0"
        assert device_to(machine, "2001:db8:7::1") in ("", "lo")
        assert device_to(machine, "192.168.4.9") == "eth0"
        assert table().set(wanted, hold=True) == []
    assert table().set([]) == []
    assert not table().holds()
    assert device_to(machine, INTERNET) == "eth0"
