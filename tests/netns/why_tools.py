"""`vpnd why` on a node of the lab, without a process for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from lab import LabError, Node, wait_until

from vpnd import statusclient, why

#: Of a walk: what is silent is waited for.
PATIENCE_S = 60.0
SETTLE_S = 30.0


def walk(node: Node, who: str, protocol: int = 0, port: int = 0) -> why.Walk:
    """What the daemon finds."""
    path = Path(node.state_dir, "vpnd.sock")
    request = {"command": "why", "who": who, "protocol": protocol, "port": port}
    return msgspec.convert(statusclient.ask(path, request, PATIENCE_S), why.Walk)


def blamed(node: Node, who: str, cause: str, says: str = "") -> why.Step:
    """The step it blames, which is to be `cause`, and to say that, before long: a fault takes its time to show."""
    found = why.Walk()

    def seen() -> bool:
        nonlocal found
        found = walk(node, who)
        return found.cause == cause and says in found.blamed().says

    try:
        wait_until(seen, SETTLE_S, f"{cause} is blamed")
    except LabError:
        print(*(f"{step.name}: {step.verdict}: {step.says}" for step in found.steps), sep="\n")
        raise
    return found.blamed()


def peer_row(node: Node, name: str) -> dict[str, Any]:
    """What a node's status says of a peer."""
    return next((dict(peer) for peer in node.ask()["peers"] if peer["name"] == name), {})


def shard_pid(node: Node, index: int = 0) -> int:
    """The shard's process, 0 while there is none that is up."""
    shard = node.ask()["shards"][index]
    return int(shard["pid"]) if shard["state"] == "up" else 0
