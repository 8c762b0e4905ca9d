"""Nodes of a network: one makes it, the others join by token."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .network import Lab, LabError, wait_until
from .node import P2P_PORT, Node
from .traffic import wait_for_answer

JOIN_S = 20.0


def machine(lab: Lab, place: int, settings: Mapping[str, Mapping[str, Any]] | None = None) -> Node:
    """A node in the lab's namespace `place` as it comes: no peers, no address, its name and where it listens."""
    namespace = lab.nodes[place]
    node = Node(lab, namespace)
    node.config = {
        "node": {"name": namespace.label},
        "p2p": {"listen": [f"/ip4/{namespace.address}/tcp/{P2P_PORT}"]},
        "worker": {"shards": 1},
    }
    for table, keys in (settings or {}).items():
        node.config.setdefault(table, {}).update(keys)
    return node


def invite(authority: Node, *words: str) -> str:
    """`vpnd invite` on an authority: the token. Raises LabError."""
    token = authority.vpnd("invite", *words).stdout.strip()
    if not token:
        raise LabError("vpnd invite printed no token")
    return token


def join(authority: Node, node: Node, *words: str) -> float:
    """Let `node` in by a new token and wait until it is ready; how many seconds that took from its start on."""
    token = invite(authority, *words)
    begun_s = time.monotonic()
    node.start("--join", token)
    node.wait_ready(JOIN_S)
    return time.monotonic() - begun_s


def network_of(lab: Lab, settings: Mapping[str, Mapping[str, Any]] | None = None) -> list[Node]:
    """A node in each namespace, all running, in a network that the first one made."""
    nodes = [machine(lab, place, settings) for place in range(len(lab.nodes))]
    nodes[0].start()
    nodes[0].wait_ready(JOIN_S)
    for node in nodes[1:]:
        join(nodes[0], node)
    return nodes


def address(node: Node) -> str:
    """The virtual IPv4 address a running node was given."""
    return str(node.ask()["node"]["virtual_ip"])


def all_reach_all(nodes: Sequence[Node], timeout_s: float) -> None:
    """Wait until each answers each other's ping, at every virtual address. Raises LabError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    for one, other in itertools.permutations(nodes, 2):
        for virtual in other.ask()["node"]["addresses"]:
            left_s = max(0.0, deadline - time.monotonic())
            wait_for_answer(one.lab, one.namespace, virtual, left_s)


def standing(node: Node) -> str:
    """What a running node is in its network: member, removed, expired; empty while it does not say."""
    return str((node.ask().get("network") or {}).get("state", ""))


def wait_standing(node: Node, state: str, timeout_s: float) -> None:
    """Wait until it is that."""
    wait_until(lambda: standing(node) == state, timeout_s, f"{node.namespace.label} is {state}")
