"""Networks behind members, and the exit node: what of it is routed into the tunnel, and what keeps it from working.

Control says what is announced and wanted (RoutesKnown). Here it is held against the machine: a network that meets a
route of the machine is left aside with a warning, unless network.allow_overlap; the rest goes into a table of its own
(`policy`). With an exit node a family it does not carry is unreachable rather than not tunneled. Changes are made in a
thread, one at a time, the last wish wins; a new route of the machine makes everything be looked at again.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import pwd
from collections.abc import Callable, Sequence
from pathlib import Path

from supervisor.network import overlap
from supervisor.network.policy import Place, PolicyTable
from vpnd.api.messages import RoutesKnown
from vpnd.config.schema import Config
from vpnd.errors import MachineError

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

EVERYTHING = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
#: sysctl -> what it is called for the user; 1 where packets are forwarded.
FORWARDING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}
#: net.ipv4.conf.*.rp_filter: packets have to come in by the route their source has (RFC 3704 strict mode)
STRICT = 1

log = logging.getLogger("supervisor")


def open_for(interface: str, config: Config) -> AnnouncedRoutes:
    """Those of a node; what one that was killed has left of its rules is taken away. Raises MachineError."""
    network = config.network
    try:
        user = pwd.getpwnam(config.process.user).pw_uid
        table = PolicyTable(Place(interface, network.route_table, network.rule_priority, user))
        table.clear()
    except (KeyError, OSError) as error:
        raise MachineError(f"routing rules cannot be looked at: {error}") from error
    return AnnouncedRoutes(interface, table, allow_overlap=network.allow_overlap)


class AnnouncedRoutes:
    """Owner: supervisor loop. `close` takes everything back, while the device is still there or later."""

    def __init__(
        self,
        interface: str,
        table: PolicyTable,
        *,
        allow_overlap: bool,
        proc_sys: Path = Path("/proc/sys"),
        in_use: Callable[[], list[overlap.Taken]] = overlap.in_use,
    ) -> None:
        """`table`, `proc_sys` and `in_use` are replaced by tests."""
        self._interface, self._table, self._allow_overlap = interface, table, allow_overlap
        self._proc_sys, self._in_use = proc_sys, in_use
        self._known = RoutesKnown(routes=())
        self._advertised: tuple[str, ...] = ()
        self._problems: list[str] = []
        self._wanted = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._working = self._closed = False

    @property
    def busy(self) -> bool:
        """Whether something is still to be made true."""
        return self._working or self._wanted.is_set()

    @property
    def warnings(self) -> list[str]:
        """One line each: what is not routed, what does not forward, and what the user can do about it."""
        return [*self._problems, *self._forwarding_hints(), *self._filter_hints()]

    def advertise(self, networks: Sequence[str]) -> None:
        """What this node announces itself; looked at for `warnings` only."""
        self._advertised = tuple(networks)

    def apply(self, known: RoutesKnown) -> None:
        """Route this into the tunnel from now on, in the background, instead of what was routed before."""
        if known != self._known:
            self._known = known
            self.look_again()

    def look_again(self) -> None:
        """The machine's routes may have changed."""
        if self._closed or (not self._known.routes and self._worker is None):
            return
        self._wanted.set()
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Take back all routes and rules. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._known = RoutesKnown(routes=())
        if self._worker is not None:
            self._wanted.set()
            await self._worker
            self._worker = None

    async def _work(self) -> None:
        """Until it is closed: make what is wanted true, once for all wishes that came meanwhile."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            self._working = True
            problems = await asyncio.to_thread(self._make_true, self._known)
            for line in problems:
                if line not in self._problems:
                    log.warning("%s", line)
            self._problems = problems
            self._working = False
            if self._closed and not self._wanted.is_set():
                return

    def _make_true(self, known: RoutesKnown) -> list[str]:
        """Blocks for some milliseconds. Returns what is to be told."""
        networks: list[IPNetwork] = [ipaddress.ip_network(text) for text in known.routes]
        problems: list[str] = []
        if networks and not self._allow_overlap:
            try:
                taken = self._in_use()
            except OSError as error:
                return [f"announced networks are not routed: {error.strerror}"]
            networks = [network for network in networks if self._free(network, taken, problems)]
        exits = [network for network in EVERYTHING if network in networks]
        blocked = (
            [network for network in EVERYTHING if network not in exits] if known.exit_peer and exits else []
        )
        return problems + self._table.set(networks, blocked)

    def _free(self, network: IPNetwork, taken: list[overlap.Taken], problems: list[str]) -> bool:
        if not network.prefixlen:
            return True
        met = overlap.find_overlap([network], taken, self._interface)
        if met is not None:
            problems.append(
                f"the announced network {network} is not routed: it overlaps {met[1].what}; change one of the two, "
                "or set network.allow_overlap = true"
            )
        return met is None

    def _forwarding_hints(self) -> list[str]:
        hints = []
        for version, name in FORWARDING.items():
            behind = [text for text in self._advertised if ipaddress.ip_network(text).version == version]
            if behind and self._sysctl(name) == 0:
                hints.append(
                    f"this node announces {', '.join(behind)}, but the machine does not forward packets: "
                    f"sysctl -w {name}=1"
                )
        return hints

    def _filter_hints(self) -> list[str]:
        """A strict filter looks for the way back of the tunnel's own packets in the wrong table, and drops them."""
        if not any(ipaddress.ip_network(text) == EVERYTHING[0] for text in self._known.routes):
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
