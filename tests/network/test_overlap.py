"""Which existing routes forbid a VPN network: the verdict as a table, and the same asked of a real kernel."""

from __future__ import annotations

import subprocess
from ipaddress import ip_network

import pytest

from supervisor.network import overlap
from supervisor.network.overlap import Taken, find_overlap
from vpnd.errors import ConfigError

CASES = [
    # (sentence, networks of the VPN, (network, device) in use, place that overlaps or None)
    ("nothing in use", ["10.86.0.0/16"], [], None),
    ("the default route does not count", ["10.86.0.0/16"], [("0.0.0.0/0", "eth0")], None),
    ("nor does that of IPv6", ["fd00:86::/64"], [("::/0", "eth0")], None),
    ("a neighbour is no overlap", ["10.86.0.0/16"], [("10.87.0.0/16", "eth0")], None),
    ("the same network", ["10.86.0.0/16"], [("10.86.0.0/16", "eth0")], 0),
    ("a part of it", ["10.86.0.0/16"], [("10.86.9.0/24", "docker0")], 0),
    ("one address of it", ["10.86.0.0/16"], [("10.86.9.1/32", "eth0")], 0),
    ("a broader route", ["10.86.0.0/16"], [("10.0.0.0/8", "eth0")], 0),
    ("half of everything, as other VPNs set it", ["10.86.0.0/16"], [("0.0.0.0/1", "tun0")], 0),
    ("the other half", ["10.86.0.0/16"], [("128.0.0.0/1", "tun0")], None),
    ("a blackhole has no device", ["10.86.0.0/16"], [("10.0.0.0/8", "")], 0),
    ("our own interface does not count", ["10.86.0.0/16"], [("10.86.0.0/16", "vpnd0")], None),
    ("another vpnd's does", ["10.86.0.0/16"], [("10.86.0.0/16", "vpnd1")], 0),
    ("loopback does not count", ["127.0.0.0/8"], [("127.0.0.0/8", "lo")], None),
    ("a further route of ours overlaps", ["10.86.0.0/16", "10.9.0.0/24"], [("10.9.0.0/16", "eth0")], 1),
    ("IPv6 overlaps IPv6", ["fd00:86::/64"], [("fd00::/8", "eth0")], 0),
    ("IPv4 never overlaps IPv6", ["10.86.0.0/16"], [("::/1", "eth0")], None),
    (
        "link-local of interfaces is far away",
        ["fd00:86::/64"],
        [("fe80::/64", "eth0"), ("ff00::/8", "eth0")],
        None,
    ),
]


@pytest.mark.parametrize(
    ("networks", "taken", "place"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_verdict(networks: list[str], taken: list[tuple[str, str]], place: int | None) -> None:
    entries = [Taken(ip_network(network), device, f"the route {network}") for network, device in taken]
    verdict = find_overlap([ip_network(network) for network in networks], entries, "vpnd0")
    assert (None if verdict is None else verdict[0]) == place


def test_the_narrowest_of_several_is_named() -> None:
    entries = [
        Taken(ip_network(text), "eth0", text) for text in ("10.0.0.0/8", "10.86.3.0/24", "10.86.0.0/16")
    ]
    verdict = find_overlap([ip_network("10.86.0.0/16")], entries, "vpnd0")
    assert verdict is not None
    assert verdict[1].what == "10.86.3.0/24"


KERNEL_CASES = [
    # (sentence, `ip` command, networks, words of the message; none: no overlap)
    ("an address and its network", "address add 10.86.7.1/24 dev tnx", ["10.86.0.0/16"], ["10.86.7.", "tnx"]),
    (
        "an address alone",
        "address add 10.86.7.1/32 dev tnx",
        ["10.86.0.0/16"],
        ["the address 10.86.7.1 of tnx"],
    ),
    ("a route", "route add 10.80.0.0/12 dev tnx", ["10.86.0.0/16"], ["the route 10.80.0.0/12 on tnx"]),
    ("a blackhole", "route add blackhole 10.0.0.0/8", ["10.86.0.0/16"], ["the blackhole route 10.0.0.0/8"]),
    (
        "an unreachable IPv6 net",
        "-6 route add unreachable fd00::/8",
        ["fd00:1::/64"],
        ["the unreachable route fd00::/8"],
    ),
    ("a default route", "route add default dev tnx", ["10.86.0.0/16"], []),
    ("an IPv6 address", "address add fd00:86::5/64 dev tnx nodad", ["fd00:86::/64"], ["fd00:86::", "tnx"]),
    (
        "several ways",
        "route add 10.86.0.0/17 nexthop dev tnx nexthop dev tny",
        ["10.86.0.0/16"],
        ["10.86.0.0/17", "tn"],
    ),
    ("another table", "route add 10.86.0.0/17 dev tnx table 77", ["10.86.0.0/16"], []),
    ("our own interface", "route add 10.86.0.0/17 dev vpnd0", ["10.86.0.0/16"], []),
]


@pytest.mark.root
@pytest.mark.parametrize(
    ("command", "networks", "words"),
    [case[1:] for case in KERNEL_CASES],
    ids=[case[0] for case in KERNEL_CASES],
)
def test_real_routes(namespaces, entered, command: str, networks: list[str], words: list[str]) -> None:
    name = namespaces[0]
    for device in ("tnx", "tny", "vpnd0"):
        subprocess.run(["ip", "-n", name, "tuntap", "add", device, "mode", "tun"], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True)
    subprocess.run(["ip", "-n", name, *command.split()], check=True)
    with entered(name):
        if not words:
            overlap.check(overlap.configured([ip_network(network) for network in networks]), "vpnd0")
            return
        with pytest.raises(ConfigError) as caught:
            overlap.check(overlap.configured([ip_network(network) for network in networks]), "vpnd0")
    for word in [*words, networks[0], "network.virtual_ip", "network.allow_overlap = true"]:
        assert word in str(caught.value)
