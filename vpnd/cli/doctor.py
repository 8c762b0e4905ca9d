"""`vpnd doctor`: what of this machine keeps a node from working, or from working well; with or without a running one.

A check yields findings: fine, worth knowing (*hint*), or in the way (*fault*), with the remedy. None of them changes
anything. What it is not permitted to look at, without root, is said as such.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import platform
import pwd
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from vpnd import trust
from vpnd.cli.command import JsonOption, Where, command, json_of, read_status
from vpnd.config import multiaddrs, paths
from vpnd.config.schema import Config
from vpnd.errors import ConfigError, NotRunningError, PrivilegeError, VpndError
from vpnd.printable import many, printable, wrapped
from vpnd.status import connected, known_as
from vpnd.version import __version__

if TYPE_CHECKING:
    from vpnd.status import Status

FINE, HINT, FAULT = "fine", "hint", "fault"
_COLOURS = {FINE: "green", HINT: "yellow", FAULT: "red"}
#: pidfd_open, which the supervisor watches its children with, is of 5.3; the rest is older.
LEAST_KERNEL = (5, 3)
#: Linux include/uapi/linux/capability.h
_CAP_NET_ADMIN, _CAP_NET_RAW = 12, 13
#: adjtimex(2): sizeof(struct timex) on every 64-bit Linux, and what it returns while nobody sets the clock.
_TIMEX_BYTES, _TIME_ERROR = 208, 5
#: A path that carries less than this is no IPv6 path (RFC 8200, section 5).
_LEAST_MTU = 1280
_NFT_TIMEOUT_S = 5.0

app = typer.Typer()


class Finding(NamedTuple):
    """What a check found."""

    name: str
    verdict: str
    says: str
    remedy: str = ""


Check = Callable[[Config, "Status | None"], Iterator[Finding]]


@command(app)
def doctor(
    place: Where,
    as_json: JsonOption = False,
) -> None:
    """Look for what keeps a node from working on this machine, each with its remedy; nothing is changed.

    Kernel, TUN, rights, users, clock, ports, MTU, congestion control, DNS, routes, firewall, file modes, versions and
    the running node, if there is one. As root it sees more. Exit code 1 when anything is in the way.
    """
    findings = examined(place)
    typer.echo(json_of([finding._asdict() for finding in findings]) if as_json else rendered(findings))
    raise typer.Exit(1 if any(finding.verdict == FAULT for finding in findings) else 0)


def examined(place: Where) -> list[Finding]:
    """What all checks find."""
    config, findings = _configuration(place)
    running, checks = None, CHECKS
    try:
        running = read_status(config)
    except NotRunningError:
        pass  # fine: it is to be started
    except VpndError as error:
        findings.append(Finding("node", HINT, f"what runs here tells nothing: {error}"))
        checks = tuple(
            check for check in CHECKS if check not in (_node, _ports)
        )  # its ports are taken by itself
    for check in checks:
        findings += check(config, running)
    return findings


def _configuration(place: Where) -> tuple[Config, list[Finding]]:
    """That in force; the defaults where it cannot be used, which is a finding."""
    try:
        return place.load().config, [Finding("configuration", FINE, "can be used")]
    except VpndError as error:
        closed = isinstance(error, PrivilegeError)
        remedy = "" if closed else "vpnd config check says where; "
        remedy += "what follows is judged by the defaults"
        state_dir = paths.places(place.config_file, place.state_dir, os.environ).state_dir
        said = Finding("configuration", HINT if closed else FAULT, str(error).replace("\n", "; "), remedy)
        return Config(state_dir=str(state_dir)), [said]


def rendered(findings: list[Finding]) -> str:
    """For people."""
    width = max(len(finding.name) for finding in findings)
    begun = width + 2 + 6
    lines = []
    for finding in findings:
        said = printable(f"{finding.says}: {finding.remedy}" if finding.remedy else finding.says)
        mark = typer.style(f"{finding.verdict:5}", fg=_COLOURS[finding.verdict])
        lines.append(f"{finding.name:{width}}  {mark} {wrapped(said, begun, begun)}")
    faults = sum(finding.verdict == FAULT for finding in findings)
    hints = sum(finding.verdict == HINT for finding in findings)
    return "\n".join([*lines, "", f"{many(faults, 'fault')}, {many(hints, 'hint')}"])


# --- what it needs


def _versions(config: Config, running: Status | None) -> Iterator[Finding]:
    python = platform.python_version()
    if running is not None and running.version != __version__:
        remedy = "start the node again (vpnd stop, vpnd start) to have the new version run"
        yield Finding("versions", HINT, f"vpnd {__version__}, but {running.version} is running", remedy)
    else:
        yield Finding("versions", FINE, f"vpnd {__version__}, Python {python}")


def _kernel(config: Config, running: Status | None) -> Iterator[Finding]:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdecimal())
    if platform.system() != "Linux" or numbers < LEAST_KERNEL:
        least = ".".join(map(str, LEAST_KERNEL))
        yield Finding("kernel", FAULT, f"{platform.system()} {release}", f"vpnd needs Linux {least} or newer")
        return
    yield Finding("kernel", FINE, f"Linux {release}")
    if not Path("/proc/sys/net/ipv6").is_dir():
        remedy = "the VPN works with IPv4 alone; see ipv6.disable on the kernel's command line"
        yield Finding("kernel", HINT, "it has no IPv6", remedy)


def _tun(config: Config, running: Status | None) -> Iterator[Finding]:
    device = Path("/dev/net/tun")
    if not device.exists():
        remedy = "modprobe tun, or give the container the device (--device /dev/net/tun)"
        yield Finding("tun", FAULT, f"there is no {device}", remedy)
    elif not os.access(device, os.R_OK | os.W_OK):
        yield Finding("tun", HINT, f"{device} is not open to this user", "run as root: sudo vpnd doctor")
    elif running is None and Path("/sys/class/net", config.network.interface).exists():
        remedy = "another program has it: choose another network.interface, or ip link delete it"
        yield Finding("tun", FAULT, f"an interface {config.network.interface} exists already", remedy)
    else:
        yield Finding("tun", FINE, f"{device} can be used")


def _rights(config: Config, running: Status | None) -> Iterator[Finding]:
    if os.geteuid() != 0:
        yield Finding(
            "rights", HINT, "this is not root, so not everything can be looked at", "sudo vpnd doctor"
        )
        return
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    held = int(fields["CapEff"], 16)
    missing = [
        name
        for name, bit in (("CAP_NET_ADMIN", _CAP_NET_ADMIN), ("CAP_NET_RAW", _CAP_NET_RAW))
        if not held >> bit & 1
    ]
    if "CAP_NET_ADMIN" in missing:
        yield Finding("rights", FAULT, "root without CAP_NET_ADMIN", "give the container --cap-add NET_ADMIN")
    elif missing:
        yield Finding(
            "rights", HINT, "root without CAP_NET_RAW", "vpnd ping and why need it: --cap-add NET_RAW"
        )
    else:
        yield Finding("rights", FINE, "root, with CAP_NET_ADMIN")


def _users(config: Config, running: Status | None) -> Iterator[Finding]:
    user = config.process.user
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        remedy = f"the first start makes it; by hand: useradd --system {user}"
        yield Finding("user", HINT, f"process.user = {user} is not there", remedy)
        return
    if found.pw_uid == 0:
        yield Finding("user", FAULT, f"process.user = {user} is root", "name an unprivileged user")
    else:
        yield Finding("user", FINE, f"the processes run as {user}, {found.pw_uid}")


def _clock(config: Config, running: Status | None) -> Iterator[Finding]:
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: nothing is changed
    state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    if state == _TIME_ERROR:
        remedy = "memberships begin and end by it: run systemd-timesyncd or chrony (date -u on both machines)"
        yield Finding("clock", HINT, "nobody keeps the clock right", remedy)
    elif state < 0:
        yield Finding("clock", HINT, "the kernel does not say whether somebody keeps the clock right")
    else:
        yield Finding("clock", FINE, "it is kept right")


# --- the network


def _ports(config: Config, running: Status | None) -> Iterator[Finding]:
    if running is not None:
        yield Finding("ports", FINE, f"listens on {' '.join(running.node.listen) or 'nothing yet'}")
        return
    for text in config.p2p.listen:
        endpoint = multiaddrs.parse(text)
        if endpoint.kind not in ("ip4", "ip6"):
            continue
        family = socket.AF_INET if endpoint.kind == "ip4" else socket.AF_INET6
        try:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((endpoint.host, endpoint.port))
        except OSError as error:
            remedy = f"see who has it: ss -ltnp 'sport = :{endpoint.port}'; or choose another p2p.listen"
            yield Finding("ports", FAULT, f"{text}: {error.strerror}", remedy)
        else:
            yield Finding("ports", FINE, f"{text} is free")


def _mtu(config: Config, running: Status | None) -> Iterator[Finding]:
    small = []
    for link in sorted(Path("/sys/class/net").iterdir()):
        with contextlib.suppress(OSError, ValueError):
            mtu = int((link / "mtu").read_text())
            if mtu < _LEAST_MTU and link.name not in ("lo", config.network.interface):
                small.append(f"{link.name} {mtu}")
    if small:
        remedy = f"packets of {_LEAST_MTU} bytes have to fit: ip link set dev NAME mtu 1500"
        yield Finding("mtu", HINT, f"interfaces with a small MTU: {', '.join(small)}", remedy)
    probing = _sysctl("net/ipv4/tcp_mtu_probing")
    if probing == "0":
        remedy = (
            "where a path drops large packets without a word, sysctl net.ipv4.tcp_mtu_probing=1 finds out"
        )
        yield Finding("mtu", FINE, f"network.mtu {config.network.mtu}; {remedy}")
    else:
        yield Finding("mtu", FINE, f"network.mtu {config.network.mtu}, TCP finds the path's")


def _congestion(config: Config, running: Status | None) -> Iterator[Finding]:
    wanted = config.session.congestion_control
    available = (_sysctl("net/ipv4/tcp_available_congestion_control") or "").split()
    allowed = (_sysctl("net/ipv4/tcp_allowed_congestion_control") or "").split()
    if not wanted:
        yield Finding(
            "tcp", FINE, f"the system's congestion control: {_sysctl('net/ipv4/tcp_congestion_control')}"
        )
    elif wanted not in available:
        remedy = (
            f"modprobe tcp_{wanted}; until then sessions use {_sysctl('net/ipv4/tcp_congestion_control')}"
        )
        yield Finding("tcp", HINT, f"session.congestion_control = {wanted} is not in this kernel", remedy)
    elif wanted not in allowed:
        remedy = f"sysctl net.ipv4.tcp_allowed_congestion_control='{' '.join([*allowed, wanted])}'"
        yield Finding("tcp", HINT, f"the shards, without rights, may not use {wanted}", remedy)
    else:
        yield Finding("tcp", FINE, f"congestion control {wanted}")


def _names(config: Config, running: Status | None) -> Iterator[Finding]:
    if Path("/run/systemd/resolve/io.systemd.Resolve").exists():
        yield Finding("dns", FINE, "systemd-resolved is told of names in the VPN")
        return
    remedy = "addresses work; for names: run systemd-resolved, or ask the node itself (dns in vpnd config reference)"
    yield Finding(
        "dns", HINT, "there is no systemd-resolved, so programs do not find NAME.NETWORK.vpn", remedy
    )


def _routes(config: Config, running: Status | None) -> Iterator[Finding]:
    from supervisor.network import overlap

    network = config.network
    texts = [*network.routes]
    if network.virtual_ip:
        texts.append(f"{network.virtual_ip}/{network.subnet}")
    elif running is None:
        texts.append(config.membership.subnet)
    if running is not None and running.node.subnet:
        texts.append(running.node.subnet)
    nets = [ipaddress.ip_network(text, strict=False) for text in dict.fromkeys(texts)]
    try:
        met = overlap.find_overlap(nets, overlap.in_use(), network.interface)
    except Exception as error:  # pyroute2's, in some variety: what it cannot see is not judged
        yield Finding("routes", HINT, f"the kernel did not say: {error}")
        return
    if met is None:
        yield Finding("routes", FINE, f"nobody else routes {', '.join(map(str, nets))}")
        return
    verdict = HINT if network.allow_overlap else FAULT
    remedy = "choose another range (membership.subnet, network.virtual_ip), or network.allow_overlap = true"
    yield Finding("routes", verdict, f"{nets[met[0]]} overlaps {met[1].what}", remedy)


def _firewall(config: Config, running: Status | None) -> Iterator[Finding]:
    nft = shutil.which("nft", path=paths.PROGRAMS)
    if nft is None:
        remedy = "apt install nftables: the node keeps neighbours away from its addresses with it"
        yield Finding("firewall", HINT, "there is no nft", remedy)
        return
    if os.geteuid() != 0:
        yield Finding("firewall", HINT, "its rules can be seen by root alone", "sudo vpnd doctor")
        return
    try:
        told = subprocess.run(
            [nft, "--json", "list", "chains"], capture_output=True, timeout=_NFT_TIMEOUT_S, check=True
        ).stdout
        chains = [row["chain"] for row in json.loads(told)["nftables"] if "chain" in row]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        yield Finding("firewall", HINT, f"nft does not tell: {error}")
        return
    yield from _forwarding(config, running)
    closed = [
        f"{chain['family']} {chain['table']} {chain['name']}"
        for chain in chains
        if chain.get("hook") == "input" and chain.get("policy") == "drop"
    ]
    if not closed:
        yield Finding("firewall", FINE, "nothing is dropped that no rule names")
        return
    ports = sorted({str(multiaddrs.parse(text).port) for text in config.p2p.listen})
    remedy = (
        f"are TCP {', '.join(ports)} and what comes by {config.network.interface} let in? nft list ruleset"
    )
    yield Finding("firewall", HINT, f"what no rule lets in is dropped ({', '.join(closed)})", remedy)


def _forwarding(config: Config, running: Status | None) -> Iterator[Finding]:
    """Of a node that runs it is an ailment."""
    from supervisor.network import forwarding

    network = config.network
    members = [config.membership.subnet, *network.routes]
    if network.virtual_ip:
        members.append(str(ipaddress.ip_network(f"{network.virtual_ip}/{network.subnet}", strict=False)))
    for line in (
        forwarding.obstacles(network.interface, network.advertise, members) if running is None else ()
    ):
        says, _, remedy = line.partition(": ")
        yield Finding("firewall", FAULT, says, remedy)


# --- files, and the node


def _files(config: Config, running: Status | None) -> Iterator[Finding]:
    state_dir = Path(config.state_dir)
    try:
        os.listdir(state_dir)
    except FileNotFoundError:
        yield Finding("files", FINE, f"{state_dir} is made at the first start")
        return
    except OSError as error:
        yield Finding("files", HINT, f"{state_dir}: {error.strerror}", "as root: sudo vpnd doctor")
        return
    try:
        trust.check(state_dir, "state directory")
    except ConfigError as error:
        yield Finding("files", FAULT, str(error))
        return
    wrong = []
    for path in (state_dir, paths.identity_file(config), paths.status_socket(config), paths.log_file(config)):
        with contextlib.suppress(OSError):
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o077:
                wrong.append(f"{path} (mode {mode:04o})")
    if wrong:
        remedy = "chmod go-rwx: the node's key is read by control alone"
        yield Finding("files", FAULT, f"open to others: {', '.join(wrong)}", remedy)
    else:
        yield Finding("files", FINE, f"{state_dir} and what is in it are root's alone")


def _node(config: Config, running: Status | None) -> Iterator[Finding]:
    if running is None:
        yield Finding("node", FINE, "none is running here (vpnd start)")
        return
    said = f"{known_as(running)} is {running.health}, {connected(running)}"
    yield Finding("node", FINE if not running.ailments else FAULT, said)
    for ailment in running.ailments:
        yield Finding("node", FAULT, ailment.what, ailment.remedy)
    for warning in running.node.warnings:
        yield Finding("node", HINT, warning)


def _sysctl(name: str) -> str | None:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return None


CHECKS: tuple[Check, ...] = (
    _versions, _kernel, _tun, _rights, _users, _clock, _ports, _mtu, _congestion, _names, _routes, _firewall, _files,
    _node,
)  # fmt: skip
