"""Clocks of nodes that can be set, each for itself: libfaketime.

Its clock_nanosleep takes no absolute time, which the pauses of real-time priority are: nodes need
process.realtime = false.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .node import Node

LIBRARY = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@contextlib.contextmanager
def clocks_of(nodes: Sequence[Node]) -> Iterator[None]:
    """Each node that is started within has a clock of its own."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)  # control reads it as another user
        for node in nodes:
            node.env |= {
                "LD_PRELOAD": str(LIBRARY),
                "FAKETIME_TIMESTAMP_FILE": str(Path(directory, node.namespace.label)),
                # to read the file at each look would take the CPU that packets need
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
            set_clock(node, "+0")
        yield


def set_clock(node: Node, offset: str) -> None:
    """Ahead or behind by so much: "+40d", "-3600"; commands of the node know it at once, the node within a second."""
    file = Path(node.env["FAKETIME_TIMESTAMP_FILE"])
    beside = file.with_suffix(".new")
    beside.write_text(offset + "\n")
    beside.rename(file)
