"""What a node is in the VPN, on a real device: a static node, a member, one that changes, one without IPv6."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from lab import Lab, inside

from supervisor.network.machine import Machine
from supervisor.network.tun import Tun
from supervisor.overlay import Overlay
from vpnd.api.reports import OwnAddresses
from vpnd.config.live import Live
from vpnd.config.schema import Config, Membership, Network, Peer
from vpnd.errors import ConfigError
from vpnd.mode import Mode

pytestmark = pytest.mark.root

OWN = OwnAddresses(
    network="home",
    label="a",
    addresses=("10.86.3.4", "fd12:3456:789a::1"),
    subnets=("10.86.0.0/16", "fd12:3456:789a::/64"),
)
STATIC = Config(network=Network(virtual_ip="10.86.0.1", routes=("10.99.0.0/24",)))
PEER = Peer(name="b", peer_id="B", virtual_ip="10.70.0.2")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(2) as opened:
        yield opened


@pytest.fixture
def device(lab: Lab) -> Iterator[Tun]:
    with inside(lab.nodes[0]), Tun.open("vpnd0", 1400, True) as tun:
        yield tun


def addresses(lab: Lab) -> list[str]:
    found: list[dict[str, Any]] = json.loads(lab.ip(lab.nodes[0], "-j", "address", "show", "vpnd0"))
    return [f"{each['local']}/{each['prefixlen']}" for each in found[0]["addr_info"]]


def routes(lab: Lab) -> str:
    shown: str = lab.ip(lab.nodes[0], "route") + lab.ip(lab.nodes[0], "-6", "route")
    return shown


def made(config: Config, mode: Mode, *, joining: bool = False) -> Overlay:
    live = Live(config)
    return Overlay(live, mode, Machine(live, in_network=mode.in_network), joining=joining)


def established(config: Config, mode: Mode, own: OwnAddresses | None) -> Overlay:
    overlay = made(config, mode)
    overlay.check_before()
    overlay.establish("vpnd0", own)
    return overlay


@pytest.mark.setting("network.virtual_ip", "network.routes")
def test_a_static_node_is_what_its_configuration_says(lab: Lab, device: Tun) -> None:
    overlay = established(STATIC, Mode.STATIC, None)
    assert addresses(lab) == ["10.86.0.1/16"]
    assert "10.99.0.0/24 dev vpnd0" in routes(lab)
    assert overlay.prefixes == ("10.86.0.1/32",)
    assert (overlay.virtual_ip, overlay.subnet, overlay.warnings) == ("10.86.0.1", "10.86.0.0/16", [])
    overlay.undo()
    assert addresses(lab) == [] and "vpnd0" not in routes(lab)


def test_a_member_has_all_addresses_in_their_networks(lab: Lab, device: Tun) -> None:
    behind = Config(network=Network(advertise=("10.9.0.0/24",)))
    own = msgspec.structs.replace(OWN, advertised=("10.9.0.0/24", "10.8.0.0/24"))
    overlay = established(behind, Mode.MEMBER, own)
    assert addresses(lab) == ["10.86.3.4/16", "fd12:3456:789a::1/64"]
    assert "fd12:3456:789a::/64 dev vpnd0" in routes(lab)
    assert overlay.prefixes == ("10.86.3.4/32", "fd12:3456:789a::1/128", "10.9.0.0/24")
    assert overlay.virtual_ip == "10.86.3.4"


@pytest.mark.setting("network.subnet")
def test_configured_peers_reach_a_member_at_its_configured_address(lab: Lab, device: Tun) -> None:
    config = Config(network=Network(virtual_ip="10.70.0.1", subnet=24), peers=(PEER,))
    overlay = established(config, Mode.MEMBER, OWN)
    assert addresses(lab) == ["10.86.3.4/16", "10.70.0.1/24", "fd12:3456:789a::1/64"]
    assert overlay.virtual_ip == "10.86.3.4" and "10.70.0.1/32" in overlay.prefixes


def test_without_configured_peers_that_address_is_left_out_and_told(lab: Lab, device: Tun) -> None:
    overlay = established(Config(network=Network(virtual_ip="10.70.0.1")), Mode.MEMBER, OWN)
    assert addresses(lab) == ["10.86.3.4/16", "fd12:3456:789a::1/64"]
    assert "virtual_ip is not used" in overlay.warnings[0]


def test_a_member_gets_other_addresses_while_it_runs(lab: Lab, device: Tun) -> None:
    overlay = established(Config(), Mode.MEMBER, OWN)
    after = msgspec.structs.replace(OWN, addresses=("10.86.3.5", "10.86.3.6", "fd12:3456:789a::1"))
    overlay.change(after)
    assert addresses(lab) == ["10.86.3.5/16", "10.86.3.6/16", "fd12:3456:789a::1/64"]
    assert "10.86.0.0/16 dev vpnd0 proto kernel scope link src 10.86.3.5" in routes(lab)
    assert overlay.prefixes == ("10.86.3.5/32", "10.86.3.6/32", "fd12:3456:789a::1/128")
    overlay.change(OWN)
    assert addresses(lab) == ["10.86.3.4/16", "fd12:3456:789a::1/64"]
    overlay.undo()
    assert addresses(lab) == [] and "vpnd0" not in routes(lab)


@pytest.mark.setting("network.queue_length")
def test_the_devices_queue_is_as_long_as_set(lab: Lab, device: Tun) -> None:
    established(Config(network=Network(virtual_ip="10.86.0.1", queue_length=77)), Mode.STATIC, None)
    assert "qlen 77" in lab.ip(lab.nodes[0], "link", "show", "vpnd0")


@pytest.mark.setting("network.mtu")
def test_a_small_mtu_leaves_ipv6_out_of_a_network_for_good(lab: Lab, device: Tun) -> None:
    overlay = established(Config(network=Network(mtu=1200)), Mode.MEMBER, OWN)
    assert addresses(lab) == ["10.86.3.4/16"]
    assert overlay.prefixes == ("10.86.3.4/32",)
    assert overlay.warnings == ["no IPv6 in the VPN: it needs a network.mtu of 1280"]
    overlay.change(msgspec.structs.replace(OWN, addresses=("10.86.3.5", "fd12:3456:789a::2")))
    assert addresses(lab) == ["10.86.3.5/16"]


ROUTE = Config(network=Network(virtual_ip="10.86.0.1", routes=("192.168.77.0/24",)))
OVERLAPS = [
    # (sentence, configuration, mode, words of the message)
    ("a network to make", Config(membership=Membership(subnet="192.168.0.0/16")), Mode.NEW, "membership.subnet"),
    ("a configured address", Config(network=Network(virtual_ip="192.168.77.9")), Mode.STATIC, "network.virtual_ip"),
    ("a configured route", ROUTE, Mode.STATIC, "network.routes"),
]  # fmt: skip


@pytest.mark.setting("network.allow_overlap")
@pytest.mark.parametrize(("what", "config", "mode", "words"), OVERLAPS, ids=[row[0] for row in OVERLAPS])
def test_an_overlap_is_refused_before_anything_is_made(what, config, mode, words, lab: Lab) -> None:
    with inside(lab.nodes[0]):
        with pytest.raises(ConfigError, match=words):
            made(config, mode).check_before()
        allowed = msgspec.structs.replace(
            config, network=msgspec.structs.replace(config.network, allow_overlap=True)
        )
        made(allowed, mode).check_before()


def test_an_overlap_of_a_network_that_was_joined_says_that_it_was(lab: Lab, device: Tun) -> None:
    own = msgspec.structs.replace(OWN, addresses=("192.168.77.9",), subnets=("192.168.77.0/24",))
    overlay = made(Config(), Mode.NEW, joining=True)
    overlay.check_before()
    with pytest.raises(ConfigError, match=r"network home: 192.168.77.0/24 overlaps .*without --join"):
        overlay.establish("vpnd0", own)
    assert addresses(lab) == []
