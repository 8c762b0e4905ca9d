"""Nodes that run for the length of a block, checked at its end: they stop cleanly, said nothing bad, left nothing."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .network import Lab, LabError, wait_until
from .node import Node, mesh_of_nodes

CONNECT_S = 15.0
SETTLE_S = 10.0
#: What no node may ever print: an exception nobody expected, or a loop that complains of its own.
_BAD = re.compile(r"Traceback|never retrieved|was never awaited|Task was destroyed|Exception ignored")


@contextlib.contextmanager
def running_nodes(
    count: int = 2,
    *,
    shards: int = 2,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    change: Callable[[list[Node]], object] | None = None,
) -> Iterator[list[Node]]:
    """A lab with `count` connected nodes. `change` may alter their configurations before they start.

    At the end of the block each must stop with 0 (one that the block ended is left alone) and leave nothing.
    """
    with Lab(count) as lab:
        nodes = mesh_of_nodes(lab, shards=shards, settings=settings)
        if change:
            change(nodes)
        try:
            for node in nodes:
                node.start()
            wait_connected(nodes)
            yield nodes
            check_logs(nodes)
            for node in nodes:
                if node.pids() and (code := node.stop()):
                    raise LabError(f"node {node.namespace.label} stopped with {code}")
            check_logs(nodes)
            wait_until(lambda: not lab.leaks(), SETTLE_S, f"nothing is left, but: {lab.leaks()}")
        except BaseException:
            for node in nodes:
                print(f"--- {node.namespace.label}: {_in_short(node)}\n{node.log_tail(40)}", file=sys.stderr)
            raise


def wait_connected(nodes: Sequence[Node], timeout_s: float = CONNECT_S) -> None:
    """Wait until every shard of every node has a session with every other node."""
    for node in nodes:
        node.wait_ready()
        wait_until(lambda node=node: connected(node), timeout_s, f"{node.namespace.label} is connected")


def connected(node: Node) -> bool:
    """Whether a running node has all its sessions, and no child is being started again."""
    status = node.ask()
    if not status.get("ready"):
        return False
    peers = status["peers"]
    return all(peer["state"] == "connected" for peer in peers) and all(
        shard["sessions"] >= len(peers) and shard["streams"] >= len(peers) for shard in status["shards"]
    )


def settled(node: Node, timeout_s: float = SETTLE_S) -> dict[str, Any]:
    """The node's status once its books add up, which they do when nothing moves."""
    status: dict[str, Any] = {}

    def add_up() -> bool:
        nonlocal status
        status = node.ask()
        books = status.get("books") or {}
        return bool(books) and not books["out"]["difference"] and not books["in"]["difference"]

    try:
        wait_until(add_up, timeout_s, "the books add up")
    except LabError as error:
        raise LabError(f"{error}: {status.get('books')} {drops(status)}") from None
    return status


def drops(status: Mapping[str, Any]) -> dict[str, int]:
    """What was dropped, without zeros, and without the machine's own multicast."""
    dropped = status.get("dropped", {})
    return {reason: count for reason, count in dropped.items() if count and reason != "not_unicast"}


def _in_short(node: Node) -> str:
    """What became of a node's packets, as far as it can still say."""
    status = node.ask()
    return f"books {status.get('books')}, dropped {drops(status)}" if status else "no status"


def check_logs(nodes: Sequence[Node]) -> None:
    """Raise LabError when a node printed what it never should."""
    for node in nodes:
        text = node.log_file.read_text(errors="replace") if node.log_file.exists() else ""
        if found := _BAD.search(text):
            raise LabError(f"{node.namespace.label} said: {text[max(0, found.start() - 500) :][:3000]}")
