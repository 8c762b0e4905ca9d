"""What control says this node is, and what is to be routed into the tunnel, held against the configuration.

Control talks to strangers. Taken over by one, it could have root put any address on the device and route any traffic
into the tunnel; here that ends at what the configuration, and what was established at the start, allow.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import msgspec

from vpnd.api.messages import RoutesKnown
from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Config
from vpnd.endpoint import SHORTEST_SUBNET, IPNetwork
from vpnd.errors import ConfigError, ProtocolViolation

#: Of one node, and of all members; honest ones have a few, and some hundred.
MOST_ADDRESSES, MOST_ROUTES = 64, 8192
#: By IP version: a broader network is nobody's but an exit node's.
BROADEST = {4: 8, 6: 16}
UNIQUE_LOCAL = ipaddress.IPv6Network("fc00::/7")
SHARED = ipaddress.IPv4Network("100.64.0.0/10")  # RFC 6598


def own_untrusted(given: OwnAddresses, config: Config, before: OwnAddresses | None) -> OwnAddresses:
    """What of it may be. `before`: what was established at the start, None while that is being done.

    Raises ProtocolViolation for what no honest control says, ConfigError for a network this machine does not want.
    """
    if len(given.addresses) + len(given.subnets) > MOST_ADDRESSES:
        raise ProtocolViolation(f"more than {MOST_ADDRESSES} addresses and subnets")
    subnets = _networks(given.subnets)
    try:
        addresses = [ipaddress.ip_address(text) for text in given.addresses]
    except ValueError as error:
        raise ProtocolViolation(f"an address of this node is malformed: {error}") from None
    for address in addresses:
        if not any(address in subnet for subnet in subnets):
            raise ProtocolViolation(f"{address} is not of the network of this node")
    if before is None:
        _check_subnets(given.network, subnets, config)
    elif (given.network, given.subnets) != (before.network, before.subnets):
        raise ProtocolViolation("another network than at the start")
    allowed = {ipaddress.ip_network(text) for text in config.network.advertise}
    advertised = _networks(given.advertised[:MOST_ADDRESSES])
    return msgspec.structs.replace(
        given, advertised=tuple(str(network) for network in advertised if network in allowed)
    )


def _check_subnets(name: str, subnets: Iterable[IPNetwork], config: Config) -> None:
    """Addresses of others are not taken over by joining a network, unless the configuration says so."""
    meant = ipaddress.IPv4Network(config.membership.subnet)
    for subnet in subnets:
        if isinstance(subnet, ipaddress.IPv6Network):
            fits = subnet.subnet_of(UNIQUE_LOCAL)
        else:
            usable = not (subnet.is_loopback or subnet.is_link_local or subnet.is_multicast)
            inner = subnet.is_private or subnet.subnet_of(SHARED)
            fits = subnet.prefixlen >= SHORTEST_SUBNET and usable and (inner or subnet.subnet_of(meant))
        if not fits:
            raise ConfigError(
                f"network {name}: {subnet} is not a private range, so its owners could not be reached any more; "
                f'if that is meant, set membership.subnet = "{subnet}"'
            )


def routes_untrusted(known: RoutesKnown, config: Config) -> tuple[RoutesKnown, list[str]]:
    """What of it may be routed, and a line about what may not. Raises ProtocolViolation for what no honest control
    says."""
    if len(known.routes) > MOST_ROUTES:
        raise ProtocolViolation(f"more than {MOST_ROUTES} routes")
    network = config.network
    routed: list[str] = []
    refused: list[str] = []
    for each in _networks(known.routes):
        if each.prefixlen == 0:
            fits = bool(network.exit_node)
        else:
            broad = each.prefixlen < BROADEST[each.version] and not network.exit_node
            usable = not (each.is_loopback or each.is_link_local or each.is_multicast)
            fits = network.accept_routes and usable and not broad
        (routed if fits else refused).append(str(each))
    exit_peer = known.exit_peer if network.exit_node else ""
    lines = (
        [f"not routed, for the configuration does not want it: {', '.join(refused[:4])}"] if refused else []
    )
    return RoutesKnown(routes=tuple(routed), exit_peer=exit_peer), lines


def _networks(texts: Iterable[str]) -> list[IPNetwork]:
    try:
        return [ipaddress.ip_network(text) for text in texts]
    except ValueError as error:
        raise ProtocolViolation(f"a network is malformed: {error}") from None
