"""A routing table of the tunnel's own, for what members announce, and the rules that lead there.

    priority       rule                                          so that
    -------------  --------------------------------------------  -----------------------------------------------------
    rule_priority  from all lookup main suppress_prefixlength 0  every route of the machine but its default route wins
                                                                 over what is announced: nobody takes a LAN away
    one more       not from all uidrange U-U lookup route_table  all look here before the default route, but for the
                                                                 tunnel's own sockets (process.user, U): sessions
                                                                 must not go through the sessions they carry

Rules and unreachable routes outlive the device after a kill -9. `clear` takes them away at the next start, the janitor
at once (`cleanup_commands`). All blocks for some milliseconds, in the network namespace of the calling thread.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple

from supervisor.network.netlink import IPRoute, NetlinkError, converse
from supervisor.network.routes import RTPROT_STATIC

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

#: rtnetlink's RT_TABLE_MAIN, RTN_UNREACHABLE and FIB_RULE_INVERT
TABLE_MAIN = 254
UNREACHABLE = "unreachable"
FIB_RULE_INVERT = 2
#: What is gone, or there, already is what was wanted.
_GONE = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EAFNOSUPPORT})
_THERE = frozenset({errno.EEXIST})
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


class Place(NamedTuple):
    """Where the routes are and who does not use them. `user`: the uid whose sockets keep to the main table."""

    interface: str
    table: int
    priority: int
    user: int


class PolicyTable:
    """The table and rules of one node. Owner: one thread at a time."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._routes: dict[IPNetwork, bool] = {}  # network -> whether it is reachable
        self._families: set[int] = set()  # that have rules

    def clear(self) -> None:
        """Take away what a node that was killed has left. Raises OSError when netlink cannot be used."""
        converse(self._clear)

    def set(self, networks: Iterable[IPNetwork], unreachable: Iterable[IPNetwork] = ()) -> list[str]:
        """Route these into the tunnel and those nowhere, instead of what there was. Without any there are no rules.

        Returns what the kernel refused, a line each; the rest is done.
        """
        wanted = dict.fromkeys(networks, True) | dict.fromkeys(unreachable, False)
        if wanted == self._routes:
            return []
        problems: list[str] = []
        try:
            converse(lambda netlink: self._set(netlink, wanted, problems))
        except OSError as error:
            problems.append(f"announced networks are not routed: {error.strerror}")
        return problems

    def _set(self, netlink: IPRoute, wanted: dict[IPNetwork, bool], problems: list[str]) -> None:
        found = netlink.link_lookup(ifname=self._place.interface)
        if not found:  # it has gone, and its routes with it; rules may still be there
            wanted = {}
        families = {network.version for network in wanted}
        for network in [held for held, reachable in self._routes.items() if wanted.get(held) != reachable]:
            route = self._route(network, self._routes.pop(network), found)
            _attempt(problems, f"route {network} not undone", _GONE, netlink.route, "delete", **route)
        for version in self._families - families:
            self._families.discard(version)
            for rule in reversed(self._rules(version)):
                _attempt(problems, "rule not undone", _GONE, netlink.rule, "delete", **rule)
        # routes first: with the rules comes what they are for
        for network in [each for each in wanted if each not in self._routes]:
            route = self._route(network, wanted[network], found)
            if _attempt(problems, f"route {network}", _THERE, netlink.route, "add", **route):
                self._routes[network] = wanted[network]
        for version in families - self._families:
            self._families.add(version)
            for rule in self._rules(version):
                _attempt(problems, "rule for announced networks", _THERE, netlink.rule, "add", **rule)

    def _clear(self, netlink: IPRoute) -> None:
        self._routes.clear()
        self._families.clear()
        for version, family in _FAMILIES.items():
            for rule in self._rules(version, any_user=True):
                # one may be there for every time a node was killed
                while _attempt([], "", frozenset(), netlink.rule, "delete", **rule):
                    continue
            for left in list(netlink.get_routes(family=family, table=self._place.table)):
                target = left.get_attr("RTA_DST") or ("0.0.0.0" if version == 4 else "::")
                network = ipaddress.ip_network(f"{target}/{left['dst_len']}")
                route = self._route(network, False, [])
                _attempt([], "", _GONE, netlink.route, "delete", **route)

    def _rules(self, version: int, any_user: bool = False) -> list[dict[str, Any]]:
        place, family = self._place, _FAMILIES[version]
        users = {} if any_user else {"flags": FIB_RULE_INVERT, "FRA_UID_RANGE": f"{place.user}:{place.user}"}
        return [
            {"family": family, "priority": place.priority, "table": TABLE_MAIN, "FRA_SUPPRESS_PREFIXLEN": 0},
            {"family": family, "priority": place.priority + 1, "table": place.table, **users},
        ]

    def _route(self, network: IPNetwork, reachable: bool, interface: list[int]) -> dict[str, Any]:
        route: dict[str, Any] = {
            "dst": str(network),
            "family": _FAMILIES[network.version],
            "table": self._place.table,
            "proto": RTPROT_STATIC,
        }
        if not reachable:
            return {**route, "type": UNREACHABLE}
        if interface:
            route["oif"] = interface[0]
        return {**route, "scope": "link"} if network.version == 4 else route


def cleanup_commands(table: int, priority: int) -> list[str]:
    """What a shell does to take away rules and routes of a node that was killed; fails silently where nothing is."""
    own = f"priority {priority} table main suppress_prefixlength 0"
    return [
        command
        for family in ("-4", "-6")
        for command in (
            f"ip {family} rule del {own}",
            f"ip {family} rule del priority {priority + 1} table {table}",
            f"ip {family} route flush table {table}",
        )
    ]


def _attempt(
    problems: list[str], what: str, fine: frozenset[int], call: Any, *words: str, **parameters: Any
) -> bool:
    """Ask the kernel. False, and a line in `problems`, when it refuses for another reason than those in `fine`."""
    try:
        call(*words, **parameters)
    except (NetlinkError, OSError) as error:
        number = int(error.code if isinstance(error, NetlinkError) else error.errno or 0)
        if number not in fine:
            problems.append(f"{what}: {os.strerror(number)}")
            return False
    return True
