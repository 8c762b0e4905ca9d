"""kill -9 of a node's children under traffic: what each death may cost, and what it must not."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time

import pytest
from chaos_tools import descriptors, kill, kill_shard, shard_pid, udp_port_of, wait_restarted
from lab import (
    Node,
    SteadyFlow,
    drops,
    iperf3,
    ping,
    pss_bytes,
    received_bytes,
    running_nodes,
    settled,
    tcp_transfer,
    wait_connected,
    wait_until,
    within,
)

pytestmark = pytest.mark.root

#: A killed shard's flows flow again within this time.
AGAIN_S = 2.0


def flow_of(one: Node, other: Node, shard: int) -> SteadyFlow:
    """A steady flow that the given one of the sender's two shards carries."""
    port = udp_port_of(other.virtual_ip, shard, 2)
    return SteadyFlow(one.namespace, other.namespace, other.virtual_ip, port=port)


@pytest.mark.parametrize("victim", [1])
def test_a_killed_shard_costs_the_other_shards_flows_nothing_and_its_own_not_long(victim: int) -> None:
    with running_nodes() as (a, b):
        with flow_of(a, b, 1 - victim) as other, flow_of(a, b, victim) as own:
            time.sleep(1.0)
            kill_shard(a, victim)
            time.sleep(2.0)
            wait_restarted(a, 1, victim)
            wait_connected([a, b])
            time.sleep(0.5)
        assert (other.lost, other.late) == (0, 0)
        assert own.longest_gap_s() < within(AGAIN_S)
        assert own.numbers[-1] > 0.99 * own.sent
        print(f"its own flow: nothing for {own.longest_gap_s():.3f} s, {own.lost} of {own.sent} lost")
        for node in (a, b):
            settled(node)
        assert a.ask()["shards"][victim]["restarts"] == 1
        assert a.ask()["shards"][1 - victim]["restarts"] == 0


def test_a_killed_shard_of_the_receiver_costs_a_moment_at_most() -> None:
    with running_nodes() as (a, b):
        for index in (0, 1):
            with flow_of(a, b, 0) as first, flow_of(a, b, 1) as second:
                time.sleep(0.5)
                kill_shard(b, index)
                time.sleep(1.5)
                wait_connected([a, b])
            assert max(first.longest_gap_s(), second.longest_gap_s()) < within(AGAIN_S)
            # From the second death on, both flows may end in the shard that took over after the first.
            if index == 0:
                assert first.lost == 0 or second.lost == 0, "the flow over the shard that lives loses nothing"
        tcp_transfer(a.namespace, b.namespace, b.virtual_ip, 4 << 20)
        settled(a)
        settled(b)


def test_a_killed_control_costs_nobody_a_session_and_the_next_one_knows_them() -> None:
    with running_nodes() as (a, b):
        before = a.ask()
        with flow_of(a, b, 0) as first, flow_of(a, b, 1) as second:
            time.sleep(0.5)
            kill(before["control"]["pid"])
            wait_restarted(a, 1)
            wait_connected([a, b])
            time.sleep(0.5)
        for flow in (first, second):
            assert (flow.lost, flow.late) == (0, 0)
        after = a.ask()
        assert after["peers"][0]["sessions"] == before["peers"][0]["sessions"]
        assert after["control"]["counters"]["dials"] == before["control"]["counters"]["dials"]
        for shard_before, shard_after in zip(before["shards"], after["shards"], strict=True):
            assert shard_after["sessions_closed"] == shard_before["sessions_closed"]
        kill_shard(a, 0)
        wait_restarted(a, 1, 0)
        wait_connected([a, b])
        assert a.ask()["shards"][0]["sessions"] > 0
        tcp_transfer(a.namespace, b.namespace, b.virtual_ip, 4 << 20)


def test_children_that_die_together_come_back_together() -> None:
    with running_nodes() as (a, b):
        status = a.ask()
        with flow_of(a, b, 0) as first, flow_of(a, b, 1) as second:
            time.sleep(0.5)
            for child in (status["control"], *status["shards"]):
                kill(child["pid"])
            wait_restarted(a, 1)
            wait_connected([a, b])
            time.sleep(0.5)
        for flow in (first, second):
            # Control alone takes half of it to load.
            assert flow.longest_gap_s() < within(2 * AGAIN_S)
            assert flow.late == 0
        dropped = settled(a)["dropped"]
        assert dropped["no_route"] == 0, "a shard knows the peers before control is back"
        print({reason: count for reason, count in dropped.items() if count})


def test_a_shard_that_dies_again_and_again_waits_longer_each_time_and_the_node_lives() -> None:
    with running_nodes() as (a, b):
        for _ in range(5):
            kill_shard(a, 0)
            wait_until(lambda: shard_pid(a, 0) == 0, 5, "its death is noticed")
        waits = [int(wait) for wait in re.findall(r"starting it again in (\d+) ms", a.log_file.read_text())]
        assert waits == [50, 100, 200, 400, 800]
        assert ping(a.lab, a.namespace, b.virtual_ip, count=10).loss == 0, "by way of the other shard"
        wait_restarted(a, 5, 0)
        wait_connected([a, b])


@pytest.mark.slow
@pytest.mark.alone
def test_sixteen_flows_end_normally_while_processes_die_at_random() -> None:
    chance = random.Random(20)
    seconds = 9
    with running_nodes() as (a, b):
        iperf3(a.lab, a.namespace, b.namespace, b.virtual_ip, flows=16, seconds=1)
        supervisors = [node.ask()["supervisor"]["pid"] for node in (a, b)]
        memory = [pss_bytes(node.pids()) for node in (a, b)]
        opened = [descriptors(pid) for pid in supervisors]
        in_control = [descriptors(node.ask()["control"]["pid"]) for node in (a, b)]
        killed = [0, 0]
        ending = threading.Event()

        def kill_at_random() -> None:
            while not ending.wait(2.0):
                place = chance.randrange(2)
                # One that was killed may not be back yet: with all CPUs taken a start lasts seconds.
                if living := [pid for index in range(2) if (pid := shard_pid((a, b)[place], index))]:
                    kill(chance.choice(living))
                    killed[place] += 1

        killer = threading.Thread(target=kill_at_random)

        def during() -> None:
            killer.start()
            threading.Timer(seconds - 3, ending.set).start()

        report = iperf3(
            a.lab, a.namespace, b.namespace, b.virtual_ip, flows=16, seconds=seconds, during=during
        )
        killer.join()
        assert received_bytes(report) > 10 << 20
        assert sum(killed) >= 2
        print(f"{killed} shards killed, {received_bytes(report) >> 20} MiB carried")
        wait_connected([a, b], 30)
        for place, node in enumerate((a, b)):
            status = settled(node)
            assert status["supervisor"]["pid"] == supervisors[place]
            assert sum(shard["restarts"] for shard in status["shards"]) == killed[place]
            assert status["control"]["restarts"] == 0
            wait_until(
                lambda place=place: descriptors(supervisors[place]) <= opened[place],
                10,
                f"the supervisor has no more descriptors than the {opened[place]} before",
            )
            wait_until(
                lambda place=place, pid=status["control"]["pid"]: descriptors(pid) <= in_control[place] + 1,
                10,
                f"control has no more descriptors than the {in_control[place]} before",
            )
            after = pss_bytes(node.pids())
            print(f"PSS {memory[place] >> 20} -> {after >> 20} MiB")
            assert after < memory[place] * 1.15 + (8 << 20)


def test_a_shard_that_hangs_costs_its_own_flows_only_and_does_not_keep_the_node_from_stopping() -> None:
    # The peer must not take the pause for an end: what is in a session that it gives up is lost uncounted. So are
    # datagrams for which its socket has no room when all that has waited comes at once.
    with running_nodes(settings={"health": {"interval": "1m"}, "carrier": {"choice": "streams"}}) as (a, b):
        stopped = shard_pid(a, 0)
        os.kill(stopped, signal.SIGSTOP)
        with flow_of(a, b, 0) as own, flow_of(a, b, 1) as other:
            time.sleep(1.0)
            begun_s = time.monotonic()
            status = a.status()
            assert time.monotonic() - begun_s < 5
            assert status["shards"][0]["ring"]["used"] > 0
            os.kill(stopped, signal.SIGCONT)
            time.sleep(0.5)
        assert (other.lost, other.late) == (0, 0)
        assert own.late == 0
        # What was dropped is counted in records, of which one may hold several datagrams of the flow.
        counted = sum(drops(settled(a)).values())
        assert own.lost >= counted and (own.lost > 0) == (counted > 0)
        os.kill(stopped, signal.SIGSTOP)
        assert a.stop() == 0
