"""Address, MTU, queue and routes of a real device, and the way back."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from supervisor.network.routes import NetworkSetup
from supervisor.network.tun import Tun
from vpnd.errors import MachineError

pytestmark = pytest.mark.root


def ip(name: str, *arguments: str) -> str:
    return subprocess.run(["ip", "-n", name, *arguments], check=True, capture_output=True, text=True).stdout


def state(name: str) -> list[object]:
    """All of the device that vpnd sets: flags, MTU, queue, addresses; and the routes of the namespace."""
    link = json.loads(ip(name, "-j", "address", "show", "tn0"))[0]
    device = [sorted(link["flags"]), link["mtu"], link["txqlen"], link["addr_info"]]
    return [*device, ip(name, "route"), ip(name, "-6", "route")]


@pytest.fixture
def device(namespaces, entered):
    """A namespace entered, with an open TUN tn0."""
    with entered(namespaces[0]), Tun.open("tn0", 1400, True) as tun:
        yield namespaces[0], tun


def test_ipv4(device) -> None:
    name, _ = device
    setup = NetworkSetup()
    setup.apply("tn0", 1400, ["10.86.0.1/16"], ["10.86.0.0/16", "10.99.0.0/24", "10.99.0.0/24"], 321)
    link = ip(name, "link", "show", "tn0")
    assert "mtu 1400" in link
    assert "qlen 321" in link
    assert "UP" in link
    assert "gso_max_segs 64" in ip(name, "-d", "link", "show", "tn0")
    routes = ip(name, "route").splitlines()
    assert len(routes) == 2
    assert routes[0].startswith("10.86.0.0/16 dev tn0 proto kernel scope link src 10.86.0.1")
    assert routes[1].startswith("10.99.0.0/24 dev tn0 proto static scope link")
    assert "inet6" not in ip(name, "address", "show", "tn0")


def test_ipv4_device_is_silent(device) -> None:
    """No router solicitation, no multicast report: nothing is read that nobody sent."""
    _, tun = device
    NetworkSetup().apply("tn0", 1400, ["10.86.0.1/16"], [], 500)
    with pytest.raises(BlockingIOError):
        os.read(tun.fd, 2000)


def test_ipv6(device) -> None:
    name, _ = device
    NetworkSetup().apply("tn0", 1400, ["fd00:86::1/64"], ["fd00:99::/48"], 500)
    addresses = ip(name, "address", "show", "tn0")
    assert "inet6 fd00:86::1/64" in addresses
    assert "tentative" not in addresses
    assert "fe80" not in addresses
    routes = ip(name, "-6", "route")
    assert "fd00:86::/64 dev tn0" in routes
    assert "fd00:99::/48 dev tn0 proto static" in routes
    with open("/proc/sys/net/ipv6/conf/tn0/accept_ra") as file:
        assert file.read() == "0\n"


def test_ipv6_route_beside_an_ipv4_address(device) -> None:
    name, _ = device
    NetworkSetup().apply("tn0", 1400, ["10.86.0.1/16"], ["fd00:99::/48"], 500)
    assert "fd00:99::/48 dev tn0" in ip(name, "-6", "route")


@pytest.mark.parametrize(
    ("address", "prefixlen", "routes"), [("10.86.0.1", 16, ["10.99.0.0/24"]), ("fd00::1", 64, [])]
)
def test_undo_leaves_what_was_there(device, address: str, prefixlen: int, routes: list[str]) -> None:
    name, _ = device
    before = state(name)
    setup = NetworkSetup()
    setup.apply("tn0", 1300, [f"{address}/{prefixlen}"], routes, 77)
    assert state(name) != before
    setup.undo()
    assert state(name) == before
    setup.undo()


def test_undo_after_the_device_is_gone(device, caplog) -> None:
    _, tun = device
    setup = NetworkSetup()
    setup.apply("tn0", 1400, ["10.86.0.1/16"], ["10.99.0.0/24"], 500)
    tun.close()
    setup.undo()
    assert not caplog.records


@pytest.mark.parametrize(
    ("address", "routes", "mtu", "named"),
    [
        ("10.86.0.1", ["10.99.0.0/24", "10.44.0.0/24"], 1400, "route 10.44.0.0/24 into tn0"),
        ("fd00::1", [], 600, "fd00::1/16"),
        ("10.86.0.1", [], 70_000, "MTU of tn0 to 70000"),
    ],
    ids=["a route that exists", "IPv6 needs an MTU of 1280", "an MTU the kernel has not"],
)
def test_a_refused_step_undoes_the_others(
    device, address: str, routes: list[str], mtu: int, named: str
) -> None:
    name, _ = device
    ip(name, "tuntap", "add", "tnx", "mode", "tun")
    ip(name, "link", "set", "tnx", "up")
    ip(name, "route", "add", "10.44.0.0/24", "dev", "tnx")
    before = state(name)
    with pytest.raises(MachineError, match="the kernel refused to") as caught:
        NetworkSetup().apply("tn0", mtu, [f"{address}/16"], routes, 77)
    assert named in str(caught.value)
    assert state(name) == before


def test_no_such_interface(device) -> None:
    with pytest.raises(MachineError, match="no interface tn9"):
        NetworkSetup().apply("tn9", 1400, ["10.86.0.1/16"], [], 500)


def test_inside_a_running_loop(device) -> None:
    """The supervisor has an asyncio loop; pyroute2 must not stumble over it."""
    name, _ = device

    async def start() -> None:
        setup = NetworkSetup()
        setup.apply("tn0", 1400, ["10.86.0.1/16"], [], 500)
        assert "10.86.0.0/16" in ip(name, "route")
        setup.undo()

    asyncio.run(start())
    assert "10.86.0.0/16" not in ip(name, "route")


def test_nothing_stays_open(device) -> None:
    setup = NetworkSetup()
    setup.apply("tn0", 1400, ["10.86.0.1/16"], [], 500)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        setup.undo()
        setup.apply("tn0", 1400, ["10.86.0.1/16"], [], 500)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


#: What somebody does to the device of a running node, as `ip` and sh are told.
CHANGES = [
    "ip addr flush dev tn0",
    "ip -4 addr flush dev tn0",
    "ip -6 addr flush dev tn0",
    "ip addr del 10.86.0.1/16 dev tn0",
    "ip addr del 10.77.0.1/24 dev tn0",
    "ip addr del fd86::1/64 dev tn0",
    "ip link set tn0 down",
    "ip link set tn0 down; ip link set tn0 up",
    "ip link set tn0 mtu 1000",
    "ip link set tn0 mtu 1000; ip link set tn0 mtu 1400",
    "ip link set tn0 mtu 9000 txqueuelen 7",
    "ip link set tn0 gso_max_segs 9",
    "ip link set tn0 down; ip link set tn0 name other",
    "ip route flush dev tn0",
    "ip route del 10.99.0.0/24",
    "ip -6 route flush dev tn0",
    "ip route flush table local dev tn0",
    "ip -6 route del local fd86::1 dev tn0 table local",
    "ip route flush table main",
    "echo 1 > /proc/sys/net/ipv6/conf/tn0/disable_ipv6",
    "echo 1 > /proc/sys/net/ipv6/conf/tn0/disable_ipv6; echo 0 > /proc/sys/net/ipv6/conf/tn0/disable_ipv6",
    "echo 1 > /proc/sys/net/ipv6/conf/tn0/accept_ra",
]


def wanted_there(name: str) -> list[object]:
    local = ip(name, "route", "show", "table", "local", "dev", "tn0", "type", "local")
    local6 = ip(name, "-6", "route", "show", "table", "local", "dev", "tn0", "type", "local")
    with open("/proc/sys/net/ipv6/conf/tn0/accept_ra") as file:
        return [
            *state(name),
            "gso_max_segs 64" in ip(name, "-d", "link", "show", "tn0"),
            local,
            local6,
            file.read(),
        ]


@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_changed_is_mended(device, change: str) -> None:
    name, _ = device
    setup = NetworkSetup()
    networks = ["10.86.0.0/16", "10.99.0.0/24", "fd00:99::/48"]
    setup.apply("tn0", 1400, ["10.86.0.1/16", "10.86.0.9/16", "10.77.0.1/24", "fd86::1/64"], networks, 321)
    before = wanted_there(name)
    subprocess.run(["ip", "netns", "exec", name, "sh", "-c", change], check=True)
    assert setup.mend() == []
    assert wanted_there(name) == before
    assert setup.mend() == []
    setup.undo()
    assert ip(name, "route") + ip(name, "-6", "route") == ""


def test_what_cannot_be_mended_is_told(device, namespaces) -> None:
    name, _ = device
    setup = NetworkSetup()
    setup.apply("tn0", 1400, ["10.86.0.1/16"], ["10.99.0.0/24"], 321)
    ip(name, "tuntap", "add", "tnx", "mode", "tun")
    ip(name, "link", "set", "tnx", "up")
    ip(name, "route", "replace", "10.99.0.0/24", "dev", "tnx")
    (problem,) = setup.mend()
    assert "route 10.99.0.0/24 into tn0" in problem
    ip(name, "link", "set", "tn0", "netns", namespaces[1])
    assert "start it again" in setup.mend()[0]
