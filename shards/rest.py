"""A shard that floods keep busy leaves its CPU to others, bit by bit.

It has real-time priority (supervisor/pacing.py). From one that does not stop working Linux takes the CPU for 50 ms in
each second, when anybody else wants it (sched_rt_runtime_us, or the fair server of newer kernels), and the packets of
all peers wait. So it gives that time before it is taken, in pauses that nobody notices; and as those pause who have
more for it than their turn, it costs nobody else anything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from vpnd.config.live import Live


def _is_realtime() -> bool:
    return os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR


class Rest:
    """Owner: shard loop. `now` is a clock, `used` one of the CPU's time for this process, `realtime` whether it has
    that priority, `sleep` waits."""

    def __init__(
        self,
        live: Live,
        now: Callable[[], float],
        used: Callable[[], float] = time.thread_time,
        realtime: Callable[[], bool] = _is_realtime,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._live, self._now, self._used, self._realtime, self._sleep = live, now, used, realtime, sleep
        self._looked_s, self._used_s = now(), used()
        self._debt_s = 0.0  # used beyond its share

    def between_turns(self) -> None:
        """Somebody's turn is over who has more for it; pauses when it is time to."""
        now_s, process = self._now(), self._live.config.process
        if now_s - self._looked_s < process.realtime_slice:
            return
        used_s = self._used()
        more_s = used_s - self._used_s - (now_s - self._looked_s) * process.realtime_share
        self._debt_s = max(0.0, self._debt_s + more_s)
        self._looked_s, self._used_s = now_s, used_s
        pause_s = (self._debt_s - process.realtime_slice) / process.realtime_share
        if pause_s > 0 and self._realtime():
            # After long work without a look there may be much: it is given bit by bit as well.
            self._sleep(min(pause_s, process.realtime_slice))
