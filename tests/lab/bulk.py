"""A bulk flow in the background whose throughput can be asked about any part of its time."""

from __future__ import annotations

import statistics
import threading
import time
from typing import Any

from .network import LabError
from .node import Node
from .traffic import iperf3

STARTED_S = 20.0


class Bulk:
    """One TCP flow as fast as it goes, from one node to another, for so many seconds."""

    def __init__(self, one: Node, other: Node, seconds: int) -> None:
        self._report: dict[str, Any] = {}
        started = threading.Event()

        def run() -> None:
            self._report = iperf3(
                one.lab, one.namespace, other.namespace, other.virtual_ip, seconds=seconds, during=started.set
            )

        self._thread = threading.Thread(target=run)
        self._thread.start()
        if not started.wait(STARTED_S):
            raise LabError("iperf3 does not start")
        self.begun_s = time.monotonic()

    def wait(self) -> None:
        """Until it has ended."""
        self._thread.join()

    def mbit_s(self, from_s: float, to_s: float) -> float:
        """Median of the whole seconds between two moments of time.monotonic."""
        rates = [
            row["sum"]["bits_per_second"] / 1e6
            for row in self._report["intervals"]
            if row["sum"]["start"] + self.begun_s >= from_s and row["sum"]["end"] + self.begun_s <= to_s
        ]
        return statistics.median(rates)
