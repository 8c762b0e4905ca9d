"""Does the VPN take an address range that this machine already sends elsewhere?

Counted as taken: every route of the main table with a prefix length of 1 or more, and every address of an
interface, except those of loopback and of our own interface. So

- the default route is not counted, but 0.0.0.0/1 and 128.0.0.0/1 are: whoever set them wants everything, the
  private ranges too, to go through that tunnel, and only the operator can say which VPN may have the range;
- a broader route through a gateway counts (10.0.0.0/8 in a data centre: our part of it may be in use there);
- blackhole, unreachable and prohibit routes count: they state that the range must not leave this machine;
- link-local and multicast routes are as good as any, they only never meet a sane VPN;
- the interface of another vpnd counts: two nodes in one network namespace need two ranges.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from supervisor.network.netlink import TABLE_MAIN, IPRoute, converse
from vpnd.endpoint import IPNetwork
from vpnd.errors import ConfigError

LOOPBACK = "lo"
#: rtnetlink's RTM_F_CLONED: a cached copy of a route, not one somebody set
RTM_F_CLONED = 0x200
#: rtnetlink's RTN_*: how `ip route` calls the routes that lead nowhere
KINDS = {6: "blackhole", 7: "unreachable", 8: "prohibit"}


class Taken(NamedTuple):
    """A range in use. `device`: interface it leads to, empty for none; `what`: as the operator knows it."""

    network: IPNetwork
    device: str
    what: str


class Claim(NamedTuple):
    """A network the VPN takes. `owner`: what asks for it; `remedy`: what to do when it is in use."""

    network: IPNetwork
    owner: str
    remedy: str


def configured(networks: Sequence[IPNetwork]) -> list[Claim]:
    """Networks of the configuration: the subnet of network.virtual_ip, then network.routes."""
    first = ("network.virtual_ip and network.subnet", "choose another network.virtual_ip")
    return [
        Claim(network, *(first if place == 0 else ("network.routes", "choose another route")))
        for place, network in enumerate(networks)
    ]


def check(claims: Sequence[Claim], own_interface: str) -> None:
    """Raise ConfigError if the machine already routes a part of what is claimed.

    Looks at the network namespace of the calling thread; blocks for some milliseconds. Nothing is changed.
    """
    verdict = find_overlap([claim.network for claim in claims], in_use(), own_interface)
    if verdict is None:
        return
    place, taken = verdict
    network, owner, remedy = claims[place]
    raise ConfigError(
        f"{owner}: {network} overlaps {taken.what}: {remedy}, "
        "or set network.allow_overlap = true to take the range anyway"
    )


def in_use() -> list[Taken]:
    """What the machine routes now; for `find_overlap`. Blocks for some milliseconds."""
    return converse(_taken)


def find_overlap(
    networks: Sequence[IPNetwork], taken: Iterable[Taken], own_interface: str
) -> tuple[int, Taken] | None:
    """The place in `networks` of the first that overlaps, and the narrowest of what it meets; or None."""
    counted = [entry for entry in taken if _counts(entry, own_interface)]
    for place, network in enumerate(networks):
        met = [entry for entry in counted if _overlap(entry.network, network)]
        if met:
            return place, max(met, key=lambda entry: entry.network.prefixlen)
    return None


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    if isinstance(one, ipaddress.IPv4Network):
        return isinstance(other, ipaddress.IPv4Network) and one.overlaps(other)
    return isinstance(other, ipaddress.IPv6Network) and one.overlaps(other)


def _counts(entry: Taken, own_interface: str) -> bool:
    return entry.network.prefixlen > 0 and entry.device not in (LOOPBACK, own_interface)


def _taken(netlink: IPRoute) -> list[Taken]:
    names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in netlink.get_links()}
    taken: list[Taken] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for route in netlink.get_routes(family=family):
            taken.extend(_of_route(route, names))
    for address in netlink.get_addr():
        entry = _of_address(address, names)
        if entry is not None:
            taken.append(entry)
    return taken


def _of_route(route: Any, names: dict[int, str]) -> list[Taken]:
    table = route.get_attr("RTA_TABLE") or route["table"]
    target = route.get_attr("RTA_DST")
    if table != TABLE_MAIN or target is None or route["flags"] & RTM_F_CLONED:
        return []  # the default route has no RTA_DST
    network = ipaddress.ip_network(f"{target}/{route['dst_len']}", strict=False)
    kind = KINDS.get(route["type"])
    if kind is not None:
        # IPv6 hangs these on the loopback interface; they are nobody's.
        return [Taken(network, "", f"the {kind} route {network}")]
    hops = [route.get_attr("RTA_OIF")]
    if hops == [None]:
        hops = [hop["oif"] for hop in route.get_attr("RTA_MULTIPATH") or ()]
    devices = [names.get(hop, f"interface {hop}") for hop in hops] or [""]
    return [
        Taken(network, device, f"the route {network}" + (f" on {device}" if device else ""))
        for device in devices
    ]


def _of_address(address: Any, names: dict[int, str]) -> Taken | None:
    # On a point-to-point link IFA_LOCAL is ours and IFA_ADDRESS the other side's, which has its route.
    local = address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")
    if local is None:
        return None
    host = ipaddress.ip_network(local)
    device = names.get(address["index"], f"interface {address['index']}")
    return Taken(host, device, f"the address {host.network_address} of {device}")
