"""Children that are forked: whose they are, that they come back with and without the nursery, and what a node takes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest
from lab import Node, process_tree, pss_bytes, running_nodes, wait_until
from lab.processes import command_line

SHARDS = 4
#: With a session to each other's; see docs/performance.md for what it is made of.
MOST_BYTES = 106_000_000
BACK_S = 10.0


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with running_nodes(2, shards=SHARDS, settings={"process": {"ready_timeout": "15s"}}) as nodes:
        yield nodes[0]


def nurseries(node: Node) -> list[int]:
    return [pid for pid in process_tree(node.pids()) if "vpnd.nursery" in command_line(pid)]


def shard_pids(node: Node) -> list[int]:
    return [shard["pid"] for shard in node.ask()["shards"]]


def killed(node: Node, pid: int) -> int:
    """Kill a shard; the pid of the one in its place."""
    before = shard_pids(node)
    os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: pid not in shard_pids(node) and node.ask()["health"] == "healthy",
        BACK_S,
        f"a shard is back: {node.log_tail()}",
    )
    (new,) = set(shard_pids(node)) - set(before)
    return new


def is_forked(pid: int) -> bool:
    """Whether it shares memory of its own with others: an interpreter shares files alone, of which pages count as dirty
    too while they are not written yet, as after an installation."""
    shared_kb, of_file = 0, False
    with open(f"/proc/{pid}/smaps") as file:
        for line in file:
            first, *rest = line.split()
            if not first.endswith(":"):
                of_file = rest[3] != "0"
            elif first == "Shared_Dirty:" and not of_file:
                shared_kb += int(rest[0])
    return shared_kb > 2000


def _rollup(pid: int) -> list[str]:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return file.read().splitlines()


def test_shards_are_forked_children_of_the_supervisor(node: Node) -> None:
    supervisor = node.ask()["supervisor"]["pid"]
    for pid in shard_pids(node):
        assert psutil.Process(pid).ppid() == supervisor
        assert "-m shards" in command_line(pid)
        assert is_forked(pid)


def test_a_node_takes_no_more_memory_than_it_is_meant_to(node: Node) -> None:
    assert pss_bytes(node.pids()) < MOST_BYTES


def test_a_killed_shard_is_forked_again(node: Node) -> None:
    assert is_forked(killed(node, shard_pids(node)[0]))


def test_without_a_nursery_shards_come_back_and_it_does_too(node: Node) -> None:
    (nursery,) = nurseries(node)
    others = shard_pids(node)
    os.kill(nursery, signal.SIGKILL)
    wait_until(lambda: not nurseries(node), BACK_S, "the nursery is gone")
    assert shard_pids(node) == others, "nobody's death but its own"
    assert not is_forked(killed(node, shard_pids(node)[1]))
    wait_until(lambda: bool(nurseries(node)), BACK_S, "there is another nursery")
    wait_until(lambda: is_forked(killed(node, shard_pids(node)[2])), BACK_S, "that forks shards")


@pytest.mark.setting("process.fork_timeout")
def test_a_node_that_is_not_to_fork_has_no_nursery() -> None:
    with running_nodes(2, shards=1, settings={"process": {"fork_timeout": "0s"}}) as (node, _):
        assert not nurseries(node)
        assert not any(is_forked(pid) for pid in shard_pids(node))


def test_a_nursery_that_hangs_holds_nobody_up(node: Node) -> None:
    (nursery,) = nurseries(node)
    os.kill(nursery, signal.SIGSTOP)
    assert not is_forked(killed(node, shard_pids(node)[3]))
    wait_until(lambda: nursery not in nurseries(node), 2 * BACK_S, "it is killed")


def test_what_a_nursery_forks_too_late_does_not_stay(node: Node) -> None:
    wait_until(
        lambda: is_forked(killed(node, shard_pids(node)[0])), BACK_S, "there is a nursery that forks shards"
    )
    (nursery,) = nurseries(node)
    os.kill(nursery, signal.SIGSTOP)
    new = killed(node, shard_pids(node)[0])
    assert not is_forked(new)
    os.kill(nursery, signal.SIGCONT)
    wait_until(
        lambda: is_forked(killed(node, shard_pids(node)[0])), BACK_S, "it forks again when it has gone on"
    )
    assert nurseries(node) == [nursery]
    ours = {*shard_pids(node), node.ask()["control"]["pid"], nursery}
    left = {
        process.pid
        for process in psutil.Process(node.ask()["supervisor"]["pid"]).children()
        if "-m" in process.cmdline() or process.status() == psutil.STATUS_ZOMBIE
    }
    assert left == ours
