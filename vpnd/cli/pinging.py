"""`vpnd ping`: round trips through the tunnel, each beside that of the session in it.

An echo request goes through the TUN device to the peer's virtual IP (vpnd/cli/echo.py). Then the daemon is asked which
session carries this flow, and measures it (supervisor/requests.py); the rest of the way is in the two nodes and their
kernels. Without a session that answers, the controls' libp2p connection tells whether the peer's daemon is there.
"""

from __future__ import annotations

import ipaddress
import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import typer

from vpnd.cli.command import (
    JsonOption,
    Where,
    WhoArgument,
    ask,
    ask_control,
    canonical,
    command,
    option,
    read_status,
    refuse_itself,
    show,
)
from vpnd.cli.echo import HEADER_BYTES, LEAST_BYTES, MOST_BYTES, Echo, EchoSocket, source_of
from vpnd.config.schema import Config
from vpnd.errors import ConfigError, VpndError

if TYPE_CHECKING:
    from vpnd.status import Peer, Status

Fields = dict[str, Any]


class Target(NamedTuple):
    """Whom, at which of its virtual addresses; `elsewhere` says so where this machine's packets to it do not go through
    the device of the VPN. `mtu`: that device's."""

    name: str
    peer_id: str
    address: str
    mtu: int
    elsewhere: str


app = typer.Typer()


@command(app)
def ping(
    place: Where,
    who: WhoArgument,
    count: int = option(4, "--count", "How many times.", "N", short="-c", min=1),
    interval: float = option(1.0, "--interval", "Seconds from one to the next.", "S", short="-i", min=0.0),
    size: int = option(
        56, "--size", "Data in each, as of ping -s.", "BYTES", short="-s", min=LEAST_BYTES, max=MOST_BYTES
    ),
    sweep: bool = option(False, "--sweep", "Find the largest packet that comes through whole."),
    ipv6: bool = option(False, "--ipv6", "The peer's IPv6 address, not its IPv4.", short="-6"),
    as_json: JsonOption = False,
) -> None:
    """Measure the round trip to a node through the tunnel, and which part of it is the session's.

    The first number is an ICMP echo to its virtual IP and back, sent as any program sends: both kernels, both nodes and
    the network. The session's is from this node's shard to that node's and back: the network and two processes. The
    difference is what both nodes take. Without a session it says why, and whether the other daemon answers. Each answer
    may take health.timeout; Ctrl-C ends it with what there is. Needs root. Exit code 1 when no echo came back, or, with
    --sweep, when not all packets that the VPN takes come through.
    """
    settings = place.load("status", "health").config
    from vpnd.cli import pingview

    target = _target(place, settings, who, ipv6)
    if sweep:
        _sweep(target, settings.health.timeout, as_json=as_json)
    trips: list[Fields] = []
    besides: Fields = {}
    try:
        if target.elsewhere and not as_json:
            typer.echo(f"note: {target.elsewhere}")
        for trip in _measured(settings, target, count, interval, size):
            before = trips[-1] if trips else None
            trips.append(trip)  # what is seen counts, however soon Ctrl-C follows
            if not as_json:
                typer.echo(pingview.trip(target.name, target.address, trip, before))
        if not pingview.session_answers(trips[-1]):
            besides = _elsewhere(place, settings, target)
    except KeyboardInterrupt:
        pass  # what there is until now is summed up
    who_it_is = {
        "name": target.name,
        "peer_id": target.peer_id,
        "address": target.address,
        "elsewhere": target.elsewhere,
    }
    result: Fields = {**who_it_is, **pingview.sums(trips), "pings": trips, **besides}
    show(result, as_json, pingview.summary)
    raise typer.Exit(0 if result["received"] else 1)


def _sweep(target: Target, timeout_s: float, *, as_json: bool) -> NoReturn:
    """Print the largest packet that comes back, and end: exit code 0 when it is as large as the device takes."""
    from vpnd.cli import pingview

    headers = HEADER_BYTES[ipaddress.ip_address(target.address).version]
    tries = itertools.count(1)
    with EchoSocket(target.address, timeout_s, whole=True) as sock:

        def passes(packet: int) -> bool:
            # twice: one may be lost for other reasons
            return any(sock.measure(next(tries), packet - headers).rtt_ms is not None for _ in range(2))

        largest = largest_that(passes, headers + LEAST_BYTES, target.mtu)
    result = {"name": target.name, "address": target.address, "largest": largest, "mtu": target.mtu}
    show(result, as_json, pingview.swept)
    raise typer.Exit(0 if largest == target.mtu else 1)


def largest_that(passes: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number from `least` to `most` that passes, if all below it do; 0 when not even `least` does."""
    if not passes(least):
        return 0
    if passes(most):
        return most
    while most - least > 1:
        middle = (least + most) // 2
        if passes(middle):
            least = middle
        else:
            most = middle
    return least


def _measured(settings: Config, target: Target, count: int, interval_s: float, size: int) -> Iterator[Fields]:
    """One after another; a trip is what pingview shows."""

    echo_s = settings.health.timeout
    # the shard takes up to health.timeout, the supervisor waits status.timeout longer for it
    within_s = echo_s + 2 * settings.status.timeout
    with EchoSocket(target.address, echo_s) as sock:
        for seq in range(1, count + 1):
            begun_s = time.monotonic()
            echo = sock.measure(seq, size)
            probe = ask(settings, "probe", within_s, address=target.address)
            yield _trip(seq, echo, probe)
            if seq < count:
                time.sleep(max(0.0, begun_s + interval_s - time.monotonic()))


def _trip(seq: int, echo: Echo, probe: Fields) -> Fields:
    nodes_ms = None
    session_ms = (probe.get("session") or {}).get("rtt_ms")
    if echo.rtt_ms is not None and session_ms is not None:
        # two measurements, one after the other: the second may have met the busier moment
        nodes_ms = max(0.0, echo.rtt_ms - session_ms)
    return {
        "seq": seq,
        **echo._asdict(),
        "nodes_ms": nodes_ms,
        "shard": probe.get("shard"),
        "session": probe.get("session"),
        "session_why": probe.get("why", ""),
    }


# --- who that is


def _target(place: Where, settings: Config, who: str, ipv6: bool) -> Target:
    """Raises ConfigError for somebody who cannot be pinged from here."""
    status = read_status(settings)
    ours = status.node.addresses
    refuse_itself(status, who)
    peer = _peer(place, status, who)
    addresses = peer.virtual_ips
    if ipv6:
        fitting = [each for each in addresses if ":" in each]
    else:
        # the one that was named, else IPv4 first
        fitting = sorted(addresses, key=lambda each: (each != canonical(who), ":" in each))
    if not fitting:
        raise ConfigError(f"{who} has no {'IPv6 ' if ipv6 else ''}address in the VPN; see vpnd peers")
    address = fitting[0]
    own = tuple(each for each in ours if (":" in each) == (":" in address))
    if not own:
        why = f"{address} cannot be reached from {' '.join(ours)}: this node has no such address"
        raise ConfigError(f"{why}; ping its other one (vpnd peers)")
    interface = status.tun.interface
    source = source_of(address, interface, own, status.supervisor.pid)
    elsewhere = (
        ""
        if source in own
        else (
            f"this machine sends to {address} from {source}, not through {interface}: see ip route get {address}"
        )
    )
    return Target(
        name=peer.name or peer.peer_id,
        peer_id=peer.peer_id,
        address=address,
        mtu=status.tun.mtu,
        elsewhere=elsewhere,
    )


def _peer(place: Where, status: Status, who: str) -> Peer:
    """By what status tells, which works without control; else by what control finds: other spellings of names, and
    members that did not fit into status."""
    wanted = {who, canonical(who)}
    for peer in status.peers:
        if wanted & {peer.name, peer.peer_id, *peer.virtual_ips}:
            return peer
    found: Fields = ask_control(place, "resolve", what=who)
    if not found.get("peer_id"):
        raise ConfigError(f"{who} is no peer of this node; see vpnd peers")
    from vpnd.status import Peer

    unknown = Peer(name=found["name"], peer_id=found["peer_id"], virtual_ips=tuple(found["virtual_ips"]))
    return next((peer for peer in status.peers if peer.peer_id == found["peer_id"]), unknown)


# --- when the tunnel does not answer


def _elsewhere(place: Where, settings: Config, target: Target) -> Fields:
    """What is known of the peer besides: how it is by status, and whether its control answers ours."""
    peer = next((peer for peer in read_status(settings).peers if peer.peer_id == target.peer_id), None)
    try:
        (control,) = ask_control(place, "ping", who=target.peer_id, count=1)
    except VpndError as error:
        control = {"rtt_ms": None, "error": str(error), "asked": False}
    return {"peer": peer, "control": control}
