"""Real-time priority of shards, as the kernel tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.priority import Priorities, set_realtime
from vpnd.config.schema import Process

REALTIME = os.SCHED_RR | os.SCHED_RESET_ON_FORK


@pytest.fixture
def pid() -> Iterator[int]:
    """A process that waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.mark.root
def test_a_process_has_it_until_told_otherwise(pid: int, two_cpus: None) -> None:
    assert set_realtime(pid, True) == ""
    assert os.sched_getscheduler(pid) == REALTIME and os.sched_getparam(pid).sched_priority == 1
    assert set_realtime(pid, False) == ""
    assert os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER


def test_with_one_cpu_nobody_has_it(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert set_realtime(pid, True) == ""
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER


def test_a_kernel_that_refuses_is_a_line_in_status(
    pid: int, two_cpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert "process.realtime: Operation not permitted" in set_realtime(pid, True)
    assert set_realtime(pid, False) == "", "it was not asked for"


def test_a_process_that_has_just_ended_is_nobodys_fault(two_cpus: None) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert set_realtime(process.pid, True) == ""


def child(pid: int, restarts: int) -> Any:
    """What is looked at of a supervisor.children.Child."""
    return SimpleNamespace(pid=pid, restarts=restarts)


@pytest.mark.root
def test_a_child_that_comes_back_has_it_from_its_start_on(pid: int, two_cpus: None) -> None:
    priorities, settings = Priorities(), Process()
    priorities.starts(child(pid, restarts=0), settings)
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER, "the first start is nobody's loss"
    back = child(pid, restarts=1)
    priorities.starts(back, settings)
    assert os.sched_getscheduler(pid) == REALTIME
    priorities.usual(back)
    assert os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER
    priorities.starts(back, Process(realtime=False))
    assert os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER and not priorities.warnings
    priorities.carries_packets(child(0, restarts=1), settings)
