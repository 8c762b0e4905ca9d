"""A routing table of the tunnel's own, for what members announce, and the rules that lead there.

    priority       rule                                          so that
    -------------  --------------------------------------------  -----------------------------------------------------
    rule_priority  from all lookup main suppress_prefixlength 0  every route of the machine but its default route wins
                                                                 over what is announced: nobody takes a LAN away
    one more       not from all uidrange U-U lookup route_table  all look here before the default route, but for the
                                                                 tunnel's own sockets (process.user, U): sessions
                                                                 must not go through the sessions they carry

Rules and unreachable routes outlive the device after a kill -9; `killswitch` says when they are to.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from supervisor.network.netlink import TABLE_LOCAL, TABLE_MAIN, IPRoute, NetlinkError, converse, number_of
from supervisor.network.routes import RTPROT_STATIC, network_of
from vpnd.endpoint import IPNetwork

EVERYTHING: dict[int, IPNetwork] = {
    4: ipaddress.ip_network("0.0.0.0/0"),
    6: ipaddress.ip_network("::/0"),
}
#: rtnetlink's RTN_UNICAST, RTN_UNREACHABLE, FIB_RULE_INVERT, and what FRA_SUPPRESS_PREFIXLEN says for none
RTN_UNICAST, RTN_UNREACHABLE = 1, 7
UNREACHABLE = "unreachable"
FOREIGN = -1
FIB_RULE_INVERT = 2
NO_SUPPRESSION = 0xFFFFFFFF
#: linux/fib_rules.h: look into a table; and what makes a rule one of some packets only
FR_ACT_TO_TBL = 1
_CONDITIONS = ("FRA_FWMARK", "FRA_IIFNAME", "FRA_OIFNAME", "FRA_UID_RANGE", "FRA_IP_PROTO", "FRA_L3MDEV")
#: The metric of IPv6 routes that are given none, and one that every other route comes before.
IP6_RT_PRIO_USER = 1024
LAST = 0xFFFFFFFE
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


class _Route(NamedTuple):
    """One route of the table. `metric` 0: the kernel's default; `link` 0: it leads nowhere; FOREIGN: it is of a kind
    this node does not make."""

    network: IPNetwork
    metric: int
    link: int


class _Rule(NamedTuple):
    """One routing rule. `users`: "U-U" whose sockets it is not for, "" for everybody's."""

    priority: int
    table: int
    suppress: int | None
    users: str


class PolicyTable:
    """The table and rules of one node. Owner: one thread at a time. Blocks for some milliseconds."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def set(
        self, networks: Iterable[IPNetwork], unreachable: Iterable[IPNetwork] = (), *, hold: bool = False
    ) -> list[str]:
        """Route these into the tunnel and those nowhere, and nothing else: what the kernel has is compared and mended.

        `hold`: whatever is not routed goes nowhere, the device there or not. Without routes there are no rules. What
        is new comes before what is old goes, so nothing gets by in between.
        Returns what the kernel refused, a line each; the rest is done.
        """
        problems: list[str] = []

        def work(netlink: IPRoute) -> None:
            found = netlink.link_lookup(ifname=self._place.interface)
            wanted: dict[tuple[IPNetwork, int], int] = {}
            if hold:
                wanted |= {(EVERYTHING[version], LAST): 0 for version in _families()}
            if found:  # else the device has gone
                for network in unreachable:
                    wanted[network, _metric(network)] = 0
                for network in networks:
                    wanted[network, _metric(network)] = found[0]
            for version in _families():
                self._make_true(netlink, version, wanted, problems)
                if any(network == EVERYTHING[version] for network, _ in wanted):
                    problems.extend(self._passed_over(netlink, version))

        try:
            converse(work)
        except (NetlinkError, OSError) as error:
            problems.append(f"announced networks are not routed: {os.strerror(number_of(error))}")
        return problems

    def holds(self) -> bool:
        """Whether there is what `hold` leaves, this node's or one's that was killed. Raises OSError."""
        return converse(
            lambda netlink: any(
                (each.network, each.metric) == (EVERYTHING[version], LAST)
                for version in _families()
                for each in self._routes(netlink, version)
            )
        )

    def _passed_over(self, netlink: IPRoute, version: int) -> list[str]:
        """Rules of others that send everything elsewhere before ours are asked."""
        place = self._place
        first = [
            each.get_attr("FRA_PRIORITY") or 0
            for each in netlink.get_rules(family=_FAMILIES[version])
            if (each.get_attr("FRA_TABLE") or each["table"]) not in (TABLE_LOCAL, place.table)
            and each["action"] == FR_ACT_TO_TBL
            and each.get_attr("FRA_SUPPRESS_PREFIXLEN") in (None, NO_SUPPRESSION)
            and not any((each["src_len"], each["dst_len"], each["tos"], *map(each.get_attr, _CONDITIONS)))
        ]
        return [
            f"the routing rule with priority {priority} comes before those of the exit node: delete it "
            f"(ip -{version} rule del priority {priority}), or set network.rule_priority to less than that"
            for priority in first
            if priority <= place.priority
        ]

    def _make_true(
        self,
        netlink: IPRoute,
        version: int,
        wanted: Mapping[tuple[IPNetwork, int], int],
        problems: list[str],
    ) -> None:
        routes = [_Route(*key, link) for key, link in wanted.items() if key[0].version == version]
        rules = self._wanted_rules() if routes else []
        old_routes, old_rules = self._routes(netlink, version), self._rules(netlink, version)
        # routes first: with the rules comes what they are for
        for route in routes:
            if route not in old_routes:
                what = f"route {route.network}"
                _attempt(problems, what, _THERE, netlink.route, "replace", **self._route(route))
        for rule in rules:
            if rule not in old_rules:
                what = "rule for announced networks"
                _attempt(problems, what, _THERE, netlink.rule, "add", **_parameters(version, rule))
        for rule in old_rules:
            if rule not in rules:
                _attempt(
                    problems, "rule not undone", _GONE, netlink.rule, "delete", **_parameters(version, rule)
                )
        kept = {(route.network, route.metric) for route in routes}
        for route, found in old_routes.items():
            if (route.network, route.metric) not in kept:  # a replaced one is gone
                what = f"route {route.network} not undone"
                exactly = {key: found[key] for key in ("proto", "scope", "type")}
                parameters = {**self._parameters(route), **exactly}
                _attempt(problems, what, _GONE, netlink.route, "delete", **parameters)

    def _routes(self, netlink: IPRoute, version: int) -> dict[_Route, Any]:
        """What is in the table, with what the kernel says of it."""
        return {
            _Route(network_of(each), each.get_attr("RTA_PRIORITY") or 0, _link_of(each)): each
            for each in netlink.get_routes(family=_FAMILIES[version], table=self._place.table)
        }

    def _rules(self, netlink: IPRoute, version: int) -> list[_Rule]:
        """Those at our two priorities that lead where ours do; others' stay."""
        place, found = self._place, []
        for each in netlink.get_rules(family=_FAMILIES[version]):
            suppress = each.get_attr("FRA_SUPPRESS_PREFIXLEN")
            inverted = bool(each["flags"] & FIB_RULE_INVERT)
            rule = _Rule(
                each.get_attr("FRA_PRIORITY") or 0,
                each.get_attr("FRA_TABLE") or each["table"],
                None if suppress in (None, NO_SUPPRESSION) else suppress,
                (each.get_attr("FRA_UID_RANGE") or "") if inverted else "",
            )
            ways = ((place.priority, TABLE_MAIN, 0), (place.priority + 1, place.table, None))
            if rule[:3] in ways:
                found.append(rule)
        return found

    def _wanted_rules(self) -> list[_Rule]:
        place = self._place
        return [
            _Rule(place.priority, TABLE_MAIN, 0, ""),
            _Rule(place.priority + 1, place.table, None, f"{place.user}:{place.user}"),
        ]

    def _parameters(self, route: _Route) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "dst": str(route.network),
            "family": _FAMILIES[route.network.version],
            "table": self._place.table,
        }
        if route.metric:
            parameters["priority"] = route.metric
        return parameters

    def _route(self, route: _Route) -> dict[str, Any]:
        parameters = {**self._parameters(route), "proto": RTPROT_STATIC}
        if not route.link:
            return {**parameters, "type": UNREACHABLE}
        parameters["oif"] = route.link
        return {**parameters, "scope": "link"} if route.network.version == 4 else parameters


def _link_of(found: Any) -> int:
    """See _Route."""
    if found["type"] == RTN_UNREACHABLE:
        return 0
    straight = (
        found["type"] == RTN_UNICAST and not found.get_attr("RTA_GATEWAY") and not found.get_attr("RTA_VIA")
    )
    return (found.get_attr("RTA_OIF") if straight else None) or FOREIGN


def _families() -> tuple[int, ...]:
    """Those the kernel has: asked for another, it answers with all."""
    return (4, 6) if os.path.isdir("/proc/sys/net/ipv6") else (4,)


def _metric(network: IPNetwork) -> int:
    """What the kernel gives a route without one."""
    return 0 if network.version == 4 else IP6_RT_PRIO_USER


def _parameters(version: int, rule: _Rule) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "family": _FAMILIES[version],
        "priority": rule.priority,
        "table": rule.table,
    }
    if rule.suppress is not None:
        parameters["FRA_SUPPRESS_PREFIXLEN"] = rule.suppress
    if rule.users:
        parameters |= {"flags": FIB_RULE_INVERT, "FRA_UID_RANGE": rule.users}
    return parameters


def _attempt(
    problems: list[str], what: str, fine: frozenset[int], call: Any, *words: str, **parameters: Any
) -> None:
    """Ask the kernel. A line in `problems` when it refuses for another reason than those in `fine`."""
    try:
        call(*words, **parameters)
    except (NetlinkError, OSError) as error:
        if number_of(error) not in fine:
            problems.append(f"{what}: {os.strerror(number_of(error))}")
