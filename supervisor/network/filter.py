"""A table of nftables rules of the node's own: what may come to its addresses, what may leave past an exit node, and
from whom what leaves for the networks it announces seems to come.

    chain     what it drops                                               why
    --------  ----------------------------------------------------------  ---------------------------------------------
    arriving  for our addresses, from another device than the tunnel and  a neighbour on a LAN is no member, whatever
              from another machine                                        source address it writes
    leaving   of a program, past the tunnel, to none of the machine's     the routing rules say so too (`policy`), until
              own networks; but not of process.user's                     another program changes them: nothing leaks in
    through   the same of what is forwarded                               the time it takes to mend them

The last two are there while the kill switch is (`killswitch`). The kernel's own packets and those of closed sockets,
which belong to no user any more, are left to the routing rules: sessions would not end in order otherwise.

A fourth chain, masquerading, gives what members send into announced networks this machine's own address there
(network.masquerade).

The nft program changes the table as a whole in one transaction, and prints it for comparison. Without it, or in a
kernel without nftables, there is a problem to be told and the node works all the same.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from supervisor.network.netlink import TABLE_LOCAL, IPRoute, NetlinkError, converse, number_of
from supervisor.network.policy import RTN_UNICAST, IPNetwork
from supervisor.network.routes import network_of
from vpnd.config import paths

log = logging.getLogger("supervisor")

#: Never further than the next router: multicast, broadcast, IPv6's link-local addresses.
NEIGHBOURHOOD = ("224.0.0.0/4", "255.255.255.255/32", "fe80::/10", "ff00::/8")
_RTM_F_CLONED = 0x200


class KillSwitch(NamedTuple):
    """Who may leave past the tunnel: `user`, a uid. `table` is the one of the tunnel's own routes."""

    user: int
    table: int


class Filter:
    """The nftables table of one node. Owner: one thread at a time; all blocks for some milliseconds.

    `own` is what the node's addresses are, `masqueraded` the networks behind it whose hosts are to see this machine
    instead of members; both may be replaced at any time. `hint`: what a machine without nft misses.
    """

    def __init__(self, interface: str, kill_switch: KillSwitch | None) -> None:
        self._interface, self._kill_switch = interface, kill_switch
        self.own: tuple[str, ...] = ()
        self.masqueraded: tuple[str, ...] = ()
        self._asked = self._printed = self.hint = ""

    @property
    def table(self) -> str:
        """Its name, which is that of no other node's."""
        return table_name(self._interface)

    def mend(self) -> list[str]:
        """Make the table what it is to be, if it is not; a line for what hinders it."""
        self.hint = ""
        if self._kill_switch is None and shutil.which("nft", path=paths.PROGRAMS) is None:
            self.hint = (
                f"there is no nft, so {self._missed()}: apt-get install nftables, or network.nftables = false"
            )
            return []
        try:
            near = converse(self._near) if self._kill_switch else ()
            try:
                self._set(ruleset(self._interface, self.own, self.masqueraded, self._kill_switch, near))
            except NftError as error:
                if not self.masqueraded:
                    raise
                # A kernel without NAT, perhaps: what protects the node holds all the same
                self._set(ruleset(self._interface, self.own, (), self._kill_switch, near))
                return [f"network.masquerade does not hold: {error}"]
        except (NetlinkError, OSError) as error:
            return [f"nftables rules are not set: {os.strerror(number_of(error))}"]
        except NftError as error:
            return [f"nftables rules are not set, so {self._missed()}: {error}"]
        return []

    def _set(self, text: str) -> None:
        """Have these rules, if they are not there. Raises NftError."""
        if text == self._asked and self._printed:
            if self._printed == self._print():
                return
            log.warning("another program changed the machine; repeating: the nftables table %s", self.table)
        nft("-f", "-", stdin=text)
        self._asked, self._printed = text, self._print()

    def remove(self) -> bool:
        """Take the table away. False when there was none, or there is no nft."""
        self._asked = self._printed = ""
        try:
            nft("delete", "table", "inet", self.table)
        except NftError:
            return False
        return True

    def _print(self) -> str:
        try:
            return nft("--stateless", "--numeric", "list", "table", "inet", self.table)
        except NftError:  # gone
            return ""

    def _missed(self) -> str:
        if self._kill_switch:
            return "only routing rules keep traffic from leaving past the exit node"
        missed = "neighbours on other networks can send to this node's addresses in the VPN"
        if self.masqueraded:
            missed += (
                f", and hosts in {', '.join(self.masqueraded)} answer members only by a route of their own"
            )
        return missed

    def _near(self, netlink: IPRoute) -> tuple[IPNetwork, ...]:
        """The networks the machine itself routes, in whatever table, but for default routes and the tunnel's."""
        assert self._kill_switch is not None
        own = netlink.link_lookup(ifname=self._interface)
        near = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in netlink.get_routes(family=family):
                table = route.get_attr("RTA_TABLE") or route["table"]
                foreign = table not in (TABLE_LOCAL, self._kill_switch.table)
                plain = route["type"] == RTN_UNICAST and not route["flags"] & _RTM_F_CLONED
                if foreign and plain and route["dst_len"] and route.get_attr("RTA_OIF") not in own:
                    near.append(network_of(route))
        return tuple(near)


class NftError(Exception):
    """What nft said, and a remedy if there is one."""


def table_name(interface: str) -> str:
    """Of the node that has `interface`; nft allows few characters in it."""
    plain = "".join(c if c.isalnum() or c in "_.-" else f"_{ord(c):02x}" for c in interface)
    return f"vpnd_{plain}"


def ruleset(
    interface: str,
    own: Sequence[str],
    masqueraded: Sequence[str],
    kill_switch: KillSwitch | None,
    near: Iterable[IPNetwork],
) -> str:
    """The whole table, for nft -f: it takes the place of the one before in one transaction."""
    device = f'"{interface}"'.replace("*", r"\*")
    table = f"table inet {table_name(interface)}"
    lines = [table, f"delete {table}", f"{table} {{"]
    lines += ["chain arriving { type filter hook prerouting priority raw; policy accept;"]
    for word, version in (("ip", 4), ("ip6", 6)):
        addresses = [text for text in own if ipaddress.ip_address(text).version == version]
        if addresses:
            # The address first: nearly every packet is done with it, and looking up a route for each would be felt
            ours = f"{word} daddr {{ {', '.join(addresses)} }}"
            lines.append(f'{ours} iifname != {{ {device}, "lo" }} fib saddr type != local counter drop')
    lines.append("}")
    if masqueraded:
        # Only where it is needed: such a chain makes the kernel follow every connection of the machine
        lines.append("chain masquerading { type nat hook postrouting priority srcnat; policy accept;")
        forwarded = f'iifname {device} oifname != {{ {device}, "lo" }}'
        lines += [f"{forwarded} {each} masquerade" for each in _destinations(masqueraded)]
        lines.append("}")
    if kill_switch is not None:
        allowed = [f'oifname {{ {device}, "lo" }} accept', *_near_rules(near)]
        lines += ["chain leaving { type filter hook output priority 300; policy accept;", *allowed]
        lines += [f"meta skuid != {kill_switch.user} counter drop", "}"]
        lines += ["chain through { type filter hook forward priority 300; policy accept;", *allowed]
        lines += ["counter drop", "}"]
    return "\n".join([*lines, "}", ""])


def _near_rules(near: Iterable[IPNetwork]) -> list[str]:
    return [f"{each} accept" for each in _destinations([*map(str, near), *NEIGHBOURHOOD])]


def _destinations(networks: Iterable[str]) -> list[str]:
    """What matches packets to any of them, of each IP version there is."""
    known = [ipaddress.ip_network(text) for text in networks]
    four = [*ipaddress.collapse_addresses(net for net in known if isinstance(net, ipaddress.IPv4Network))]
    six = [*ipaddress.collapse_addresses(net for net in known if isinstance(net, ipaddress.IPv6Network))]
    return [
        f"{word} daddr {{ {', '.join(map(str, found))} }}"
        for word, found in (("ip", four), ("ip6", six))
        if found
    ]


def nft(*words: str, stdin: str = "") -> str:
    """Run nft; what it prints. Raises NftError."""
    program = shutil.which("nft", path=paths.PROGRAMS)
    if program is None:
        raise NftError("there is no nft; install it (apt-get install nftables)")
    try:
        done = subprocess.run([program, *words], input=stdin, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NftError(f"{program}: {error.strerror}") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"{program} ended with {done.returncode}"]
        raise NftError(said[0])
    return done.stdout
