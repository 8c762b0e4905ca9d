"""Real-time priority for shards, and at times for the other processes of a node (process.realtime), and reading the TUN
device in turns with the programs whose packets are read.

A packet passes two shards each way, and each has to be woken for it. As an ordinary process a shard waits for
whatever runs on its CPU, three milliseconds and more where programs send as fast as they can; at the lowest
real-time priority it does not. A child that comes back after its death has it from its start on, for where programs
send as fast as they can they leave it no CPU to start on; control until it is ready. With a single CPU nothing is
raised: there a busy shard would keep everybody else off it. Linux leaves other processes a part of each CPU's time in
any case (sched_rt_runtime_us, or the fair server of newer kernels).

The supervisor with that priority preempts the sender of each packet, and reads them one at a time. So it pauses while
packets keep coming, and what came meanwhile is a batch: interrupt moderation, as network cards have it. Where packets
are many and small even that takes too much from those who send and receive them.

    packets a second                priority    after a read
    up to realtime_packets          real-time   a pause of realtime_pause, if packets keep coming
    more, until half of it is left  the usual   the next one, when it is its turn

A lone packet is not held up: packets keep coming when there was more than one, or one came before within the length of
a pause.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from supervisor.pump import Pump
from vpnd.config.live import Live
from vpnd.packet.ring import RingBroken

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


_THIS_THREAD = 0


class Pacing:
    """Owner: supervisor loop. `now_s` is a clock, `sleep_s` waits, `prioritize(pid, wanted)` is set_realtime.

    `alone`: the process is the node's alone; the priority of another program is never touched, nor its loop held up.
    """

    def __init__(
        self,
        live: Live,
        *,
        alone: bool,
        now_s: Callable[[], float] = time.monotonic,
        sleep_s: Callable[[float], None] = time.sleep,
        prioritize: Callable[[int, bool], str] = set_realtime,
    ) -> None:
        self._live, self._alone = live, alone
        self._now_s, self._sleep_s, self._prioritize = now_s, sleep_s, prioritize
        self._realtime = self._possible = False
        self._pause_s = self._window_s = 0.0
        self._packets = 0
        self._since_s = self._last_s = now_s()
        live.watch(lambda config: config.process, self._begin)
        self._begin()

    def _begin(self) -> None:
        settings = self._live.config.process
        self._pause_s, self._window_s = settings.realtime_pause, settings.realtime_window
        self._possible = self._alone and settings.realtime and several_cpus()
        self._become(self._possible)

    def end(self) -> None:
        """Back to the usual priority."""
        self._alone = self._possible = False
        self._become(False)

    def after_read(self, packets: int) -> None:
        """So many packets were just read from the TUN device. Returns when the next may be."""
        now_s = self._now_s()
        self._packets += packets
        if now_s - self._since_s >= self._window_s:
            self._judge(now_s)
        if self._realtime and (packets > 1 or now_s - self._last_s < self._pause_s):
            self._sleep_s(self._pause_s)
            now_s = self._now_s()
        self._last_s = now_s

    def _judge(self, now_s: float) -> None:
        rate = self._packets / (now_s - self._since_s)
        self._packets, self._since_s = 0, now_s
        most = self._live.config.process.realtime_packets
        wanted = self._possible and rate <= (most if self._realtime else most / 2)
        if wanted != self._realtime:
            self._become(wanted)

    def _become(self, realtime: bool) -> None:
        """What the kernel refuses is not asked for again; that shards do not get it either is in status."""
        if realtime != self._realtime:
            refused = bool(self._prioritize(_THIS_THREAD, realtime))
            self._possible = self._possible and not refused
            self._realtime = realtime and not refused


class Reading:
    """Packets from the TUN device into the pump, from now until `close`. Owner: supervisor loop.

    `broken(reason)`: a shard has spoilt its ring. `gone(reason)`: the device cannot be read any more.
    """

    def __init__(
        self,
        live: Live,
        tun_fd: int,
        pump: Pump,
        pacing: Pacing,
        *,
        broken: Callable[[str], None],
        gone: Callable[[str], None],
    ) -> None:
        self._live, self._fd, self._pump, self._pacing = live, tun_fd, pump, pacing
        self._broken, self._gone = broken, gone
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(tun_fd, self._read)
        self._aging: asyncio.TimerHandle | None = None
        self._reading = True
        live.watch(lambda config: config.worker.idle_timeout, self._age_later)
        self._age_flows()

    def close(self) -> None:
        """Read no more."""
        self._reading = False
        self._loop.remove_reader(self._fd)
        if self._aging is not None:
            self._aging.cancel()
        self._pacing.end()

    def _read(self) -> None:
        try:
            self._pacing.after_read(self._pump.read_tun())
        except RingBroken as error:
            self._broken(str(error))
        except OSError as error:
            self._gone(error.strerror or str(error))

    def _age_flows(self) -> None:
        self._pump.flows.age()
        self._age_later()

    def _age_later(self) -> None:
        if self._aging is not None:
            self._aging.cancel()
        if self._reading:
            self._aging = self._loop.call_later(self._live.config.worker.idle_timeout, self._age_flows)
