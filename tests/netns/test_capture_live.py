"""`vpnd capture` and `vpnd top` on the device of a node that carries packets; what tshark makes of the capture."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from lab import Node, iperf3, ping, received_bytes, running_nodes, wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.long("wants tshark, 100 MB"),
    pytest.mark.skipif(not shutil.which("tshark"), reason="needs tshark"),
]

SOON_S = 20.0
#: The longest superpacket, and what its headers may take.
MOST_RECORD = 1 << 16


def tshark(file: Path, *words: str) -> list[list[str]]:
    done = subprocess.run(["tshark", "-r", file, *words], capture_output=True, text=True, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


def capturing(node: Node, file: Path, *words: str) -> subprocess.Popen[str]:
    """A `vpnd capture` that has begun."""
    log = file.with_suffix(".said")
    process = node.lab.spawn(
        node.namespace, *node.command, "capture", "-w", str(file), *words, output=log, env=node.env
    )
    sockets = ("ss", "-H", "-0", "-n")
    wait_until(
        lambda: "vpnd0" in node.lab.run(node.namespace, *sockets).stdout, SOON_S, "it listens on the device"
    )
    return process


def test_tshark_finds_in_a_capture_what_programs_sent_and_received(tmp_path: Path) -> None:
    with running_nodes() as (a, b):
        pings, bulk = tmp_path / "pings.pcapng", tmp_path / "bulk.pcapng"
        process = capturing(a, pings, "--host", "b", "--proto", "icmp", "-c", "10")
        ping(a.lab, a.namespace, b.virtual_ip, count=5, interval_s=0.05, size=300)
        wait_until(lambda: process.poll() is not None, SOON_S, "it ends after ten packets")
        rows = tshark(
            pings, "-T", "fields", "-e", "ip.src", "-e", "ip.dst", "-e", "icmp.type", "-e", "icmp.seq"
        )
        assert sorted(rows) == sorted(
            [source, target, kind, str(number)]
            for number in range(1, 6)
            for source, target, kind in ((a.virtual_ip, b.virtual_ip, "8"), (b.virtual_ip, a.virtual_ip, "0"))
        )
        times = [float(row[0]) for row in tshark(pings, "-T", "fields", "-e", "frame.time_epoch")]
        assert times == sorted(times) and times[-1] - times[0] < 5
        assert not tshark(pings, "-Y", "_ws.malformed || icmp.checksum.status == 0")

        process = capturing(b, bulk, "--port", "5201", "--snap", "200")
        report = iperf3(a.lab, a.namespace, b.namespace, b.virtual_ip, seconds=1, bitrate="200M")
        process.send_signal(signal.SIGINT)
        process.wait()
        lengths = tshark(
            bulk,
            "-T",
            "fields",
            "-e",
            "frame.len",
            "-e",
            "frame.cap_len",
            "-Y",
            f"tcp && ip.src == {a.virtual_ip}",
        )
        assert all(int(kept) == min(int(whole), 200) for whole, kept in lengths)
        carried = sum(int(whole) for whole, _ in lengths)
        assert received_bytes(report) < carried < received_bytes(report) * 1.1 + MOST_RECORD, (
            "headers are all that is more"
        )
        assert max(int(whole) for whole, _ in lengths) > 1500, "superpackets are there as the kernel has them"


def test_top_names_the_flow_that_moves_most_and_its_rate() -> None:
    with running_nodes() as (a, b):
        rows: list[dict[str, Any]] = []

        def look() -> None:
            time.sleep(1.0)  # iperf3 begins faster than it goes on
            rows.extend(json.loads(a.vpnd("top", "--once", "--json", "--interval", "2").stdout))

        report = iperf3(a.lab, a.namespace, b.namespace, b.virtual_ip, seconds=6, bitrate="100M", during=look)
        first = rows[0]
        assert (first["protocol"], first["remote"], first["peer"]) == ("tcp", f"{b.virtual_ip}:5201", "b")
        sent = report["end"]["sum_sent"]["bits_per_second"] / 8
        assert sent * 0.8 < first["sent_bytes_per_s"] < sent * 1.25
        assert 0 < first["received_bytes_per_s"] < sent / 10
