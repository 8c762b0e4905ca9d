"""Killing parts of a node, and choosing flows by the shard that carries them."""

from __future__ import annotations

import ipaddress
import os
import signal
from typing import Any

from lab import Node, wait_until
from lab.node import P2P_PORT as SESSION_PORT

from vpnd.packet import flow

__all__ = [
    "SESSION_PORT",
    "descriptors",
    "kill",
    "kill_shard",
    "peer_row",
    "shard_pid",
    "udp_port_of",
    "wait_restarted",
]

UDP = 17


def shard_pid(node: Node, index: int) -> int:
    """The shard's process, 0 while there is none that is up."""
    shard = node.ask()["shards"][index]
    return int(shard["pid"]) if shard["state"] == "up" else 0


def kill(pid: int) -> None:
    """kill -9."""
    os.kill(pid, signal.SIGKILL)


def kill_shard(node: Node, index: int) -> int:
    """Kill a shard once it is up; the pid it had."""
    pid = wait_until(lambda: shard_pid(node, index), 20, f"shard {index} is up")
    kill(pid)
    return int(pid)


def wait_restarted(node: Node, restarts: int, index: int | None = None, timeout_s: float = 20.0) -> None:
    """Wait until control, or shard `index`, was started again so often and is up."""

    def again() -> bool:
        status = node.ask()
        if not status:
            return False
        child = status["control"] if index is None else status["shards"][index]
        return child["restarts"] == restarts and child["state"] == "up"

    wait_until(again, timeout_s, f"restart number {restarts}")


def udp_port_of(ip: str, shard: int, shards: int) -> int:
    """A port whose datagrams to `ip` are carried by that shard of the sending node."""
    address = int(ipaddress.ip_address(ip))
    for port in range(20_000, 21_000):
        if flow.shard_of(address << 24 | UDP << 16 | port, range(shards)) == shard:
            return port
    raise AssertionError("no port hashes to that shard")


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def peer_row(node: Node, other: Node) -> dict[str, Any]:
    """What a node's status says of another node."""
    name = other.namespace.label
    return next((dict(peer) for peer in node.ask()["peers"] if peer["name"] == name), {})
