"""Real-time priority of shards, as the kernel tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from supervisor.pacing import Priorities, set_realtime
from vpnd.config.live import Live
from vpnd.config.schema import Config, Process

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


@pytest.mark.root
def test_a_process_that_carries_packets_has_it_for_so_long(pid: int, two_cpus: None) -> None:
    live = Live(Config())
    priorities = Priorities(live)
    priorities.carries_packets(pid)
    assert os.sched_getscheduler(pid) == REALTIME
    priorities.usual(pid)
    assert os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER
    live.take(Config(process=Process(realtime=False)))
    priorities.carries_packets(pid)
    assert os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK == os.SCHED_OTHER and not priorities.warnings
    priorities.carries_packets(0)
