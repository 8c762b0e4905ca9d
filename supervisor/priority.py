"""Real-time priority for shards, and at times for the other processes of a node (process.realtime).

A packet passes two shards each way, and each has to be woken for it. As an ordinary process a shard waits for
whatever runs on its CPU, three milliseconds and more where programs send as fast as they can; at the lowest
real-time priority it does not. When the supervisor has it as well is the affair of supervisor/pacing.py. A child that
comes back after its death has it from its start on, for where programs send as fast as they can they leave it no CPU
to start on; control until it is ready.

With a single CPU nothing is raised: there a busy shard would keep everybody else off it. Linux leaves other processes
a part of each CPU's time in any case (sched_rt_runtime_us, or the fair server of newer kernels).
"""

from __future__ import annotations

import os

from vpnd.config.live import Live

#: Linux sched(7): the lowest of 1 to 99.
_PRIORITY = 1


def several_cpus() -> bool:
    """Whether this process may run on more than one CPU."""
    return len(os.sched_getaffinity(0)) > 1


def set_realtime(pid: int, wanted: bool) -> str:
    """Give a process that priority, or the usual one.

    Returns why it cannot have it, a line for status; empty when it is as wanted, or the process has just ended.
    """
    realtime = wanted and several_cpus()
    try:
        if realtime:
            policy, priority = os.SCHED_RR | os.SCHED_RESET_ON_FORK, _PRIORITY
        else:
            policy, priority = os.SCHED_OTHER, 0
        os.sched_setscheduler(pid, policy, os.sched_param(priority))
    except ProcessLookupError:
        return ""
    except OSError as error:  # a container without CAP_SYS_NICE, a control group without real-time budget
        if realtime:
            return (
                f"shards run at the usual priority, for the kernel refused process.realtime: {error.strerror}"
            )
    return ""


class Priorities:
    """Of the children of a node. `warnings`: why they do not have what they were to have; lines for status."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.warnings: tuple[str, ...] = ()

    def carries_packets(self, pid: int) -> None:
        """Packets wait for this process whenever it has to wait. 0: there is none."""
        if pid:
            why_not = set_realtime(pid, self._live.config.process.realtime)
            self.warnings = (why_not,) if why_not else ()

    def usual(self, pid: int) -> None:
        """They do not, or no longer."""
        if pid:
            set_realtime(pid, False)
