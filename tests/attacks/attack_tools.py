"""What attacks are made of: real nodes, honest members' ping beside the attack, and strangers.

    with arena(3) as (a, b, c), beside(a, b) as during:      ping from a to b, before and within the block
        …
    assert_unharmed(during)

Long variants run with VPND_LONG_TESTS=1.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from lab import (
    Lab,
    Namespace,
    Node,
    Ping,
    check_logs,
    inside,
    meanwhile,
    mesh_of_nodes,
    ping,
    socket_in,
    wait_connected,
)
from lab.node import P2P_PORT
from lab.processes import ran_and_waited
from lab.stranger import NOISE, Payload, Plain, Secured, honest
from libp2p.utils.varint import encode_uvarint

from shards.stream import spec, yamux

LONG = bool(os.environ.get("VPND_LONG_TESTS"))
#: How long an attack goes on beside the ping.
ATTACK_S = 20.0 if LONG else 3.0
#: By how much honest members' round trips may grow on average while somebody attacks.
SLOWER_MS = 2.0
#: Who is not let in for so long is kept out.
KEPT_OUT_S = 10.0
PING_INTERVAL_S = 0.01
#: How often it is looked how long processes have waited; and over how many looks, what they had of a CPU: within a
#: second Linux gives others their part, and then nobody seems to have had too much.
LOOK_S, LOOKS = 0.02, 25
FRAME_BYTES = 1 << 14
FIRST_WORD = b"\x13/multistream/1.0.0\n"


@contextlib.contextmanager
def arena(nodes: int = 3, **settings: dict[str, Any]) -> Iterator[list[Node]]:
    """Connected nodes, and one more namespace, the last of `lab.nodes`, for strangers."""
    with Lab(nodes + 1) as lab:
        found = mesh_of_nodes(lab, shards=2, settings=settings)
        members, stranger = found[:nodes], found[nodes]
        for node in members:
            node.config["peers"] = [
                peer for peer in node.config["peers"] if peer["peer_id"] != stranger.peer_id()
            ]
            node.start()
        wait_connected(members)
        yield members
        check_logs(members)


class During:
    """Round trips of honest members before an attack and beside it. Of the processes on their way meanwhile,
    `waited_ms`: the longest that they had to wait for a CPU at once; `share`: of a CPU, that
    the busiest had for half a second."""

    def __init__(self, before: Ping) -> None:
        self.before = before
        self.beside: Ping | None = None
        self.waited_ms = self.share = 0.0


@contextlib.contextmanager
def beside(source: Node, target: Node, seconds: float = ATTACK_S, address: str = "") -> Iterator[During]:
    """Ping from one member to another, first undisturbed, then beside the block, which lasts as long as that.

    `address`: of the target, where its configuration does not tell it.
    """
    lab, count, address = source.lab, int(seconds / PING_INTERVAL_S), address or target.virtual_ip
    during = During(ping(lab, source.namespace, address, count, PING_INTERVAL_S, urgent=True))

    pids = [pid for node in (source, target) for pid in carriers(node)]

    def watch(over: threading.Event) -> None:
        looks = deque([(time.monotonic(), [ran_and_waited(pid) for pid in pids])], LOOKS)
        while not over.wait(LOOK_S):
            last, now = looks[-1][1], [ran_and_waited(pid) for pid in pids]
            longest_s = max(later[1] - before[1] for later, before in zip(now, last, strict=True))
            during.waited_ms = max(during.waited_ms, longest_s * 1000)
            looks.append((time.monotonic(), now))
            begun_s, first = looks[0]
            if len(looks) == LOOKS:
                most_s = max(later[0] - before[0] for later, before in zip(now, first, strict=True))
                during.share = max(during.share, most_s / (looks[-1][0] - begun_s))

    def run() -> None:
        with meanwhile(watch):
            during.beside = ping(lab, source.namespace, address, count, PING_INTERVAL_S, urgent=True)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield during
    finally:
        thread.join()


def carriers(node: Node) -> list[int]:
    """The processes that a node's packets go through."""
    status = node.ask()
    return [status["supervisor"]["pid"], *(shard["pid"] for shard in status["shards"])]


def assert_unharmed(during: During) -> None:
    """What every attack leaves to honest members: all their packets, in time."""
    before, beside = during.before, during.beside
    assert beside is not None
    print(f"{beside} beside the attack, {before} without")
    print(f"waited {during.waited_ms:.1f} ms at most for a CPU, and had {during.share:.0%} of one")
    assert beside.loss == 0, f"lost {beside.loss:.1%}"
    assert beside.avg_ms <= before.avg_ms + SLOWER_MS


def stranger_of(node: Node) -> Namespace:
    """Where strangers are."""
    return node.lab.nodes[-1]


def counter(node: Node, name: str) -> int:
    """A counter of control."""
    return int(node.ask()["control"]["counters"].get(name, 0))


def dialed(source: Namespace, node: Node) -> socket.socket:
    """A TCP connection to where a node listens."""
    sock = socket_in(source, node.namespace.address, socket.SOCK_STREAM)
    sock.connect((node.namespace.address, P2P_PORT))
    return sock


def strike(source: Namespace, node: Node, payload: Payload) -> socket.socket:
    """Dial a node and say all of a handshake with that payload; the connection is the caller's."""
    sock = dialed(source, node)
    Plain(sock).select(NOISE)
    Secured(sock, payload, initiator=True)
    return sock


def knock(source: Namespace, node: Node, key: Ed25519PrivateKey | None = None) -> float:
    """The seconds it takes a node to hang up on an honest stranger: as long as its control needs for anybody."""
    start = time.monotonic()
    with strike(source, node, honest(key or Ed25519PrivateKey.generate())) as sock:
        try:
            while sock.recv(4096):
                pass
        except ConnectionError:
            pass
    return time.monotonic() - start


@contextlib.contextmanager
def connect_flood(source: Namespace, node: Node, rate_hz: int, open_at_once: int = 2000) -> Iterator[None]:
    """Connections to a node, so many a second, that say nothing or no more than their first word."""

    def run(over: threading.Event) -> None:
        held: deque[socket.socket] = deque()
        behind = rate_hz // 10  # those have been accepted by now
        start = time.monotonic()
        with inside(source):
            for number in itertools.count():
                if over.is_set():
                    break
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex((node.namespace.address, P2P_PORT))
                held.append(sock)
                if number % 2 and len(held) > behind:
                    with contextlib.suppress(OSError):
                        held[-behind].send(FIRST_WORD)
                if len(held) > open_at_once:
                    held.popleft().close()
                time.sleep(max(0.0, start + number / rate_hz - time.monotonic()))
        for sock in held:
            sock.close()

    with meanwhile(run):
        yield


def closed_at_once(node: Node) -> int:
    """Connections that a node would not have, or not any longer."""
    return counter(node, "refused_connect_rate") + counter(node, "refused_handshake_limit")


def never_accepted(node: Node) -> int:
    """Connections that the kernel has dropped where the node is, because it did not accept those before."""
    text = Path(f"/proc/{node.ask()['control']['pid']}/net/netstat").read_text()
    names, values = (line.split() for line in text.splitlines() if line.startswith("TcpExt:"))
    return int(dict(zip(names, values, strict=True))["ListenDrops"])


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """The CPUs have something else to do as well."""
    command = (sys.executable, "-c", "while True: pass")
    programs = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


class Far(socket.socket):
    """A connection whose answers are on their way for `round_trip_s`, where the kernel cannot delay packets."""

    round_trip_s = 0.0
    _asked = False

    def sendall(self, data: Any, flags: int = 0) -> None:
        super().sendall(data, flags)
        self._asked = True

    def recv(self, count: int, flags: int = 0) -> bytes:
        if self._asked:
            time.sleep(self.round_trip_s)
            self._asked = False
        return super().recv(count, flags)


def say(member: Secured, stream_id: int, protocol: str, message: bytes) -> None:
    """On a libp2p connection with Yamux: open a stream and say one message of a protocol, preceded by its length,
    without waiting for an answer."""
    lines = ("/multistream/1.0.0", protocol)
    data = b"".join(bytes([len(line) + 1]) + line.encode() + b"\n" for line in lines)
    data += encode_uvarint(len(message)) + message
    member.send(yamux.window_update(stream_id, 0, spec.FLAG_SYN))
    for at in range(0, len(data), FRAME_BYTES):
        member.send(yamux.data_frame(stream_id, data[at : at + FRAME_BYTES]))


def come_in(source: Namespace, node: Node, key: Ed25519PrivateKey, round_trip_s: float = 0.0) -> float:
    """The seconds it takes a member, so far away, to get a connection with streams. Raises Refused."""
    start = time.monotonic()
    with Far(fileno=dialed(source, node).detach()) as sock:
        sock.settimeout(KEPT_OUT_S)
        sock.round_trip_s = round_trip_s
        Plain(sock).select(NOISE)
        Secured(sock, honest(key), initiator=True).select("/yamux/1.0.0")
    return time.monotonic() - start
