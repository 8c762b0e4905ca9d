"""What a node tells Prometheus under load is what the kernel counts, promtool takes it, and nothing ever goes back."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import time
import urllib.request

import pytest
from lab import (
    Node,
    inside,
    iperf3,
    running_nodes,
    settled,
    tcp_transfer,
    udp_flow,
    wait_connected,
    wait_until,
)
from why_tools import SETTLE_S, shard_pid

pytestmark = pytest.mark.root

LISTEN = "127.0.0.1:9586"
BYTES = 8 << 20
PROMTOOL = shutil.which("promtool")
_SERIES = re.compile(r"^(vpnd_[a-z0-9_]+)(\{.*\})? (\S+)$", re.MULTILINE)


def scrape(node: Node) -> str:
    with inside(node.namespace), urllib.request.urlopen(f"http://{LISTEN}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def series(text: str) -> dict[str, float]:
    """Name and labels -> value."""
    return {name + labels: float(value) for name, labels, value in _SERIES.findall(text)}


def total(values: dict[str, float], name: str) -> float:
    return sum(value for key, value in values.items() if key.partition("{")[0] == name)


def kernels(node: Node, direction: str) -> tuple[int, int]:
    """Packets and bytes that the kernel has counted on the TUN device."""
    told = node.lab.run(node.namespace, "ip", "-s", "-s", "link", "show", "vpnd0").stdout
    numbers = re.search(rf"{direction}:\s+bytes\s+packets[^\n]*\n\s*(\d+)\s+(\d+)", told)
    assert numbers is not None, told
    return int(numbers[2]), int(numbers[1])


def processes_told(node: Node) -> bool:
    """Whether each process has its CPU and memory in a scrape; they are sampled one after the other."""
    values = series(scrape(node))
    return all(
        values.get(f'vpnd_process_{what}{{process="{name}"}}')
        for name in ("supervisor", "control", "exporter", "shard 0", "shard 1")
        for what in ("cpu_seconds_total", "resident_memory_bytes")
    )


def only_grow(before: dict[str, float], after: dict[str, float]) -> None:
    """Counters and histograms; a gauge is what has no _total, _bucket, _count or _sum behind it."""
    growing = re.compile(r"_(total|bucket|count|sum)(\{|$)")
    back = {
        key: (value, after.get(key))
        for key, value in before.items()
        if growing.search(key) and "process_cpu" not in key and after.get(key, -1) < value
    }
    assert not back


def assert_promtool_takes(scraped: str) -> None:
    if PROMTOOL is not None:
        checked = subprocess.run(
            [PROMTOOL, "check", "metrics"], input=scraped, capture_output=True, text=True
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_sums_over_shards_are_the_kernels_and_nothing_goes_back_when_a_shard_dies() -> None:
    with running_nodes(settings={"metrics": {"listen": LISTEN, "max_age": "50ms"}}) as (a, b):
        tcp_transfer(a.namespace, b.namespace, b.virtual_ip, BYTES)
        under_load = scrape(a)
        udp_flow(a.namespace, b.namespace, b.virtual_ip, count=200, size=500)
        tcp_transfer(a.namespace, b.namespace, b.virtual_ip, BYTES, reverse=True)
        settled(a)
        assert_promtool_takes(under_load)
        wait_until(lambda: counted(a), SETTLE_S, "the scrape is the kernel's")
        values = series(scrape(a))
        only_grow(series(under_load), values)
        wait_until(lambda: processes_told(a), SETTLE_S, "CPU and memory of each process are told")
        assert total(values, "vpnd_shard_rtt_seconds_count") > 0
        assert total(values, "vpnd_control_handshake_seconds_count") + total(
            series(scrape(b)), "vpnd_control_handshake_seconds_count"
        )
        subprocess.run(["kill", "-9", str(shard_pid(a))], check=True)
        wait_until(lambda: a.ask()["shards"][0]["restarts"] == 1, SETTLE_S, "it is started again")
        wait_connected([a, b], SETTLE_S)
        again = series(scrape(a))
        only_grow(values, again)


@pytest.mark.long("wants promtool, Debian's prometheus, 100 MB")
@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool")
@pytest.mark.timeout(180)
def test_promtool_takes_every_scrape_while_iperf3_runs_and_the_sums_are_the_kernels_after() -> None:
    with running_nodes(settings={"metrics": {"listen": LISTEN, "max_age": "50ms"}}) as (a, b):
        scraped: dict[Node, list[str]] = {a: [], b: []}

        def scrape_both() -> None:
            for _ in range(20):
                for node, texts in scraped.items():
                    texts.append(scrape(node))
                time.sleep(0.1)

        for options in ({"flows": 4}, {"reverse": True}, {"udp": True, "bitrate": "100M", "length": 1200}):
            iperf3(a.lab, a.namespace, b.namespace, b.virtual_ip, seconds=4, during=scrape_both, **options)
        for node, texts in scraped.items():
            for before, after in itertools.pairwise(texts):
                only_grow(series(before), series(after))
            moved = [total(series(text), "vpnd_tun_bytes_read_total") for text in texts]
            assert len(set(moved)) > len(moved) / 2, "they were of a moment at which packets moved"
            for text in texts:
                assert_promtool_takes(text)
            settled(node)
            wait_until(lambda node=node: counted(node), SETTLE_S, "the scrape is the kernel's")


def counted(node: Node) -> bool:
    """Whether what the shards count is what the supervisor and the kernel do, both ways. The kernel may have queued a
    packet more meanwhile, its own neighbour discovery for one."""
    values = series(scrape(node))
    out, back = kernels(node, "TX"), kernels(node, "RX")
    read = total(values, "vpnd_tun_reads_total"), total(values, "vpnd_tun_bytes_read_total")
    local = sum(
        value
        for key, value in values.items()
        if key.startswith("vpnd_dropped_records_total")
        and re.search("not_unicast|malformed_local|ring_full|shard_down", key)
    )
    from_tun = (
        total(values, "vpnd_shard_packets_from_tun_total") + total(values, "vpnd_tun_merged_total") + local
    )
    to_tun = total(values, "vpnd_shard_packets_to_tun_total"), total(values, "vpnd_shard_bytes_to_tun_total")
    return read == out and from_tun == read[0] and to_tun == back
