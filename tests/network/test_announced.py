"""Announced networks on a real kernel: what is routed, what is refused, who goes around it, and what stays behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from supervisor.network import overlap, policy
from supervisor.network.announced import AnnouncedRoutes, open_for
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
    known: RoutesKnown, *later: RoutesKnown, allow_overlap: bool = False, look=lambda: None, opened=None
) -> list[str]:
    """Apply one after the other, look, close; the warnings there were then."""

    async def run() -> list[str]:
        routes = opened() if opened else AnnouncedRoutes("tn0", table(), allow_overlap=allow_overlap)
        for each in (known, *later):
            routes.apply(each)
            for _ in range(500):
                await asyncio.sleep(0.01)
                if not routes.busy:
                    break
        warnings = routes.warnings
        look()
        await routes.close()
        return warnings

    return asyncio.run(run())


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
    """As a node that was killed twice does."""
    wanted = [ip_network("0.0.0.0/0"), ip_network("10.9.0.0/24")]
    for user in (USER, USER - 1):
        left = PolicyTable(Place("tn0", TABLE, PRIORITY, user))
        assert left.set(wanted, [ip_network("::/0")]) == []
    assert len(rules(machine)) >= 6


def test_what_a_killed_node_left_is_cleared_at_the_next_start(machine: str) -> None:
    leave_behind(machine)
    table().clear()
    assert rules(machine) == []
    assert device_to(machine, INTERNET) == "eth0"
    assert device_to(machine, "2001:db8:7::1") == "eth0"
    table().clear()


def test_the_janitors_commands_take_away_what_one_node_left(machine: str) -> None:
    ip(machine, "rule", "add", "priority", "5302", "lookup", "main")
    assert table().set([ip_network("0.0.0.0/0")], [ip_network("::/0")]) == []
    script = "\n".join(policy.cleanup_commands(TABLE, PRIORITY))
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

    class NoTable(PolicyTable):
        def set(self, networks, unreachable=()):
            return []

    async def run() -> list[str]:
        place = Place("tn0", TABLE, PRIORITY, os.getuid())
        routes = AnnouncedRoutes(
            "tn0", NoTable(place), allow_overlap=False, proc_sys=tmp_path, in_use=list[overlap.Taken]
        )
        routes.advertise(ours)
        routes.apply(RoutesKnown(routes=others))
        warnings = routes.warnings
        await routes.close()
        return warnings

    warnings = asyncio.run(run())
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
    config = Config(network=Network(route_table=7700, rule_priority=6100), process=Process(user="nobody"))

    def look() -> None:
        assert "10.9.0.0/24 dev tn0" in ip(machine, "route", "show", "table", "7700")
        found = [line.split(":")[0] for line in ip(machine, "rule").splitlines()]
        assert {"6100", "6101"} <= set(found)

    assert (
        routed(RoutesKnown(routes=("10.9.0.0/24",)), look=look, opened=lambda: open_for("tn0", config)) == []
    )
    assert "6100" not in ip(machine, "rule")
