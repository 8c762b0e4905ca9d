"""What a node costs that has nothing to do."""

from __future__ import annotations

import time

import psutil
import pytest
from lab.running import running_nodes

WATCHED_S = 3.0
#: Of one CPU, for all processes of a node together: probes, looks at load, counters.
MOST_SHARE = 0.08


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


@pytest.mark.root
def test_connected_nodes_without_traffic_use_next_to_no_cpu():
    with running_nodes(2, shards=2) as nodes:
        time.sleep(1.0)  # what follows a start
        processes = [each for node in nodes for each in tree(node.pids()[0])]
        before = {each: sum(each.cpu_times()[:2]) for each in processes}
        time.sleep(WATCHED_S)
        used = {
            f"{each.pid} {each.cmdline()[-2:]}": sum(each.cpu_times()[:2]) - spent
            for each, spent in before.items()
        }
    assert sum(used.values()) < MOST_SHARE * WATCHED_S * len(nodes), used
