"""A child that was taken over, against the supervisor of a real node: what it can do is what the documentation says.

The test has duplicates of the child's own descriptors, and says and writes with them what the child would.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from attack_tools import ATTACK_S, arena, assert_unharmed, beside
from lab import Lab, Node, meanwhile, ping, wait_until
from lab.joining import machine

from vpnd import seccomp
from vpnd.api import messages
from vpnd.api.reports import OwnAddresses, PeerReport, PeerTraffic

pytestmark = pytest.mark.root

#: Linux asm-generic/unistd.h; Python has no name for it.
PIDFD_GETFD = 438
#: Time in which a node is whole again after it killed a child.
BACK_S = 20.0

_libc = ctypes.CDLL(None, use_errno=True)


def taken_from(pid: int, number: int) -> int:
    """A duplicate of another process's descriptor."""
    pidfd = os.pidfd_open(pid)
    try:
        fd: int = _libc.syscall(PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd
    finally:
        os.close(pidfd)


def numbers_of(pid: int, kind: str) -> list[int]:
    """The descriptors of a process that lead to something of that name."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if kind in os.readlink(link):
                found.append(int(link.name))
    return found


@contextlib.contextmanager
def voice_of(pid: int) -> Iterator[Callable[[messages.Message], None]]:
    """What sends a message to the supervisor as that child."""
    line = Path(f"/proc/{pid}/cmdline").read_bytes()
    number = int(line.rstrip(b"\0").split(b"\0")[-1])
    with socket.socket(fileno=taken_from(pid, number)) as channel:
        yield lambda message: channel.send(msgspec.msgpack.encode(message)) and None


def child(node: Node, index: int | None) -> dict[str, Any]:
    """The row of control, or of a shard."""
    status = node.ask()
    row: dict[str, Any] = status["control"] if index is None else status["shards"][index]
    return row


def comes_back(node: Node, before: dict[str, Any], index: int | None) -> None:
    """The child is killed and another one takes its place; the supervisor lives."""
    wait_until(
        lambda: child(node, index)["restarts"] > before["restarts"] and node.ask()["health"] == "healthy",
        BACK_S,
        f"the node is whole again: {node.log_tail()}",
    )


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with arena(
        2,
        process={"watchdog": "3s"},
        status={"timeout": "1s"},
        metrics={"listen": "127.0.0.1:9586"},
    ) as nodes:
        yield nodes


KINDS = {"vpnd.control", "shards", "vpnd.relay", "vpnd.exporter", "vpnd.nursery"}


def children(node: Node) -> dict[str, psutil.Process]:
    """One of each kind, by module; the janitor is a shell, and of root."""
    found = {}
    for process in psutil.Process(node.ask()["supervisor"]["pid"]).children():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if "-m" in line:
                found[line[3]] = process
    return found


def with_all_kinds(node: Node) -> dict[str, psutil.Process]:
    """Its children, when it has started a relay too."""
    with voice_of(child(node, None)["pid"]) as say:
        say(messages.RelayWanted())
    wait_until(lambda: children(node).keys() == KINDS, BACK_S, "all kinds of children are there")
    return children(node)


def test_no_child_of_a_node_has_rights_left(nodes: list[Node]) -> None:
    a, _ = nodes
    status = a.ask()
    assert status["control"]["confined"] and all(shard["confined"] for shard in status["shards"])
    for kind, process in with_all_kinds(a).items():
        wait_until(lambda process=process: seccomp.holds(process.pid), BACK_S, f"{kind} is confined")
        rights = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert "0" not in (rights["Uid"] + "\t" + rights["Gid"]).split() and not rights["Groups"].strip()
        assert {rights[each] for each in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {"0" * 16}
        assert rights["NoNewPrivs"] == "1"


PEERS = tuple(PeerReport(name=f"n{number}", peer_id=f"{number:052}") for number in range(600))
FLOODS = {
    "small answers of a shard": (0, messages.ShardStatus(serial=1, sessions=(), traffic=())),
    "large answers of a shard": (
        0,
        messages.ShardStatus(
            serial=1,
            sessions=(),
            traffic=tuple(PeerTraffic(peer_id=f"{number:052}") for number in range(1500)),
        ),
    ),
    "large answers of control": (
        None,
        messages.ControlStatus(serial=1, listen=(), peers=PEERS, connections=0),
    ),
}


@pytest.mark.alone  # round trips are compared
@pytest.mark.parametrize("kind", list(FLOODS))
def test_a_flood_on_a_childs_channel_costs_packets_little(nodes: list[Node], kind: str) -> None:
    a, b = nodes
    index, message = FLOODS[kind]
    before = child(a, index)

    def flood(over: threading.Event) -> None:
        with voice_of(before["pid"]) as say:
            while not over.is_set():
                try:
                    say(message)
                except BlockingIOError:
                    time.sleep(0.0005)

    with beside(a, b) as during, meanwhile(flood):
        time.sleep(ATTACK_S)
    print(kind, during.before, during.beside)
    assert_unharmed(during)
    wait_until(lambda: a.ask().get("health") == "healthy", BACK_S, "the node is well")
    assert child(a, index)["restarts"] == before["restarts"], "all of it was permitted"


MALFORMED = {
    "an answer to no question": (0, messages.ShardStatus(serial=10**9, sessions=(), traffic=())),
    "a count of 2^64-1": (
        0,
        messages.ShardStatus(
            serial=1, sessions=(), traffic=(PeerTraffic(peer_id="x", bytes_sent=2**64 - 1),)
        ),
    ),
    "a count of control": (
        None,
        messages.ControlStatus(
            serial=1, listen=(), peers=(PeerReport(peer_id="x", dials=2**64 - 1),), connections=0
        ),
    ),
    "a message of another child": (0, messages.RoutesKnown(routes=("0.0.0.0/0",))),
    "routes of a node without a network": (None, messages.RoutesKnown(routes=("0.0.0.0/0",))),
    "a malformed route": (None, messages.RoutesKnown(routes=("not a network",))),
    "addresses of a node without a network": (
        None,
        messages.OwnChanged(
            own=OwnAddresses(network="n", label="l", addresses=("9.9.9.9",), subnets=("9.9.9.0/24",))
        ),
    ),
}


@pytest.mark.parametrize("what", list(MALFORMED))
def test_what_no_honest_child_says_ends_the_child_and_nothing_else(nodes: list[Node], what: str) -> None:
    a, b = nodes
    index, message = MALFORMED[what]
    before = child(a, index)
    with voice_of(before["pid"]) as say:
        say(message)
    comes_back(a, before, index)
    assert ping(a.lab, a.namespace, b.virtual_ip, 10, 0.05).loss < 1
    assert "9.9.9.9" not in a.lab.ip(a.namespace, "address")
    assert "default" not in a.lab.ip(a.namespace, "route", "show", "dev", "vpnd0")


def test_a_full_wake_up_of_a_shard_does_not_end_the_node(nodes: list[Node]) -> None:
    a, b = nodes
    pid = child(a, 0)["pid"]
    for number in numbers_of(pid, "[eventfd]"):
        fd = taken_from(pid, number)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(fd, 2**64 - 2)
        os.close(fd)
    for _ in range(3):
        assert ping(a.lab, a.namespace, b.virtual_ip, 20, 0.01).loss < 1
    assert a.ask()["health"] == "healthy"


def test_counters_of_nonsense_do_not_break_the_status(nodes: list[Node]) -> None:
    a, _ = nodes
    before = child(a, 0)
    supervisor = a.ask()["supervisor"]["pid"]
    pages = numbers_of(supervisor, "vpnd-counters-0")
    fd = taken_from(supervisor, pages[0])
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)  # what is read there next would be a SIGBUS
    with mmap.mmap(fd, mmap.PAGESIZE) as page:
        page[:] = b"\xff" * mmap.PAGESIZE
    os.close(fd)
    status = a.ask()
    assert status["shards"][0]["packets_sent"] < 2**53 and status["books"]
    os.kill(before["pid"], signal.SIGKILL)
    comes_back(a, before, 0)
    assert a.ask()["shards"][0]["packets_sent"] < 2**32


@pytest.mark.setting("process.watchdog")
@pytest.mark.parametrize("index", [0, None], ids=["a shard", "control"])
def test_a_child_that_hangs_is_noticed_killed_and_started_again(nodes: list[Node], index: int | None) -> None:
    a, b = nodes
    before = child(a, index)
    os.kill(before["pid"], signal.SIGSTOP)
    stopped_s = time.monotonic()
    wait_until(lambda: child(a, index)["state"] == "hung", 3.0, "it is named")
    named_s = time.monotonic() - stopped_s
    status = a.ask()
    assert status["health"] != "healthy" and any("hung" in each["what"] for each in status["ailments"])
    comes_back(a, before, index)
    print(f"named after {named_s:.2f} s, whole again after {time.monotonic() - stopped_s:.2f} s")
    assert ping(a.lab, a.namespace, b.virtual_ip, 10, 0.05).loss < 1
    assert "has hung for 3 s" in a.log_file.read_text()


def test_a_relay_and_an_exporter_that_hang_are_killed_and_started_again(nodes: list[Node]) -> None:
    a, _ = nodes
    kinds = ("vpnd.relay", "vpnd.exporter")
    hanging = {kind: with_all_kinds(a)[kind] for kind in kinds}
    for process in hanging.values():
        process.suspend()

    def others() -> bool:
        found = children(a)
        return all(kind in found and found[kind] != hanging[kind] for kind in kinds)

    wait_until(others, BACK_S, "others are in their places")
    assert a.log_file.read_text().count("has hung for 3 s") >= len(kinds)


def test_control_of_a_member_cannot_route_or_own_what_the_configuration_does_not_allow() -> None:
    with Lab(2) as lab:
        node = machine(lab, 0)
        node.start()
        node.wait_ready()
        own = node.ask()["node"]["addresses"]
        subnets = tuple(node.lab.ip(node.namespace, "route", "show", "dev", "vpnd0").split()[:1])
        before = child(node, None)
        with voice_of(before["pid"]) as say:
            say(messages.RoutesKnown(routes=("0.0.0.0/0", "0.0.0.0/1", "::/0", "10.9.0.0/24"), exit_peer="x"))
        wait_until(
            lambda: "10.9.0.0/24" in lab.ip(node.namespace, "route", "show", "table", "all"), 5, "routed"
        )
        table = lab.ip(node.namespace, "route", "show", "table", "all")
        assert "default dev vpnd0" not in table and "0.0.0.0/1" not in table and "unreachable" not in table
        assert any("0.0.0.0/0" in line for line in node.ask()["node"]["warnings"])
        for addresses, networks in (
            (("192.0.2.1",), ("192.0.2.0/24",)),
            (("192.0.2.1",), subnets),
            (("junk",), subnets),
        ):
            before = child(node, None)
            claim = OwnAddresses(network="home", label="x", addresses=addresses, subnets=networks)
            with voice_of(before["pid"]) as say:
                say(messages.OwnChanged(own=claim))
            wait_until(lambda: child(node, None)["restarts"] > before["restarts"], 10, "it is killed")  # noqa: B023
            wait_until(lambda: node.ask()["ready"], BACK_S, "it is back")
        assert node.ask()["node"]["addresses"] == own
        assert "192.0.2.1" not in lab.ip(node.namespace, "address")
