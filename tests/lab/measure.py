"""One round of the bench: everything that is measured of one contender, in one fresh lab."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import call
from .contenders import Contender
from .faults import lossy
from .link import Link
from .network import Lab, LabError
from .processes import cpu_seconds, pss_bytes
from .traffic import (
    PROBE_WAIT_S,
    Ping,
    goodput_bps,
    iperf3,
    loss_share,
    ping,
    received_bytes,
    sent_bps,
    wait_for_answer,
)

GB = 1e9
MB = 1e6


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure. Rates of the search for UDP goodput are ratios of one another."""

    seconds: int = 5
    pings: int = 200
    ping_interval_s: float = 0.01
    udp_seconds: int = 2
    udp_payload_bytes: int = 1200
    #: What a game, a call or a name server sends: there the packets count, not their bytes.
    small_payload_bytes: int = 200
    udp_step: float = 1.25
    udp_most_steps: int = 8
    #: Before each UDP run: what is still on its way would be taken for the first datagram of the next one.
    udp_pause_s: float = 0.3
    #: How often a UDP run is begun at most: iperf3 does not get over the loss of its first datagram.
    udp_attempts: int = 3
    #: The search goes up until so many rates in a row delivered less than the best so far.
    udp_patience: int = 2
    start_timeout_s: float = 30.0
    #: Between the first answer and the first measurement.
    settle_s: float = 1.0
    #: Between the last load and the look at memory.
    rest_s: float = 5.0
    #: Share of the packets the link loses, each way, at random.
    loss: float = 0.0
    #: What is between the two nodes, if not a bare veth; a call beside TCP is measured there.
    link: Link | None = None
    #: A packet of a call is late when it takes so much longer than the link's delay and jitter.
    call_late_ms: float = 30.0


QUICK = Plan(
    seconds=1,
    pings=100,
    udp_seconds=1,
    udp_step=1.4,
    udp_most_steps=4,
    udp_patience=1,
    settle_s=0.3,
    rest_s=3,
)


@dataclass(frozen=True)
class Metric:
    """A number of the report: how it is called, its unit, whether more of it is better, and whether dividing
    one contender's by another's tells anything."""

    key: str
    title: str
    unit: str
    more_is_better: bool
    divisible: bool = True


METRICS = (
    Metric("tcp1_forward", "TCP 1 flow A->B", "Gbit/s", True),
    Metric("tcp1_reverse", "TCP 1 flow B->A", "Gbit/s", True),
    Metric("tcp4_forward", "TCP 4 flows A->B", "Gbit/s", True),
    Metric("tcp4_reverse", "TCP 4 flows B->A", "Gbit/s", True),
    Metric("udp", "UDP 1200 goodput", "Mbit/s", True),
    Metric("udp_loss", "  its loss", "%", False, divisible=False),
    Metric("udp_flood", "UDP 1200 flooded", "Mbit/s", True),
    Metric("udp_small", "UDP 200 packets", "1000/s", True),
    Metric("ping_min", "ping idle min", "ms", False),
    Metric("ping_avg", "ping idle avg", "ms", False),
    Metric("ping_p99", "ping idle p99", "ms", False),
    Metric("ping_loss", "  its loss", "%", False, divisible=False),
    Metric("loaded_avg", "ping under TCP avg", "ms", False),
    Metric("loaded_p99", "ping under TCP p99", "ms", False),
    Metric("loaded_loss", "  its loss", "%", False, divisible=False),
    Metric("call_late", "call beside TCP, late", "%", False, divisible=False),
    Metric("call_lost", "  lost", "%", False, divisible=False),
    Metric("cpu_tcp", "CPU per GB, TCP", "s/GB", False),
    Metric("cpu_udp", "CPU per GB, UDP", "s/GB", False),
    Metric("cpu_idle", "CPU beside idle ping", "ms/s", False),
    Metric("watchers", "CPU of watchers", "ms/s", False, divisible=False),
    Metric("memory", "memory per node", "MB PSS", False),
    Metric("start", "start to first ping", "s", False),
)


def measure(make: Callable[[Lab], Contender], plan: Plan) -> dict[str, float]:
    """Open a lab, start a contender in it, measure, close; a number for each metric that applies.

    Raises LabError, with the end of the contender's logs, when it does not work.
    """
    with Lab(link=plan.link) as lab:
        contender = make(lab)
        try:
            with lossy(lab, plan.loss) if plan.loss else contextlib.nullcontext():
                return _measure(lab, contender, plan)
        except LabError as error:
            raise LabError(f"{error}\n{contender.explain()}".strip()) from error


def measure_turn(lab: Lab, contender: Contender, plan: Plan) -> dict[str, float]:
    """The few numbers that tell most, of a contender that is up and has been measured before; in some seconds."""
    processes = [pid for roots in contender.roots() for pid in roots]
    begun_s, before_s = time.monotonic(), cpu_seconds(processes)
    idle = ping(lab, lab.nodes[0], contender.target, plan.pings, plan.ping_interval_s)
    idle_share = (cpu_seconds(processes) - before_s) / (time.monotonic() - begun_s)
    meter = Meter(processes)
    loaded, report = _ping_under_load(lab, contender, plan, meter)
    flood = _udp_run(lab, contender, plan, 0, plan.udp_payload_bytes)
    return {
        "ping_avg": idle.avg_ms,
        "tcp1_forward": goodput_bps(report) / GB,
        "loaded_avg": loaded.avg_ms,
        "loaded_p99": loaded.p99_ms,
        "cpu_tcp": meter.seconds_per_gb(),
        "udp_flood": goodput_bps(flood) / MB,
        "cpu_idle": 1000 * idle_share,
    }


def _measure(lab: Lab, contender: Contender, plan: Plan) -> dict[str, float]:
    contender.prepare()
    begin = time.monotonic()
    contender.start()
    wait_s = (
        max(PROBE_WAIT_S, 4 * (plan.link.delay_ms + plan.link.jitter_ms) / 1000)
        if plan.link
        else PROBE_WAIT_S
    )
    wait_for_answer(lab, lab.nodes[0], contender.target, plan.start_timeout_s, probe_wait_s=wait_s)
    numbers: dict[str, float] = {}
    processes = [pid for roots in contender.roots() for pid in roots]
    if processes:
        numbers["start"] = time.monotonic() - begin
    time.sleep(plan.settle_s)

    idle = ping(lab, lab.nodes[0], contender.target, plan.pings, plan.ping_interval_s)
    numbers |= {
        "ping_min": idle.min_ms,
        "ping_avg": idle.avg_ms,
        "ping_p99": idle.p99_ms,
        "ping_loss": idle.loss * 100,
    }

    meter = Meter(processes)
    for flows in (1, 4):
        for direction, reverse in (("forward", False), ("reverse", True)):
            report = meter.count(
                lambda flows=flows, reverse=reverse: _iperf3(  # type: ignore[misc]
                    lab, contender, flows=flows, reverse=reverse, seconds=plan.seconds
                )
            )
            numbers[f"tcp{flows}_{direction}"] = goodput_bps(report) / GB
    if processes:
        numbers["cpu_tcp"] = meter.seconds_per_gb()

    loaded, _ = _ping_under_load(lab, contender, plan, Meter(processes))
    numbers |= {"loaded_avg": loaded.avg_ms, "loaded_p99": loaded.p99_ms, "loaded_loss": loaded.loss * 100}

    if plan.link:
        beside = _call_under_load(lab, contender, plan, plan.link)
        numbers |= {"call_late": beside.late * 100, "call_lost": beside.lost * 100}

    flood, best = _udp_goodput(lab, contender, plan, processes, plan.udp_payload_bytes)
    numbers |= {
        "udp": best.received_bps / MB,
        "udp_loss": best.loss * 100,
        "udp_flood": flood.received_bps / MB,
    }
    _, small = _udp_goodput(lab, contender, plan, processes, plan.small_payload_bytes)
    numbers["udp_small"] = small.received_bps / 8 / plan.small_payload_bytes / 1000
    if processes:
        numbers["cpu_udp"] = best.cpu_s_per_gb
        time.sleep(plan.rest_s)
        numbers["memory"] = max(pss_bytes(roots) for roots in contender.roots()) / MB
    return numbers


def _iperf3(lab: Lab, contender: Contender, **options: Any) -> dict[str, Any]:
    first, second = lab.nodes
    return iperf3(lab, first, second, contender.target, **options)


def _ping_under_load(lab: Lab, contender: Contender, plan: Plan, meter: Meter) -> tuple[Ping, dict[str, Any]]:
    """Ping beside one TCP flow, from after its slow start to before its end; and iperf3's report of the flow."""
    answers: list[Ping] = []
    seconds = plan.seconds + 1
    margin_s = 0.5
    count = int((seconds - 2 * margin_s) / plan.ping_interval_s)

    def during() -> None:
        time.sleep(margin_s)
        answers.append(ping(lab, lab.nodes[0], contender.target, count, plan.ping_interval_s))

    report = meter.count(lambda: _iperf3(lab, contender, seconds=seconds, during=during))
    return answers[0], report


def _call_under_load(lab: Lab, contender: Contender, plan: Plan, link: Link) -> call.Call:
    """A call beside one TCP flow the same way."""
    here, there = lab.nodes
    seconds = max(plan.seconds, 4)
    words = (contender.target, str(call.PORT), str(seconds))
    listener = lab.spawn(there, sys.executable, call.__file__, "listen", *words, output=subprocess.PIPE)
    assert listener.stdout
    listener.stdout.readline()

    def during() -> None:
        time.sleep(1)
        lab.run(here, sys.executable, call.__file__, "talk", *words, timeout_s=seconds + 30)

    _iperf3(lab, contender, seconds=seconds + 2, during=during)
    delays = json.loads(listener.communicate(timeout=seconds + 30)[0])
    return call.judge(delays, seconds, link.delay_ms + link.jitter_ms + plan.call_late_ms)


@dataclass(frozen=True, order=True)
class _Delivered:
    """What came of one offered UDP rate; ordered by goodput."""

    received_bps: float
    sent_bps: float
    loss: float
    cpu_s_per_gb: float


def _udp_goodput(
    lab: Lab, contender: Contender, plan: Plan, processes: list[int], payload_bytes: int
) -> tuple[_Delivered, _Delivered]:
    """What arrives of a flood, and the most that arrives, over offered rates.

    A flood (no rate limit) shows what is left when sender and VPN fight for the CPU, which is less than what
    goes through at the right rate. So: flood, then climb from what the flood delivered, then try between
    the best rate and its neighbours.
    """

    def offer(bits_per_second: float) -> _Delivered:
        meter = Meter(processes)
        report = meter.count(lambda: _udp_run(lab, contender, plan, bits_per_second, payload_bytes))
        return _Delivered(goodput_bps(report), sent_bps(report), loss_share(report), meter.seconds_per_gb())

    flood = best = offer(0)
    best_rate = rate = flood.received_bps
    misses = 0
    for _ in range(plan.udp_most_steps):
        if rate > flood.sent_bps or misses >= plan.udp_patience:
            break
        tried = offer(rate)
        misses = 0 if tried > best else misses + 1
        if tried > best:
            best, best_rate = tried, rate
        rate *= plan.udp_step
    best = max(best, offer(best_rate * plan.udp_step**0.5), offer(best_rate / plan.udp_step**0.5))
    return flood, best


def _udp_run(
    lab: Lab, contender: Contender, plan: Plan, bits_per_second: float, payload_bytes: int
) -> dict[str, Any]:
    for left in reversed(range(plan.udp_attempts)):
        time.sleep(plan.udp_pause_s)
        try:
            return _iperf3(
                lab, contender, udp=True, seconds=plan.udp_seconds, length=payload_bytes,
                bitrate=str(round(bits_per_second)),
            )  # fmt: skip
        except LabError:
            if not left or not (plan.loss or plan.link):
                raise
    raise AssertionError("no attempts")


class Meter:
    """CPU seconds of the VPN's processes of both ends over iperf3 runs, and the bytes delivered."""

    def __init__(self, processes: list[int]) -> None:
        self._processes = processes
        self._seconds = 0.0
        self._bytes = 0

    def count(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do one iperf3 run and add it up; its report."""
        before = cpu_seconds(self._processes)
        report = run()
        self._seconds += cpu_seconds(self._processes) - before
        self._bytes += received_bytes(report)
        return report

    def seconds_per_gb(self) -> float:
        """CPU seconds per 10^9 bytes of payload delivered."""
        return self._seconds / (self._bytes / GB) if self._bytes else float("nan")
