"""Real-time priority for shards (process.realtime).

A packet passes two shards each way, and each has to be woken for it. As an ordinary process a shard waits for
whatever runs on its CPU, three milliseconds and more where programs send as fast as they can; at the lowest
real-time priority it does not. Only shards: a supervisor that preempts the sender of every datagram reads them one at a
time, which costs far more than it gains (docs/performance.md).

With a single CPU nothing is raised: there a busy shard would keep everybody else off it. Linux leaves other processes
a part of each CPU's time in any case (sched_rt_runtime_us, or the fair server of newer kernels).
"""

from __future__ import annotations

import os

#: Linux sched(7): the lowest of 1 to 99.
_PRIORITY = 1


def set_realtime(pid: int, wanted: bool) -> str:
    """Give a process that priority, or the usual one.

    Returns why it cannot have it, a line for status; empty when it is as wanted, or the process has just ended.
    """
    realtime = wanted and len(os.sched_getaffinity(0)) > 1
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
