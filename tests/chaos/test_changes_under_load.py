"""Commands that change a node while it is being hurt: scale while shards die, reload under load."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from typing import Any

import pytest
from chaos_tools import shard_pid
from lab import (
    Node,
    SteadyFlow,
    drops,
    iperf3,
    received_bytes,
    running_nodes,
    settled,
    unharmed,
    wait_connected,
    wait_until,
    within,
)

pytestmark = pytest.mark.root

SHARDS = 2


def test_scaling_while_shards_are_killed_ends_with_the_number_asked_for() -> None:
    with running_nodes(shards=SHARDS) as nodes:
        a, b = nodes
        assert a.ask("scale", shards=4)["shards"] == 4  # what is kept for a shard that was there once
        assert a.ask("scale", shards=SHARDS)["shards"] == SHARDS
        wait_connected(nodes)
        with unharmed(nodes), SteadyFlow(a.namespace, b.namespace, b.virtual_ip) as flow:
            ending = threading.Event()
            killed = 0

            def kill_any() -> None:
                nonlocal killed
                while not ending.wait(0.2):
                    shards = a.ask().get("shards", [])
                    if shards and (pid := shards[killed % len(shards)]["pid"]):
                        os.kill(pid, signal.SIGKILL)
                        killed += 1

            killer = threading.Thread(target=kill_any)
            killer.start()
            answers = []
            for count in itertools.cycle((4, 1, 3)):
                answers.append(a.ask("scale", shards=count))
                if killed >= 3 and len(answers) >= 3:
                    break
                time.sleep(0.05)
            ending.set()
            killer.join()
            wait_until(lambda: a.ask("scale", shards=SHARDS).get("shards") == SHARDS, 15, "it scales again")
            wait_connected(nodes)
        done = [answer.get("shards") for answer in answers]
        print(f"{killed} shards killed; scaled to {done}; lost {flow.lost} of {flow.sent}, late {flow.late}")
        for answer in answers:
            assert "shards" in answer or "before it was ready" in answer["error"], answer
        assert killed >= 3
        assert flow.late == 0
        assert flow.longest_gap_s() < within(3.0)
        dropped = drops(settled(a))
        assert set(dropped) <= {"shard_died", "shard_down", "no_session", "ring_full", "tun_queue_full"}


def reload(node: Node, **tables: dict[str, Any]) -> set[str]:
    """Change the configuration and take it over; the keys that were."""
    node.config.update(tables)
    node.write_config()
    answer = node.ask("reload")
    assert not answer["needs_restart"], answer
    return {row["key"] for row in answer["applied"]}


@pytest.mark.alone
def test_settings_of_health_and_multiplexer_change_under_load_and_nothing_is_lost() -> None:
    # A new interval begins with the probe that is due by the old one.
    with running_nodes(shards=SHARDS, settings={"health": {"interval": "1s"}}) as nodes, unharmed(nodes):
        a, b = nodes

        def probes() -> int:
            return sum(shard["health_probes"] for shard in a.ask()["shards"])

        with SteadyFlow(a.namespace, b.namespace, b.virtual_ip) as flow:

            def change() -> None:
                time.sleep(0.5)
                before = probes()
                keys = reload(
                    a,
                    health={"interval": "100ms", "timeout": "1s"},
                    multiplexer={"max_sessions": 4, "auto_scaling_interval": "50ms", "busy_bytes": 1 << 12},
                )
                assert {"health.interval", "multiplexer.max_sessions"} <= keys
                wait_until(lambda: probes() > before + 20, 5, "it is probed as often as is said now")
                wait_until(
                    lambda: max(shard["sessions"] for shard in a.ask()["shards"]) > 2,
                    5,
                    "there are more sessions than the two that were allowed",
                )
                reload(a, health={}, multiplexer={})

            report = iperf3(a.lab, a.namespace, b.namespace, b.virtual_ip, seconds=6, flows=4, during=change)
        assert received_bytes(report) > 0
        assert (flow.lost, flow.late) == (0, 0)
        for node in nodes:
            assert set(drops(settled(node))) <= {
                "tun_queue_full",
                "ring_full",
                "queue_full",
                "queue_delay",
                "flow_full",
            }
        assert not sum(shard["health_deaths"] for shard in a.ask()["shards"])
        assert shard_pid(a, 0) and shard_pid(a, 1)
