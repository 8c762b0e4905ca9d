"""Faults in a seeded order, and what the nodes hold while they happen. The load and the verdict are the test's."""

from __future__ import annotations

import collections
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence

from lab import Node, blackhole, children, cut_connections, flap, own_pss_bytes, wait_until
from lab.node import P2P_PORT

SHARDS = 2
#: Between one fault and the next.
PAUSE_S = (1.0, 4.0)
BLACKHOLE_S = 3.0
ROTATED_AGE = "1s"
SAMPLE_S = 1.0


class Chaos:
    """Does one harm after the other to nodes. `done` counts them by name. Owner: one thread."""

    def __init__(self, nodes: Sequence[Node], seed: int) -> None:
        self._nodes = nodes
        self._random = random.Random(seed)
        self.done: collections.Counter[str] = collections.Counter()
        self.refused: list[str] = []
        self._faults: tuple[Callable[[Node], object], ...] = (
            self._kill_shard,
            self._kill_control,
            self._blackhole,
            self._flap,
            self._scale,
            self._rotate,
            self._cut,
        )

    def run(self, until_s: float) -> None:
        """Go on until that moment of time.monotonic, then put settings and shards back to what they were."""
        while time.monotonic() < until_s:
            fault = self._random.choice(self._faults)
            node = self._random.choice(self._nodes)
            pause_s = self._random.uniform(*PAUSE_S)
            fault(node)
            self.done[fault.__name__.lstrip("_")] += 1
            time.sleep(min(pause_s, max(0.0, until_s - time.monotonic())))
        for node in self._nodes:
            wait_until(lambda node=node: self._scaled(node, SHARDS), 20, "shards are as many as before")
            self._set_age(node, "")

    def _kill_shard(self, node: Node) -> None:
        shards = node.ask()["shards"]
        _kill(self._random.choice(shards)["pid"])

    def _kill_control(self, node: Node) -> None:
        _kill(node.ask()["control"]["pid"])

    def _blackhole(self, node: Node) -> None:
        with blackhole(node.lab, node.namespace):
            time.sleep(BLACKHOLE_S)

    def _flap(self, node: Node) -> None:
        flap(node.lab, node.namespace, times=2, seconds=1.0)

    def _cut(self, node: Node) -> None:
        cut_connections(node.lab, node.namespace, P2P_PORT)

    def _scale(self, node: Node) -> None:
        self._scaled(node, self._random.randint(1, SHARDS + 1))

    def _scaled(self, node: Node, shards: int) -> bool:
        answer = node.ask("scale", shards=shards)
        if answer.get("shards") != shards:  # a shard it waits for was killed, say
            self.refused.append(str(answer))
        return answer.get("shards") == shards

    def _rotate(self, node: Node) -> None:
        age = node.config.get("session", {}).get("max_age")
        self._set_age(node, "" if age else ROTATED_AGE)

    def _set_age(self, node: Node, age: str) -> None:
        node.config["session"] = {"max_age": age} if age else {}
        node.write_config()
        answer = node.ask("reload")
        assert "applied" in answer, answer


class Memory:
    """What the processes of nodes hold, by role, looked at all through the block."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._samples: dict[tuple[str, str], list[tuple[float, int]]] = collections.defaultdict(list)
        self._begun_s = time.monotonic()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ending.wait(SAMPLE_S):
            for node in self._nodes:
                status = node.ask()
                now_s = time.monotonic() - self._begun_s
                for name, row in children(status).items() if status else ():
                    if held := own_pss_bytes(row["pid"]) if row["pid"] else 0:
                        self._samples[node.namespace.label, name.split()[0]].append((now_s, held))

    def growth(self, first_s: float, last_s: float) -> dict[str, float]:
        """By node, all its processes together: what it held in the last so many seconds over what it held in the
        first so many, less 1. A shard counts for what shards of the node hold in the middle, and SHARDS times:
        how many there are is the faults' doing."""
        end_s = time.monotonic() - self._begun_s
        result = {}
        for node in self._nodes:
            label, first, last = node.namespace.label, 0.0, 0.0
            for role, processes in (("supervisor", 1), ("control", 1), ("shard", SHARDS)):
                samples = self._samples[label, role]
                first += processes * statistics.median(held for at_s, held in samples if at_s <= first_s)
                last += processes * statistics.median(
                    held for at_s, held in samples if at_s >= end_s - last_s
                )
            result[label] = last / first - 1
        return result

    def megabytes(self) -> dict[str, str]:
        """By role, over all nodes: the least and the most of one process."""
        by_role = collections.defaultdict(list)
        for (_, role), samples in self._samples.items():
            by_role[role] += [held / 2**20 for _, held in samples]
        return {role: f"{min(held):.0f} to {max(held):.0f} MiB" for role, held in by_role.items()}


def _kill(pid: int) -> None:
    if pid:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it died of itself meanwhile, which its supervisor will tell
