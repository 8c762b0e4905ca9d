"""Whether nodes went through something unharmed: the books, and what their processes hold, before and after."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from .network import LabError, wait_until
from .node import Node
from .processes import own_pss_bytes
from .running import settled, wait_connected

#: What a node may hold more than before: in proportion, and for the noise of an allocator (bytes).
GROWTH = 0.10
NOISE_BYTES = 8 << 20
RECOVERED_S = 30.0


def children(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a node's processes by name: supervisor, control, shard 0 …"""
    shards = {f"shard {shard['index']}": shard for shard in status["shards"]}
    return {"supervisor": status["supervisor"], "control": status["control"], **shards}


def descriptors(node: Node) -> dict[str, int]:
    """Open descriptors by process, without those that belong to a session or a libp2p connection."""
    status = node.ask()
    counts = {}
    for name, row in children(status).items():
        try:
            count = len(os.listdir(f"/proc/{row['pid']}/fd"))
        except OSError:
            count = -1  # it ends just now
        counts[name] = count - row.get("sessions", 0) - (row.get("connections") or 0)
    return counts


def memory(node: Node) -> dict[str, int]:
    """Bytes of memory (PSS) by process."""
    return {name: own_pss_bytes(row["pid"]) for name, row in children(node.ask()).items() if row["pid"]}


class Ledger:
    """What the processes of a node hold now, to be compared with what they hold later."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.descriptors = descriptors(node)
        self.memory = memory(node)

    def compare(self, *, growth: float = GROWTH, timeout_s: float = RECOVERED_S) -> str:
        """Raises LabError when a process has more descriptors than then, or the node more memory than `growth`
        allows; both may take `timeout_s` to get back there. A line about it."""
        label, most = self.node.namespace.label, sum(self.memory.values()) * (1 + growth) + NOISE_BYTES
        opened, held = self.descriptors, self.memory

        def back() -> bool:
            nonlocal opened, held
            opened, held = descriptors(self.node), memory(self.node)
            few = all(0 < count <= self.descriptors.get(name, count) for name, count in opened.items())
            return few and sum(held.values()) <= most

        def line() -> str:
            return (
                f"{label}: descriptors {self.descriptors} -> {opened}, "
                f"MiB {_mebibytes(self.memory)} -> {_mebibytes(held)}"
            )

        try:
            wait_until(back, timeout_s, "all is back")
        except LabError as error:
            raise LabError(f"{error}: {line()}") from None
        return line()


def _mebibytes(memory: dict[str, int]) -> dict[str, float]:
    return {name: round(held / 2**20, 1) for name, held in memory.items()}


@contextlib.contextmanager
def unharmed(nodes: Sequence[Node], *, growth: float = GROWTH) -> Iterator[list[Ledger]]:
    """After the block the nodes find each other again, their books add up, and no process holds more than
    before. One that the block has restarted or ended as a whole is not to be among `nodes`."""
    ledgers = [Ledger(node) for node in nodes]
    yield ledgers
    wait_connected(nodes, RECOVERED_S)
    for ledger in ledgers:
        settled(ledger.node)
        print(ledger.compare(growth=growth))
