"""`vpnd why`: what stops packets to an address, and what to do about it.

The daemon walks the way of a packet (vpnd/why.py). What only this command may do, as root, comes after: echo requests
to the peer's machine where its port is silent, and through the tunnel where nothing was found.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Annotated, NamedTuple

import typer

from vpnd import why
from vpnd.cli.command import JsonOption, Where, ask, command, option, read_status, refuse_itself, show
from vpnd.cli.echo import HEADER_BYTES, LEAST_BYTES, EchoSocket
from vpnd.config import multiaddrs
from vpnd.config.schema import Config
from vpnd.errors import ConfigError, VpndError
from vpnd.printable import printable, wrapped

PROTOCOLS = {"icmp": 0, "tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_COLOURS = {why.OK: "green", why.STOPS: "red", why.LOSES: "yellow", why.UNKNOWN: "yellow"}
#: A lost packet is no finding.
_TRIES = 2

app = typer.Typer()


class Target(NamedTuple):
    """Who, and to which port of theirs; 0: none."""

    who: str
    port: int


@command(app, "why")
def explain(
    place: Where,
    target: Annotated[
        str,
        typer.Argument(
            metavar="WHO[:PORT]", help="A name, a virtual IP or a peer id; [IPv6]:PORT.", show_default=False
        ),
    ],
    proto: str = option("", "--proto", "tcp, udp or icmp [tcp with a port, else icmp].", "PROTO"),
    as_json: JsonOption = False,
) -> None:
    """Say why packets to an address do not arrive: the step that stops them, what proves it, and the remedy.

    It asks the kernel, the node's processes and the peer itself, for some seconds; as root it also sends echo requests,
    and with a TCP port it connects. Exit code 0 when nothing stops or loses packets, else 1.
    """
    who, port = parse(target)
    name = proto or ("tcp" if port else "icmp")
    if name not in PROTOCOLS:
        raise ConfigError(f"--proto {name}: must be one of {', '.join(PROTOCOLS)}")
    settings = place.load("status", "p2p", "health").config
    within_s = settings.health.timeout + 2 * settings.status.timeout + settings.status.why_interval
    within_s += 2 * settings.p2p.dial_timeout + settings.p2p.handshake_timeout
    from msgspec import convert

    refuse_itself(read_status(settings), who)
    answer = ask(settings, "why", within_s, who=who, protocol=PROTOCOLS[name], port=port)
    walk = tried(settings, convert(answer, why.Walk), name, port)
    show(walk, as_json, lambda walk: render(walk, target))
    raise typer.Exit(1 if walk.cause else 0)


def parse(target: str) -> Target:
    """WHO, WHO:PORT, [IPv6]:PORT or an IPv6 address. Raises ConfigError."""
    try:
        ipaddress.ip_address(target)
    except ValueError:
        pass
    else:
        return Target(target, 0)
    who, colon, port = target.rpartition(":")
    if not colon:
        return Target(target, 0)
    if not port.isdecimal() or not 0 < int(port) < 1 << 16 or not who:
        raise ConfigError(f"{target}: what is behind the colon must be a port, 1 to 65535")
    return Target(who.removeprefix("[").removesuffix("]"), int(port))


# --- what only this command may do


def tried(settings: Config, walk: why.Walk, protocol: str, port: int) -> why.Walk:
    """The walk, with what echoes and connections show."""
    try:
        if walk.cause == "path" and walk.kind == "silent":
            return why.with_step(walk, _underlay(settings, walk))
        if walk.cause or not walk.address:
            return walk
        walk = why.with_step(walk, _echoes(settings, walk))
        if port and protocol == "tcp":
            walk = why.with_step(walk, _port(settings, walk, port))
    except VpndError as error:
        return why.with_step(walk, why.Step(name="echo", verdict=why.UNKNOWN, says=str(error)))
    return walk


def _underlay(settings: Config, walk: why.Walk) -> why.Step:
    """Whether the machine of a peer whose port is silent answers at all."""
    path = next(step for step in walk.steps if step.name == "path")
    endpoints = map(multiaddrs.parse, walk.multiaddrs)
    addresses = list(dict.fromkeys(each.host for each in endpoints if each.kind in ("ip4", "ip6")))
    for address in addresses:
        with EchoSocket(address, settings.health.timeout) as sock:
            if sock.measure(1).rtt_ms is not None:
                says = f"the machine at {address} answers pings, the TCP port of vpnd there does not: {path.says}"
                remedy = "a firewall, there or between, drops it: let the TCP port of its p2p.listen in"
                return _otherwise(path, says, remedy)
    if not addresses:
        return path
    says = f"nothing answers at {', '.join(addresses)}, not even pings: {path.says}"
    remedy = "is the machine on, and at this address? Or something between drops everything"
    return _otherwise(path, says, remedy)


def _otherwise(step: why.Step, says: str, remedy: str) -> why.Step:
    from msgspec.structs import replace

    return replace(step, says=says, remedy=remedy)


def _echoes(settings: Config, walk: why.Walk) -> why.Step:
    """A small echo and the largest, through the tunnel."""
    mtu = read_status(settings).tun.mtu
    largest = mtu - HEADER_BYTES[ipaddress.ip_address(walk.address).version]
    with EchoSocket(walk.address, settings.health.timeout, whole=True) as sock:
        small, large = (
            any(sock.measure(attempt, size).rtt_ms is not None for attempt in range(_TRIES))
            for size in (LEAST_BYTES, largest)
        )
    if small and large:
        return why.Step(name="echo", says=f"pings come back, up to {mtu} bytes")
    if small:
        says = f"small pings come back, those of {mtu} bytes, the MTU of the VPN, do not"
        return why.Step(
            name="echo",
            verdict=why.STOPS,
            says=says,
            remedy=f"vpnd ping {walk.name} --sweep finds what passes; set network.mtu to it, here and there",
        )
    says = f"the session answers, {walk.address} does not"
    remedy = f"a firewall, on {walk.name} or here, drops pings; other packets may pass"
    if walk.behind:
        remedy = f"does {walk.name} itself reach it (ping {walk.address} there)? Else {remedy}"
    return why.Step(name="echo", verdict=why.STOPS, says=says, remedy=remedy)


def _port(settings: Config, walk: why.Walk, port: int) -> why.Step:
    """Whether somebody listens there."""
    try:
        with socket.create_connection((walk.address, port), settings.health.timeout):
            return why.Step(name="port", says=f"TCP port {port} accepts connections")
    except ConnectionRefusedError:
        says, remedy = f"nothing listens on TCP port {port}", f"start the service on {walk.name}"
    except TimeoutError:
        says = f"TCP port {port} does not answer"
        remedy = f"a firewall on {walk.name} drops it (nft list ruleset): let it in on its TUN device"
    except OSError as error:
        says, remedy = f"TCP port {port}: {error.strerror}", f"see the firewall of {walk.name}"
    return why.Step(name="port", verdict=why.STOPS, says=says, remedy=remedy)


# --- for people


def render(walk: why.Walk, target: str) -> str:
    """A line for each step, and what it comes to."""
    width = max(len(step.name) for step in walk.steps)
    found = [each for each in (printable(walk.name), walk.address) if each and each != target]
    lines = [wrapped(f"{printable(target)}: {' '.join(found)}" if found else printable(target))]
    for step in walk.steps:
        mark = typer.style(f"{step.verdict:7}", fg=_COLOURS.get(step.verdict))
        proof = ", ".join(f"{name} {count:,}" for name, count in step.counters.items() if count)
        said = printable(step.says) + (f" [{printable(proof)}]" if proof and step.verdict != why.OK else "")
        begun = width + 2 + len(f"{step.verdict:7} ")
        lines.append(f"{step.name:{width}}  {mark} {wrapped(said, begun, begun)}")
    blamed = walk.blamed()
    if not walk.cause:
        lines += ["", "nothing was found that keeps packets from arriving"]
    else:
        lines += ["", wrapped(f"{blamed.name} {blamed.verdict} packets: {printable(blamed.says)}")]
        if blamed.remedy:
            lines.append(wrapped(f"remedy: {printable(blamed.remedy)}"))
    return "\n".join(lines)
