"""What happens to real machines and networks, done to a namespace of the lab on purpose, and undone.

Only the link is touched (`DEVICE`): what applications send over a tunnel's own device is as it was.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

from .network import DEVICE, PREFIX_BITS, Lab, Namespace

#: Of each fault its own, so that several may be in one namespace.
_TABLES = (f"lab_fault{number}" for number in itertools.count())
#: Faces of the dice that decide of a packet.
_DICE = 10_000
#: What the kernel gives a veth (GSO_MAX_SEGS).
_GSO_MAX_SEGS = 65_535


@contextlib.contextmanager
def blackhole(lab: Lab, namespace: Namespace, other: Namespace | None = None) -> Iterator[None]:
    """Inside the block everything vanishes without an answer, both ways: what is from and for `other`, or all."""
    source, target = (f"ip saddr {other.address}", f"ip daddr {other.address}") if other else ("", "")
    with _filtered(lab, namespace, f"{source} drop", f"{target} drop"):
        yield


@contextlib.contextmanager
def narrow(lab: Lab, namespace: Namespace, most: int) -> Iterator[None]:
    """Inside the block IP packets longer than that vanish, both ways, without the word that TCP would need."""
    with _filtered(lab, namespace, f"ip length > {most} drop", f"ip length > {most} drop"):
        yield


@contextlib.contextmanager
def closed(lab: Lab, namespace: Namespace, port: int) -> Iterator[None]:
    """Inside the block nobody gets in at that TCP port; the way out is open."""
    with _filtered(lab, namespace, f"tcp dport {port} drop", "accept"):
        yield


@contextlib.contextmanager
def without_udp(lab: Lab, namespace: Namespace) -> Iterator[None]:
    """Inside the block a firewall lets no UDP in or out."""
    with _filtered(lab, namespace, "meta l4proto udp drop", "meta l4proto udp drop"):
        yield


@contextlib.contextmanager
def without_tcp(lab: Lab, *receivers: Namespace) -> Iterator[None]:
    """Inside the block no TCP comes to these namespaces, and nobody is told."""
    with contextlib.ExitStack() as stack:
        for namespace in receivers:
            stack.enter_context(_filtered(lab, namespace, "meta l4proto tcp drop", "accept"))
        yield


@contextlib.contextmanager
def reset_storm(lab: Lab, namespace: Namespace) -> Iterator[None]:
    """Inside the block every TCP segment, either way, is answered by a reset instead of being carried."""
    # The resets themselves pass, or nobody would ever get one.
    reject = "tcp flags & rst != rst reject with tcp reset"
    with _filtered(lab, namespace, reject, reject):
        yield


@contextlib.contextmanager
def lossy(lab: Lab, share: float) -> Iterator[None]:
    """Inside the block every namespace of the lab loses that share of the packets that come, at random. No packet is
    longer than on a real link, where one lost is not a whole superpacket."""
    unlucky = f"numgen random mod {_DICE} < {round(share * _DICE)} drop"
    with contextlib.ExitStack() as stack:
        for namespace in lab.nodes:
            lab.ip(namespace, "link", "set", "dev", DEVICE, "gso_max_segs", "1")
            stack.callback(
                lab.ip, namespace, "link", "set", "dev", DEVICE, "gso_max_segs", str(_GSO_MAX_SEGS)
            )
            # Where they come, not where they leave: there TCP would be told.
            stack.enter_context(_filtered(lab, namespace, unlucky, "accept"))
        yield


@contextlib.contextmanager
def _filtered(lab: Lab, namespace: Namespace, incoming: str, outgoing: str) -> Iterator[None]:
    table = next(_TABLES)
    rules = (
        f"add table ip {table};"
        f" add chain ip {table} incoming {{ type filter hook input priority -300 ; }};"
        f" add chain ip {table} outgoing {{ type filter hook output priority -300 ; }};"
        f" add rule ip {table} incoming iifname {DEVICE} {incoming};"
        f" add rule ip {table} outgoing oifname {DEVICE} {outgoing}"
    )
    lab.run(namespace, "nft", rules)
    try:
        yield
    finally:
        lab.run(namespace, "nft", f"delete table ip {table}")


def cut_connections(lab: Lab, namespace: Namespace, port: int) -> None:
    """Reset every TCP connection of the link from or to `port`, at both ends, as a firewall that has lost its
    state does."""
    ends = f"( sport = :{port} or dport = :{port} ) and src {namespace.address}"
    lab.run(namespace, "ss", "-K", "-Htn", "state", "established", ends, check=False)


def flap(lab: Lab, namespace: Namespace, *, times: int, seconds: float) -> None:
    """Take the link down and up again, so often, evenly spread over so long; it is up in the end."""
    for _ in range(times):
        for state in ("down", "up"):
            lab.ip(namespace, "link", "set", DEVICE, state)
            time.sleep(seconds / times / 2)


@contextlib.contextmanager
def moved(lab: Lab, namespace: Namespace, address: str, gap_s: float = 0.0) -> Iterator[float]:
    """Inside the block the namespace has another address on the link; the old one is gone `gap_s` before the new
    one comes. Gives the moment, of time.monotonic, at which the new one worked."""
    _readdress(lab, namespace, namespace.address, address, gap_s)
    try:
        yield time.monotonic()
    finally:
        _readdress(lab, namespace, address, namespace.address, 0.0)


def _readdress(lab: Lab, namespace: Namespace, old: str, new: str, gap_s: float) -> None:
    lab.ip(namespace, "addr", "del", f"{old}/{PREFIX_BITS}", "dev", DEVICE)
    time.sleep(gap_s)
    lab.ip(namespace, "addr", "add", f"{new}/{PREFIX_BITS}", "dev", DEVICE)
