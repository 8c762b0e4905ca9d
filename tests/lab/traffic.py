"""Traffic through a lab with the ordinary tools, ping(8) and iperf3(1), and their output as numbers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .network import Lab, LabError, Namespace, run_command, wait_until

IPERF_PORT = 5201
#: How much longer than its own duration iperf3 may take (connecting, stragglers of an overloaded link).
IPERF_SLACK_S = 20.0
#: Pause between single pings while waiting for the first answer: the resolution of a start-up time.
PROBE_WAIT_S = 0.05
#: How much longer ping(8) waits between two requests than it is told.
PING_SLACK_S = 0.01


class Ping(NamedTuple):
    """Round trips in milliseconds, and the share of requests without an answer."""

    min_ms: float
    avg_ms: float
    p99_ms: float
    max_ms: float
    loss: float


def ping(
    lab: Lab,
    source: Namespace,
    ip: str,
    count: int = 200,
    interval_s: float = 0.01,
    size: int = 56,
    wait_s: float = 2.0,
    urgent: bool = False,
) -> Ping:
    """Ping `ip` with `size` bytes of payload; what has no answer `wait_s` behind the last request is lost. `urgent`: it
    has the priority of shards, so that the time is not its own in which it waits for a CPU.

    Times are not-a-number when nothing answered.
    """
    # Not -W: once there were answers, ping(8) waits for the last one no longer than for twice the slowest of the
    # others, or the interval, and calls it lost. With -w it goes on asking until it has `count` answers.
    deadline_s = math.ceil(count * (interval_s + PING_SLACK_S) + wait_s)
    priority = ("chrt", "-r", "1") if urgent else ()
    words = ("-n", "-c", str(count), "-i", str(interval_s), "-s", str(size), "-w", str(deadline_s), ip)
    done = lab.run(source, *priority, "ping", *words, check=False, timeout_s=deadline_s + 30)
    if "packets transmitted" not in done.stdout:
        raise LabError(f"ping {ip}: {(done.stderr or done.stdout).strip()}")
    return parse_ping(done.stdout, count)


def parse_ping(output: str, count: int) -> Ping:
    """Numbers from what ping(8) printed of its first `count` requests; an answer that came twice counts once."""
    times: dict[int, float] = {}
    for match in re.finditer(r"icmp_seq=(\d+) .*?time=([\d.]+) ms", output):
        if int(match[1]) <= count:
            times.setdefault(int(match[1]), float(match[2]))
    loss = 1 - len(times) / count
    if not times:
        nan = float("nan")
        return Ping(nan, nan, nan, nan, loss)
    ordered = sorted(times.values())
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return Ping(ordered[0], sum(ordered) / len(ordered), p99, ordered[-1], loss)


def wait_for_answer(
    lab: Lab, source: Namespace, ip: str, timeout_s: float, *, probe_wait_s: float = PROBE_WAIT_S
) -> float:
    """Ping until the first answer; the seconds it took. Raises LabError after `timeout_s`. `probe_wait_s`: longer than
    a round trip."""
    start = time.monotonic()
    probe = ("ping", "-n", "-q", "-c", "1", "-W", str(probe_wait_s), ip)
    wait_until(lambda: lab.run(source, *probe, check=False).returncode == 0, timeout_s, f"answer from {ip}")
    return time.monotonic() - start


def iperf3(
    lab: Lab,
    client: Namespace,
    server: Namespace,
    ip: str,
    *,
    flows: int = 1,
    seconds: int = 5,
    reverse: bool = False,
    udp: bool = False,
    length: int | None = None,
    bitrate: str | None = None,
    congestion: str = "cubic",
    port: int = IPERF_PORT,
    during: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """One iperf3 run from `client` to `ip`, an address of `server`; iperf3's JSON report.

    `reverse`: the server sends. `length`: bytes per write, for UDP the datagram's payload. `bitrate`: what
    all flows together offer in bits/s ("300M"; "0": all it can; default: that for TCP, 1 Mbit/s per flow for UDP).
    `congestion`: of TCP, because the kernel's default may be bbr, which is another experiment. `during` is
    called right after the client's start. Raises LabError with iperf3's reason.
    """
    command = ["iperf3", "-J", "-c", ip, "-p", str(port), "-t", str(seconds), "-P", str(flows)]
    command += ["-R"] if reverse else []
    command += ["-l", str(length)] if length else []
    command += ["-u"] if udp else ["-C", congestion]
    command += ["-b", _per_flow(bitrate, flows)] if bitrate is not None else []
    server_process = lab.spawn(server, "iperf3", "-s", "-1", "-p", str(port))
    listening = ("ip", "netns", "exec", server.name, "ss", "-Hltn", f"sport = :{port}")
    try:
        wait_until(lambda: run_command(*listening).strip(), IPERF_SLACK_S, "iperf3 server listens")
        run = lab.spawn(client, *command, output=subprocess.PIPE)
        if during:
            during()
        try:
            output, _ = run.communicate(timeout=seconds + IPERF_SLACK_S)
        except subprocess.TimeoutExpired:
            run.kill()
            raise LabError(f"iperf3 to {ip} does not end") from None
    finally:
        # It ends by itself after a run; not when no client reached it.
        if server_process.poll() is None:
            server_process.terminate()
        server_process.wait()
    return _iperf3_report(output)


def _iperf3_report(output: str) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(output)
    except ValueError:
        raise LabError(f"iperf3 said: {output.strip()[:300]}") from None
    if "error" in report:
        raise LabError(f"iperf3: {report['error']}")
    return report


def goodput_bps(report: dict[str, Any]) -> float:
    """What the receiver got, payload bits per second, all flows together."""
    return float(report["end"]["sum_received"]["bits_per_second"])


def received_bytes(report: dict[str, Any]) -> int:
    """What the receiver got, payload bytes, all flows together."""
    return int(report["end"]["sum_received"]["bytes"])


def sent_bps(report: dict[str, Any]) -> float:
    """What the sender's socket took, payload bits per second, all flows together."""
    return float(report["end"]["sum_sent"]["bits_per_second"])


def loss_share(report: dict[str, Any]) -> float:
    """Share of the UDP datagrams that did not arrive."""
    return float(report["end"]["sum"]["lost_percent"]) / 100


def out_of_order(report: dict[str, Any]) -> int:
    """UDP datagrams that arrived after a later one of their flow."""
    return sum(int(stream["udp"].get("out_of_order", 0)) for stream in report["end"]["streams"])


def _per_flow(bitrate: str, flows: int) -> str:
    """iperf3 takes the bit rate of one flow; ours is the sum."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", bitrate)
    if not match:
        raise LabError(f"not a bit rate: {bitrate!r}")
    scale = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]]
    return str(round(float(match[1]) * scale / flows))
