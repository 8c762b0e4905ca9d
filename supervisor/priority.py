"""Real-time priority for shards, and at times for the supervisor (process.realtime).

A packet passes two shards each way, and each has to be woken for it. As an ordinary process a shard waits for
whatever runs on its CPU, three milliseconds and more where programs send as fast as they can; at the lowest
real-time priority it does not. When the supervisor has it as well is the affair of supervisor/pacing.py.

With a single CPU nothing is raised: there a busy shard would keep everybody else off it. Linux leaves other processes
a part of each CPU's time in any case (sched_rt_runtime_us, or the fair server of newer kernels).
"""

from __future__ import annotations

import os

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
