"""What members behind NATs are promised beside being reached: what a relay costs, what an upgrade does not, and being
back when their routers were away. Long: VPND_LONG_TESTS=1."""

from __future__ import annotations

import os
import re
import signal
import statistics
import time

import pytest
from lab import Node, check_logs, wait_for_answer, wait_until, within
from lab.joining import address, join, machine
from lab.nat import NatLab
from lab.processes import command_line, cpu_seconds, process_tree
from lab.traffic import goodput_bps, iperf3, loss_share, out_of_order, ping, received_bytes
from test_nat import PROBE_S, REACHED_S, RTT_MS, Pings, paths

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.long("takes minutes"),
    pytest.mark.timeout(400),
]

#: From when the router works again.
BACK_S = 3.0
#: A session through a relay that begins to say nothing: noticed, given up, and made anew through another one.
SWALLOWED_S = 12.0
RUNS = 3


def directly(node: Node, name: str) -> bool:
    return bool(paths(node, name)) and all(path.startswith("direct") for path in paths(node, name))


def relay_pids(node: Node) -> list[int]:
    return [pid for pid in process_tree(node.pids()) if "vpnd.relay" in command_line(pid)]


def begin_behind(kind: str, a: Node, b: Node) -> None:
    """Both gateways are NATs of that kind from now on, and b is started again and reaches a."""
    for gateway in (1, 2):
        a.lab.nat(gateway, kind)
    assert b.stop() == 0
    b.start()
    b.wait_ready()
    wait_for_answer(a.lab, b.namespace, address(a), REACHED_S, probe_wait_s=PROBE_S)
    if kind == "masq":
        wait_until(lambda: directly(b, "a"), REACHED_S, "they have a direct connection")


def test_an_upgrade_under_load_costs_no_packet_in_any_shard() -> None:
    settings = {"nat": {"upgrade_interval": "3s"}, "worker": {"shards": 2}}
    with NatLab(hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        for gateway in (1, 2):
            lab.nat(gateway, "fully")
        r, a, b = (machine(lab, place, settings) for place in range(3))
        r.start()
        r.wait_ready()
        for node in (a, b):
            join(r, node)
        wait_for_answer(lab, a.namespace, address(b), REACHED_S, probe_wait_s=PROBE_S)
        for node in (a, b):
            wait_until(
                lambda node=node: all(shard["sessions"] >= 2 for shard in node.ask()["shards"]),
                REACHED_S,
                "each shard has a session with each of the two others",
            )

        def routers_change() -> None:
            time.sleep(2.0)
            for gateway in (1, 2):
                lab.nat(gateway, "masq")

        sent = iperf3(
            lab, a.namespace, b.namespace, address(b), flows=4, seconds=20, udp=True, length=1000,
            bitrate="4M", during=routers_change,
        )  # fmt: skip
        assert directly(a, "b") and directly(b, "a"), "it was upgraded meanwhile"
        lost, late = loss_share(sent), out_of_order(sent)
        print(f"upgraded under load: {lost:.6f} lost, {late} out of order of {sent['end']['sum']['packets']}")
        assert (lost, late) == (0.0, 0)
        check_logs([r, a, b])


def test_a_relayed_path_has_half_of_a_direct_one_and_costs_little() -> None:
    with NatLab(hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        r, a, b = (machine(lab, place) for place in range(3))
        r.start()
        r.wait_ready()
        for node in (a, b):
            join(r, node)
        speeds: dict[str, list[float]] = {}
        for kind in ("masq", "fully"):
            begin_behind(kind, a, b)
            before_s = cpu_seconds(relay_pids(r))
            reports = [iperf3(lab, a.namespace, b.namespace, address(b), seconds=4) for _ in range(RUNS)]
            spent_s = cpu_seconds(relay_pids(r)) - before_s
            speeds[kind] = [goodput_bps(report) / 1e9 for report in reports]
            moved = sum(map(received_bytes, reports))
        assert all(path.startswith("relayed") for path in paths(b, "a"))
        through = ping(lab, a.namespace, address(b), count=100).avg_ms
        legs = sum(ping(lab, node.namespace, address(r), count=100).avg_ms for node in (a, b))
        direct, relayed = (statistics.median(speeds[kind]) for kind in ("masq", "fully"))
        print(f"direct {direct:.2f}, relayed {relayed:.2f} Gbit/s ({relayed / direct:.2f} of it)")
        print(
            f"relay {spent_s / moved * 1e9:.2f} s of CPU a GB; ping {through:.2f} ms, both legs {legs:.2f} ms"
        )
        assert relayed >= 0.5 * direct and spent_s <= 0.5 * moved / 1e9
        assert through <= legs + 1.0
        check_logs([r, a, b])


@pytest.mark.parametrize("place", [1, 2], ids=["a's", "b's"])
def test_who_is_behind_an_address_that_changes_is_back(place: int) -> None:
    """Nobody says so: packets go out from the new one, and what answers the old one is lost."""
    with NatLab(hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        r, a, b = (machine(lab, place) for place in range(3))
        r.start()
        r.wait_ready()
        for node in (a, b):
            join(r, node)
        begin_behind("masq", a, b)
        time.sleep(2.0)  # datagrams are found
        sent = Pings(b, address(a), count=200, interval_s=0.05)
        time.sleep(2.0)
        lab.move(place)
        gap_s = sent.longest_gap_s()
        print(f"{gap_s:.2f} s without an answer when a NAT's address changed")
        assert gap_s <= within(BACK_S)
        wait_until(
            lambda: paths(b, "a") and paths(b, "a")[0].startswith("direct"),
            REACHED_S,
            "as good a path as before",
        )
        check_logs([r, a, b])


def test_who_lost_the_routers_memory_or_the_only_relay_is_told_or_back() -> None:
    with NatLab(hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        r, a, b = (machine(lab, place, {"nat": {"relay_retry": "1s"}}) for place in range(3))
        r.start()
        r.wait_ready()
        for node in (a, b):
            join(r, node)
        for kind in ("masq", "fully"):
            begin_behind(kind, a, b)
            before = paths(b, "a")[0].split()[0]
            sent = Pings(b, address(a), count=400, interval_s=0.05)
            time.sleep(2.0)
            lab.restart(2)
            gap_s = sent.longest_gap_s()
            print(f"{kind}: {gap_s:.2f} s without an answer when a router started again")
            assert gap_s <= within(BACK_S)
            wait_until(lambda: paths(b, "a"), REACHED_S, "there is a session")
            assert paths(b, "a")[0].split()[0] == before, "as good a path as before"

        # nobody relays any more, and status says what to do
        assert r.stop() == 0
        remedy = re.compile(r"no member that both can reach relays: forward a port")

        def told() -> bool:
            lab.run(b.namespace, "ping", "-c1", "-W1", address(a), check=False)
            return bool(remedy.search(b.vpnd("status", check=False).stdout.replace("\n", " ")))

        wait_until(told, 6 * REACHED_S, "status says that a relay is missing")
        check_logs([a, b])


def test_a_relay_that_swallows_everything_costs_a_meeting_little() -> None:
    """It accepts connections, as a process that has stopped does, and says nothing."""
    with NatLab(public=2, hidden=(1, 1), rtt_ms=RTT_MS) as lab:
        r, s, a, b = (machine(lab, place) for place in range(4))
        r.start()
        r.wait_ready()
        for node in (s, a, b):
            join(r, node)
        begin_behind("fully", a, b)
        used = r if any("via r" in path for path in paths(b, "a")) else s
        pids = process_tree(used.pids())
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            begun_s = time.monotonic()
            wait_for_answer(lab, b.namespace, address(a), 30, probe_wait_s=PROBE_S)
            time.sleep(1.0)
            wait_for_answer(lab, b.namespace, address(a), 30, probe_wait_s=PROBE_S)
            under_way_s = time.monotonic() - begun_s
            assert b.stop() == 0
            begun_s = time.monotonic()
            b.start()
            b.wait_ready()
            wait_for_answer(lab, b.namespace, address(a), 30, probe_wait_s=PROBE_S)
            started_s = time.monotonic() - begun_s
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        print(f"through the other relay after {under_way_s:.2f} s; from a start on {started_s:.2f} s")
        assert started_s <= within(BACK_S) and under_way_s <= within(SWALLOWED_S)
        check_logs([a, b])
