"""Telling systemd-resolved, where it runs, to ask this node for the names of its network, and for nothing else.

What is set belongs to the TUN device's link (split DNS, resolvectl(1)): its server, its domains as routing-only ones
("~home.vpn": never searched, never more than these), and that it is no default route for names. resolved forgets all
of it when the device goes, also after kill -9. Where resolved does not run, nothing of the machine is touched:
/etc/resolv.conf belongs to somebody else, and `Outcome.hint` says what that somebody can do.

resolvectl is run rather than resolved's D-Bus interface called: it is part of the same package, its verbs are
documented and stable, and it needs no D-Bus library. Everything here blocks, for up to dns.register_timeout per
command: call it off the loop. Needs root.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vpnd.endpoint import IPNetwork
from vpnd.names.origins import zone_names
from vpnd.printable import printable

#: There while resolved runs (RuntimeDirectory of its unit).
RUNTIME_DIRECTORY = Path("/run/systemd/resolve")
RESOLV_CONF = Path("/etc/resolv.conf")
#: resolved's own addresses in resolv.conf (systemd-resolved.service(8)).
STUBS = frozenset({"127.0.0.53", "127.0.0.54"})
DNS_PORT = 53

log = logging.getLogger(__name__)


class Link(NamedTuple):
    """A TUN device and the names that are answered behind it. `origin` is without the last dot."""

    interface: str
    origin: str
    prefixes: tuple[IPNetwork, ...]
    servers: tuple[str, ...]
    port: int


class Outcome(NamedTuple):
    """`registered`: resolved took it. `hint`: what to tell the user; empty when names work already."""

    registered: bool
    hint: str


class CommandFailed(Exception):
    """A command could not be run, took too long or refused; the text says which."""


#: Runs a command for at most so many seconds. Raises CommandFailed, nothing else.
Runner = Callable[[Sequence[str], float], None]


class Resolved:
    """One link's entry in resolved. Owner: the supervisor, one call at a time."""

    def __init__(
        self,
        timeout_s: float,
        run: Runner | None = None,
        reachable: Callable[[], bool] | None = None,
        resolv_conf: Path = RESOLV_CONF,
    ) -> None:
        """`run` and `reachable` (is there a resolved that sees our links?) are replaced by tests."""
        self._timeout_s = timeout_s
        self._run = run or run_command
        self._reachable = reachable or resolved_reachable
        self._resolv_conf = resolv_conf
        self._interface = ""

    def register(self, link: Link) -> Outcome:
        """Register `link`, replacing what was registered for it before. Never raises; a refusal is in the hint.

        All or nothing: when resolved takes a part only, that is taken back.
        """
        if not self._reachable():
            return Outcome(False, hint(link))
        self._interface = link.interface
        try:
            for command in commands(link):
                self._resolvectl(*command)
        except CommandFailed as error:
            log.warning("systemd-resolved does not take the names of %s: %s", link.origin, error)
            self.undo()
            return Outcome(False, hint(link))
        for command in refinements(link):
            try:
                self._resolvectl(*command)
            except CommandFailed as error:
                # a resolved without that feature does what was asked for
                log.debug("resolvectl %s: %s", " ".join(command), error)
        return Outcome(True, "" if self._in_use() else hint(link))

    def undo(self) -> None:
        """Take back what was registered, if anything. A device that is gone already has taken it along."""
        interface, self._interface = self._interface, ""
        if interface:
            try:
                self._resolvectl("revert", interface)
            except CommandFailed as error:
                log.debug("resolvectl revert %s: %s", interface, error)

    def _resolvectl(self, *arguments: str) -> None:
        # behind "--", because the kernel lets a device's name begin with a hyphen
        self._run(("resolvectl", "--", *arguments), self._timeout_s)

    def _in_use(self) -> bool:
        """Whether this machine's programs ask resolved at all: it may run and be passed over."""
        try:
            text = self._resolv_conf.read_text(errors="replace")
        except OSError:
            return False
        rows = [line.split() for line in text.splitlines()]
        return any(row[0] == "nameserver" and row[1] in STUBS for row in rows if len(row) > 1)


def commands(link: Link) -> list[tuple[str, ...]]:
    """What must work: arguments of resolvectl, in order."""
    servers = (_server(address, link.port) for address in link.servers)
    zones = (link.origin, *zone_names(link.prefixes))
    return [
        # first, so that not one query of another domain comes here
        ("default-route", link.interface, "no"),
        ("domain", link.interface, *(f"~{zone}" for zone in zones)),
        ("dns", link.interface, *servers),
    ]


def refinements(link: Link) -> list[tuple[str, ...]]:
    """What the machine may have switched on for everybody and the tunnel has no use for.

    The zone is not signed, and the root says that .vpn does not exist: validation would refuse every name.
    """
    return [(verb, link.interface, "no") for verb in ("dnssec", "dnsovertls", "llmnr", "mdns")]


def hint(link: Link) -> str:
    """For the user of a machine whose resolver is not ours to change."""
    server = link.servers[0] if link.servers else "the virtual IP"
    port = "" if link.port == DNS_PORT else f" -p {link.port}"
    other = "" if link.port == DNS_PORT else f"#{link.port}"
    return (
        f"names like NAME.{link.origin} are answered at {server} port {link.port} (UDP and TCP), but this "
        f"machine's resolver does not ask there. Set dns.hosts_file to /etc/hosts, or send it the queries for "
        f"{link.origin}, with dnsmasq: server=/{link.origin}/{server}{other}. To try: dig{port} @{server} "
        f"NAME.{link.origin}"
    )


def resolved_reachable() -> bool:
    """Whether resolved runs, and in our network namespace.

    In another one it would take an interface's name for a number there that may be somebody else's link.
    """
    try:
        ours, first = (os.readlink(f"/proc/{process}/ns/net") for process in ("self", "1"))
    except OSError:
        return False
    return ours == first and RUNTIME_DIRECTORY.is_dir()


def run_command(command: Sequence[str], timeout_s: float) -> None:
    """The `Runner` of a real machine."""
    name = command[0]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            env={"PATH": os.defpath + ":/usr/sbin:/sbin", "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{name} did not end within {timeout_s:g} s") from None
    except OSError as error:
        raise CommandFailed(f"{name} cannot be run: {error.strerror}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise CommandFailed(f"{name}: {printable(said[-1]) if said else f'exit code {done.returncode}'}")


def _server(address: str, port: int) -> str:
    if port == DNS_PORT:
        return address
    bracketed = f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    return f"{bracketed}:{port}"
