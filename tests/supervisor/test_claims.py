"""What control may say this node is and what may be routed: tables of what passes, is left out, or ends control."""

from __future__ import annotations

from typing import Any

import pytest

from supervisor import claims
from vpnd.api.messages import RoutesKnown
from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Config, Membership, Network
from vpnd.errors import ConfigError, ProtocolViolation


def own(addresses: tuple[str, ...], subnets: tuple[str, ...], **more: Any) -> OwnAddresses:
    return OwnAddresses(network="home", label="a", addresses=addresses, subnets=subnets, **more)


OURS = own(("10.86.3.4", "fd12:3456:789a::1"), ("10.86.0.0/16", "fd12:3456:789a::/64"))

VIOLATIONS = [
    ("no address", own(("junk",), OURS.subnets), None),
    ("no network", own((), ("junk",)), None),
    ("an address outside", own(("9.9.9.9",), OURS.subnets), OURS),
    ("another subnet than at the start", own(("10.87.0.1",), ("10.87.0.0/16",)), OURS),
    ("one more subnet", own(OURS.addresses, (*OURS.subnets, "10.87.0.0/16")), OURS),
    ("more than any node has", own(("10.86.3.4",) * 1000, OURS.subnets), OURS),
]


@pytest.mark.parametrize(("sentence", "given", "before"), VIOLATIONS, ids=[row[0] for row in VIOLATIONS])
def test_what_no_honest_control_says(sentence: str, given: OwnAddresses, before: OwnAddresses | None) -> None:
    with pytest.raises(ProtocolViolation):
        claims.own_untrusted(given, Config(), before)


@pytest.mark.parametrize(
    "subnet", ["8.8.8.0/24", "127.0.0.0/16", "224.0.0.0/16", "2001:db8::/64", "0.0.0.0/0"]
)
def test_a_network_does_not_take_over_the_addresses_of_others(subnet: str) -> None:
    with pytest.raises(ConfigError, match="not a private range"):
        claims.own_untrusted(own((), (subnet,)), Config(), None)


def test_a_network_may_have_what_the_configuration_names() -> None:
    given = own(("25.0.0.1",), ("25.0.0.0/16",))
    assert claims.own_untrusted(given, Config(membership=Membership(subnet="25.0.0.0/8")), None) == given
    assert claims.own_untrusted(OURS, Config(), None) == claims.own_untrusted(OURS, Config(), OURS) == OURS


def test_only_what_the_configuration_announces_is_announced() -> None:
    given = own(OURS.addresses, OURS.subnets, advertised=("10.9.0.0/24", "10.8.0.0/24"))
    config = Config(network=Network(advertise=("10.9.0.0/24",)))
    assert claims.own_untrusted(given, config, OURS).advertised == ("10.9.0.0/24",)


EVERYTHING = (
    "10.9.0.0/24",
    "0.0.0.0/0",
    "::/0",
    "0.0.0.0/1",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/8",
    "::/1",
)
ROUTES = [
    ("members' networks alone", {}, ("10.9.0.0/24",), ""),
    ("none of them", {"accept_routes": False}, (), ""),
    ("the way out too", {"exit_node": "b"}, ("10.9.0.0/24", "0.0.0.0/0", "::/0", "0.0.0.0/1", "::/1"), "B"),
    ("the way out alone", {"exit_node": "b", "accept_routes": False}, ("0.0.0.0/0", "::/0"), "B"),
]


@pytest.mark.parametrize(
    ("sentence", "settings", "routes", "exit_peer"), ROUTES, ids=[row[0] for row in ROUTES]
)
def test_what_is_routed_is_what_the_configuration_wants(
    sentence: str, settings: dict[str, Any], routes: tuple[str, ...], exit_peer: str
) -> None:
    known = RoutesKnown(routes=EVERYTHING, exit_peer="B")
    routed, lines = claims.routes_untrusted(known, Config(network=Network(**settings)))
    assert routed == RoutesKnown(routes=routes, exit_peer=exit_peer)
    assert bool(lines) == (len(routes) < len(EVERYTHING))


@pytest.mark.parametrize("routes", [("10.9.0.0/24", "junk"), ("10.9.0.1/24",), ("10.9.0.0/24",) * 20_000])
def test_malformed_routes_end_control(routes: tuple[str, ...]) -> None:
    with pytest.raises(ProtocolViolation):
        claims.routes_untrusted(RoutesKnown(routes=routes), Config())
