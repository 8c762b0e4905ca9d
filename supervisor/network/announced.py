"""Networks behind members, and the exit node: what of it is routed into the tunnel, and what keeps it from working.

Control says what is announced and wanted (RoutesKnown). Here it is held against the machine: a network that meets a
route of the machine is left aside with a warning, unless network.allow_overlap; the rest goes into a table of its own
(`policy`). With an exit node a family it does not carry is unreachable rather than not tunneled. What this node itself
announces while the machine does not forward is withheld: nobody is to send there what goes nowhere. A new route of the
machine makes everything be looked at again (supervisor/network/machine.py).
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from pathlib import Path

from supervisor.network import overlap
from supervisor.network.policy import EVERYTHING, IPNetwork, PolicyTable
from vpnd.api.messages import RoutesKnown

#: By IP version: the sysctls that are 1 where packets from {} are forwarded. The first one sets the others as well.
FORWARDING = {
    4: ("net.ipv4.ip_forward", "net.ipv4.conf.{}.forwarding"),
    6: ("net.ipv6.conf.all.forwarding",),
}
#: net.ipv4.conf.*.rp_filter: packets have to come in by the route their source has (RFC 3704 strict mode)
STRICT = 1

log = logging.getLogger("supervisor")


class AnnouncedRoutes:
    """Owner: supervisor loop, but for `make_true` and `undo`: of one thread at a time.

    `hold`: what is not routed is not to leave the machine (`killswitch`).
    """

    def __init__(
        self,
        interface: str,
        table: PolicyTable,
        *,
        allow_overlap: bool,
        hold: bool = False,
        proc_sys: Path = Path("/proc/sys"),
        in_use: Callable[[], list[overlap.Taken]] = overlap.in_use,
    ) -> None:
        """`table`, `proc_sys` and `in_use` are replaced by tests."""
        self._interface, self._table, self._allow_overlap, self._hold = interface, table, allow_overlap, hold
        self._proc_sys, self._in_use = proc_sys, in_use
        self.known = RoutesKnown(routes=())
        self._left_aside: list[str] = []
        #: what this node announces itself, and what of it the machine did not forward to at the last look
        self.advertised: tuple[str, ...] = ()
        self.withheld: tuple[str, ...] = ()

    @property
    def hints(self) -> list[str]:
        """One line each: what is left aside, and what the user can do about it."""
        return self._left_aside

    def undo(self, *, hold: bool) -> None:
        """Take back all routes and rules, but for what `hold` leaves. Blocks for some milliseconds."""
        for line in self._table.set([], hold=hold):
            log.warning("%s", line)

    def make_true(self) -> list[str]:
        """Route what is known now, and nothing else, comparing with what is routed, and look for `obstacles`. Blocks
        for some milliseconds.

        Returns these and what the kernel refused, a line each.
        """
        return [*self.obstacles(), *self._route()]

    def _route(self) -> list[str]:
        known = self.known
        networks: list[IPNetwork] = [ipaddress.ip_network(text) for text in known.routes]
        left_aside: list[str] = []
        if networks and not self._allow_overlap:
            try:
                taken = self._in_use()
            except OSError as error:
                return [f"announced networks are not routed: {error.strerror}"]
            networks = [network for network in networks if self._free(network, taken, left_aside)]
        for line in left_aside:
            if line not in self._left_aside:
                log.warning("%s", line)
        self._left_aside = left_aside
        exits = [network for network in EVERYTHING.values() if network in networks]
        blocked = [network for network in EVERYTHING.values() if network not in exits]
        carried_in_part = known.exit_peer and exits
        return self._table.set(networks, blocked if carried_in_part else (), hold=self._hold)

    def _free(self, network: IPNetwork, taken: list[overlap.Taken], left_aside: list[str]) -> bool:
        if not network.prefixlen:
            return True
        met = overlap.find_overlap([network], taken, self._interface)
        if met is not None:
            left_aside.append(
                f"the announced network {network} is not routed: it overlaps {met[1].what}; change one of the two, "
                "or set network.allow_overlap = true"
            )
        return met is None

    def obstacles(self) -> list[str]:
        """Settings of the machine that keep packets from going on, a line each. Settles `withheld`."""
        return [*self._withhold(), *self._filtered()]

    def _withhold(self) -> list[str]:
        withheld: list[str] = []
        lines = []
        for version, names in FORWARDING.items():
            behind = [text for text in self.advertised if ipaddress.ip_network(text).version == version]
            closed = (name.format(self._interface) for name in names)
            if behind and (name := next((each for each in closed if self._sysctl(each) == 0), "")):
                withheld += behind
                lines.append(
                    f"this machine does not forward packets, so the others are not sent to {', '.join(behind)} "
                    f"behind it: sysctl -w {name}=1"
                )
        self.withheld = tuple(withheld)
        return lines

    def _filtered(self) -> list[str]:
        """A strict filter looks for the way back of the tunnel's own packets in the wrong table, and drops them."""
        if not any(ipaddress.ip_network(text) == EVERYTHING[4] for text in self.known.routes):
            return []
        strict = [
            path.parent.name
            for path in sorted(self._proc_sys.glob("net/ipv4/conf/*/rp_filter"))
            if path.parent.name not in ("lo", "default", self._interface)
            and self._sysctl(f"net.ipv4.conf.{path.parent.name}.rp_filter") == STRICT
        ]
        if not strict or self._sysctl("net.ipv4.conf.all.rp_filter") not in (0, STRICT):
            return []
        return [
            "network.exit_node: the strict source filter of this machine drops the tunnel's own packets: "
            "sysctl -w net.ipv4.conf.all.rp_filter=2"
        ]

    def _sysctl(self, name: str) -> int | None:
        """Its value; None where there is no such thing. A dot in an interface's name is a slash in sysctl's."""
        head, _, rest = name.partition(".conf.")
        path = head.replace(".", "/")
        if rest:
            interface, _, key = rest.rpartition(".")
            path = f"{path}/conf/{interface}/{key}"
        try:
            return int((self._proc_sys / path).read_text())
        except (OSError, ValueError):
            return None
