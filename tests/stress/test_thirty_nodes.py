"""A network of thirty on one machine: all join at once, become healthy, know each other, and take how much?"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import Lab, check_logs, ping, pss_bytes, wait_until
from lab.joining import address, invite, machine

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.long("takes minutes, and 4 GB"),
]

NODES = 30
JOIN_S = 300.0
#: Of a node with one shard and 29 peers; 171 MiB in the mean and 194 at most were measured.
MOST_PSS_BYTES = 240 << 20


def test_thirty_that_join_at_once_become_healthy() -> None:
    with Lab(NODES) as lab:
        # ninety processes begin at once, so the authority may be slow to answer
        patient = {"membership": {"join_timeout": "2m"}, "process": {"ready_timeout": "2m"}}
        nodes = [machine(lab, place, patient) for place in range(NODES)]
        nodes[0].start()
        nodes[0].wait_ready()
        token = invite(nodes[0], "--uses", str(NODES - 1))
        begun_s = time.monotonic()
        for node in nodes[1:]:
            node.start("--join", token)
        for node in nodes[1:]:
            node.wait_ready(JOIN_S)
        ready_s = time.monotonic() - begun_s

        def knows_all() -> bool:
            with ThreadPoolExecutor(4) as pool:
                told = list(pool.map(lambda node: node.ask(), nodes))
            return all(
                each.get("health") == "healthy" and each["network"]["members"] == NODES for each in told
            )

        wait_until(knows_all, JOIN_S, "all are healthy and know all")
        healthy_s = time.monotonic() - begun_s
        for one, other in zip(nodes, nodes[1:], strict=False):
            assert ping(lab, one.namespace, address(other), count=2, interval_s=0.2).loss < 1
        memory = [pss_bytes([node.ask()["supervisor"]["pid"]]) for node in nodes]
        mean = sum(memory) / NODES / (1 << 20)
        print(
            f"{NODES} nodes: all ready after {ready_s:.1f} s, healthy and known to all after {healthy_s:.1f} s; "
            f"PSS {mean:.0f} MiB a node, {max(memory) / (1 << 20):.0f} at most, {sum(memory) / (1 << 30):.2f} GiB"
        )
        assert max(memory) < MOST_PSS_BYTES
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda node: node.stop(), nodes)) == {0}
        check_logs(nodes)
