"""A flood of datagrams and TCP between two nodes on a link that is too slow for both."""

from __future__ import annotations

import pytest
from lab import Lab, check_logs, iperf3, settled, wait_connected, wait_until
from lab.link import Link
from lab.node import mesh_of_nodes
from lab.traffic import IPERF_PORT, goodput_bps

pytestmark = [pytest.mark.root, pytest.mark.slow]

RATE_MBIT = 40
SECONDS = 6
#: What TCP keeps: half is what is meant, in the long run.
LEAST_SHARE = 0.15


def test_a_flood_of_datagrams_does_not_starve_the_streams() -> None:
    with Lab(link=Link(delay_ms=5, rate_mbit=RATE_MBIT)) as lab:
        a, b = nodes = mesh_of_nodes(lab, shards=1)
        for node in nodes:
            node.start()
        wait_connected(nodes)
        for node in nodes:
            wait_until(
                lambda node=node: node.ask()["peers"][0]["datagrams"] == "used", 20, "datagrams arrive"
            )
        tcp: list[float] = []

        def beside() -> None:
            report = iperf3(lab, a.namespace, b.namespace, b.virtual_ip, seconds=SECONDS, port=IPERF_PORT + 1)
            tcp.append(goodput_bps(report) / 1e6)

        flood = iperf3(
            lab, a.namespace, b.namespace, b.virtual_ip, udp=True, bitrate=f"{RATE_MBIT * 3}M", length=1200,
            seconds=SECONDS + 3, during=beside,
        )  # fmt: skip
        udp = goodput_bps(flood) / 1e6
        shard = a.ask()["shards"][0]
        print(f"of {RATE_MBIT} Mbit/s: TCP {tcp[0]:.1f}, the flood beside it {udp:.1f}")
        assert tcp[0] > LEAST_SHARE * RATE_MBIT and udp > LEAST_SHARE * RATE_MBIT
        assert shard["packets_queued"] < a.config.get("worker", {}).get("buffer_size", 4096) * 2
        for node in nodes:
            settled(node)
            assert node.stop() == 0
        check_logs(nodes)
