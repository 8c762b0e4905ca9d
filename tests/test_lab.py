"""The lab keeps its promises: it carries traffic, tells the truth about it, and leaves nothing behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from lab import (
    Lab,
    LabError,
    cpu_seconds,
    goodput_bps,
    iperf3,
    loss_share,
    pair_of_nodes,
    parse_ping,
    ping,
    process_tree,
    pss_bytes,
    to_toml,
    wait_for_answer,
    wait_until,
)
from lab.link import PROFILES, Link, parse
from lab.measure import METRICS, QUICK
from lab.node import ROOT
from lab.paired import measure_paired, paired_table, variants
from lab.report import absolute_table, medians, ratio_table, verdicts
from lab.ring_stress import stress
from root_tests import DID_NOT_RUN

root = pytest.mark.root


# -- the network -----------------------------------------------------------------------------------------


@root
@pytest.mark.parametrize(("nodes", "last"), [(2, "192.168.77.2"), (3, "192.168.77.3")])
def test_first_and_last_node_reach_each_other(nodes: int, last: str) -> None:
    with Lab(nodes) as lab:
        assert lab.nodes[-1].address == last
        assert ping(lab, lab.nodes[0], last, count=3).loss == 0
        assert lab.leaks() == []
    assert lab.leaks() == []


@root
def test_a_link_is_as_late_and_as_lossy_as_it_is_told() -> None:
    with Lab(link=Link(delay_ms=10, jitter_ms=2, loss_percent=10)) as lab:
        a, b = lab.nodes
        seen = ping(lab, a, b.address, count=300)
        assert seen.min_ms >= 16 and seen.avg_ms >= 19
        assert 0.1 < seen.loss < 0.3, "both ways together 19 %"


@root
def test_a_link_is_no_faster_than_its_rate() -> None:
    with Lab(link=Link(rate_mbit=20)) as lab:
        a, b = lab.nodes
        report = iperf3(lab, a, b, b.address, udp=True, seconds=1, length=1200, bitrate="60M")
        assert 10e6 < goodput_bps(report) < 21e6
        assert lab.leaks() == []


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("dsl", PROFILES["dsl"]),
        ("5", Link(5)),
        ("20,2,0.5", Link(20, 2, 0.5)),
        ("40,8,1,0,50", Link(40, 8, 1, 0, 50)),
    ],
)
def test_a_link_is_a_name_or_numbers(text: str, link: Link) -> None:
    assert parse(text) == link


@pytest.mark.parametrize("text", ["", "adsl", "1,2,101", "-1", "1,2,3,4,5,6", "1;2"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="DELAY"):
        parse(text)


@root
def test_two_labs_at_once_do_not_meet() -> None:
    with Lab() as one, Lab() as other:
        one.spawn(one.nodes[0], "sleep", "60")
        assert other.leaks() == []
        assert len(one.leaks()) == 1


@root
def test_everything_that_appears_in_a_node_is_a_leak_until_it_is_gone() -> None:
    with Lab() as lab:
        a = lab.nodes[0]
        lab.ip(a, "link", "add", "extra0", "type", "bridge")
        lab.ip(a, "addr", "add", "10.1.2.3/24", "dev", "extra0")
        lab.ip(a, "link", "set", "extra0", "up")
        lab.spawn(a, "iperf3", "-s", "-p", "4321")
        wait_until(lambda: any("socket" in item for item in lab.leaks()), 5, "a listening socket")
        kinds = {item.split()[1] for item in lab.leaks()}
        assert kinds == {"device", "address", "route", "process", "socket"}


@root
def test_processes_that_fork_or_leave_their_session_end_with_the_lab() -> None:
    with Lab() as lab:
        lab.spawn(
            lab.nodes[0], "sh", "-c", "sleep 60 & setsid sleep 61 & trap '' TERM; sleep 0.5; exec sleep 62"
        )
        wait_until(lambda: len(lab.leaks()) >= 3, 5, "three processes")
    assert lab.leaks() == []


@root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_interrupted_in_its_lab_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    program = """
import pathlib, sys, time
from lab import Lab, clean_exit_on_signals
with clean_exit_on_signals(), Lab() as lab:
    lab.spawn(lab.nodes[0], "sleep", "60")
    pathlib.Path(sys.argv[1]).write_text(lab.nodes[0].name + " " + str(lab.directory))
    time.sleep(60)
"""
    told = tmp_path / "told"
    path = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(told)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: told.exists() and told.read_text(), 20, "the lab opens")
    process.send_signal(number)
    assert process.wait(timeout=20) != 0
    namespace, directory = told.read_text().split()
    assert not Path("/run/netns", namespace).exists()
    assert not Path(directory).exists()


@root
def test_a_command_that_fails_says_why_and_one_that_hangs_is_ended() -> None:
    with Lab() as lab:
        with pytest.raises(LabError, match="exit code 3: no such luck"):
            lab.run(lab.nodes[0], "sh", "-c", "echo no such luck >&2; exit 3")
        with pytest.raises(LabError, match="not done after"):
            lab.run(lab.nodes[0], "sleep", "60", timeout_s=0.2)
        assert lab.leaks() == []


@root
def test_impairing_the_link_shows_in_the_ping_and_can_be_undone_where_the_kernel_can() -> None:
    with Lab() as lab:
        a, b = lab.nodes
        with pytest.raises(LabError, match="netem"):
            lab.impair(a, "dilly 20ms")
        try:
            lab.impair(a, "delay 20ms")
        except LabError as error:
            assert str(error) == "this kernel has no netem"
            return
        assert ping(lab, a, b.address, count=3).min_ms >= 20
        lab.impair(a, "")
        assert ping(lab, a, b.address, count=3).min_ms < 20


# -- traffic and its cost --------------------------------------------------------------------------------


@root
def test_iperf3_reports_goodput_both_ways_and_udp_arrives_at_the_offered_rate() -> None:
    with Lab() as lab:
        a, b = lab.nodes
        for reverse in (False, True):
            assert goodput_bps(iperf3(lab, a, b, b.address, seconds=1, flows=2, reverse=reverse)) > 1e8
        udp = iperf3(lab, a, b, b.address, seconds=1, udp=True, length=1200, bitrate="10M", flows=2)
        assert goodput_bps(udp) * (1 + loss_share(udp)) == pytest.approx(10e6, rel=0.2)
        assert lab.leaks() == []


@root
def test_iperf3_without_a_way_to_the_server_is_an_error_and_leaves_no_server() -> None:
    with Lab() as lab:
        with pytest.raises(LabError, match="iperf3"):
            iperf3(lab, *lab.nodes, "10.99.99.99", seconds=1)
        assert lab.leaks() == []


@root
def test_waiting_for_an_answer_ends_when_it_comes_or_is_overdue() -> None:
    with Lab() as lab:
        a, b = lab.nodes
        assert wait_for_answer(lab, a, b.address, timeout_s=5) < 5
        with pytest.raises(LabError, match="answer from"):
            wait_for_answer(lab, a, "192.168.77.99", timeout_s=0.2)


def test_a_process_tree_costs_what_its_members_cost() -> None:
    program = "import os, time\nif os.fork() == 0:\n  end = time.process_time() + .2\n"
    program += "  while time.process_time() < end: pass\n  os._exit(0)\nos.wait(); input()"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    try:
        assert process.pid in process_tree([process.pid])
        wait_until(lambda: cpu_seconds([process.pid]) >= 0.15, 10, "the dead child's time is counted")
        assert pss_bytes([process.pid]) > 1_000_000
    finally:
        process.kill()
        process.communicate()
    assert cpu_seconds([process.pid]) == 0


PING_LINES = """PING 10.86.0.2 (10.86.0.2) 56(84) bytes of data.
64 bytes from 10.86.0.2: icmp_seq=1 ttl=64 time=1.00 ms
64 bytes from 10.86.0.2: icmp_seq=2 ttl=64 time=3 ms
64 bytes from 10.86.0.2: icmp_seq=2 ttl=64 time=9 ms (DUP!)
64 bytes from 10.86.0.2: icmp_seq=5 ttl=64 time=7 ms
5 packets transmitted, 3 received, +1 duplicates, 40% packet loss, time 3ms
"""


def test_ping_output_becomes_numbers_and_neither_duplicates_nor_further_requests_count() -> None:
    assert parse_ping(PING_LINES, count=4) == (1.0, 2.0, 3.0, 3.0, 0.5)


def test_a_ping_without_any_answer_is_all_loss() -> None:
    nothing = parse_ping("4 packets transmitted, 0 received, 100% packet loss", count=4)
    assert nothing.loss == 1
    assert math.isnan(nothing.avg_ms)


def test_a_variant_is_compared_with_the_first_round_by_round() -> None:
    one = [{"ping_avg": 1.0, "tcp1_forward": 3.0}, {"ping_avg": 3.0, "tcp1_forward": 5.0}]
    other = [{"ping_avg": 1.2, "tcp1_forward": 2.0}, {"ping_avg": 3.2, "tcp1_forward": 4.0}]
    lines = paired_table({"this": one, "@other": other}).splitlines()
    assert lines[0].split() == ["this", "@other"]
    assert [line.split() for line in lines[1:]] == [
        ["TCP", "1", "flow", "A->B", "Gbit/s", "4.00", "3.00", "-25.0", "%", "±0.0"],
        ["ping", "idle", "avg", "ms", "2.00", "2.20", "+10.0", "%", "±0.0"],
    ]
    watched = [{**numbers, "watchers": 4.0} for numbers in other]
    last = paired_table({"this": one, "this, watched": watched, "@other": other}).splitlines()[-1]
    assert last.split() == ["CPU", "of", "watchers", "ms/s", "-", "4.00", "-"]


def test_variants_are_checkouts_and_settings(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert variants(here, [there], ["VPND_A_B=1,VPND_C_D=x=y"], watched=False) == [
        ("this", here, {}, False),
        (f"@{there}", there, {}, False),
        ("VPND_A_B=1,VPND_C_D=x=y", here, {"VPND_A_B": "1", "VPND_C_D": "x=y"}, False),
    ]
    for settings, said in (
        (["PATH=/"], "must be VPND_"),
        (["VPND_A"], "must be VPND_"),
        ([], "nothing to"),
        (["VPND_A_B=1"] * 2, "twice"),
    ):
        with pytest.raises(LabError, match=said):
            variants(here, [], settings, watched=False)


@root
def test_two_variants_up_at_once_are_measured_in_turns() -> None:
    compared = variants(ROOT, [], [], watched=True)
    said: list[str] = []
    plan = replace(QUICK, pings=5, udp_seconds=1)
    measured = measure_paired(compared, 1, 1, plan, said.append)
    assert measured.keys() == {"this", "this, watched"} and len(said) == 1
    for (numbers,) in measured.values():
        assert numbers["tcp1_forward"] > 0 and numbers["udp_flood"] > 0 and 0 < numbers["ping_avg"] < 1000
        assert 0 < numbers["cpu_idle"] < 2000
    (looking,) = measured["this, watched"]
    assert 0 < looking["watchers"] < 1000


# -- vpnd in it ------------------------------------------------------------------------------------------


@root
def test_a_pair_of_nodes_talks_and_leaves_nothing_whether_stopped_or_killed() -> None:
    with Lab() as lab:
        a, b = pair_of_nodes(lab, shards=1)
        for node in (a, b):
            node.start()
        assert a.wait_ready()["node"]["virtual_ip"] == a.virtual_ip
        wait_for_answer(lab, lab.nodes[0], b.virtual_ip, timeout_s=20)
        assert a.status()["peers"][0]["name"] == "b"
        assert len(process_tree(b.pids())) >= 3, "supervisor, control, one shard"
        assert a.stop() == 0
        b.kill()
        assert b.wait_ended() == -signal.SIGKILL
        wait_until(lambda: not lab.leaks(), 10, "the children of the killed node end, its device goes")
        assert b.ask() == {}


@root
def test_a_node_that_cannot_start_says_why() -> None:
    with Lab() as lab:
        node, _ = pair_of_nodes(lab)
        node.config["network"]["mtu"] = 1
        node.start()
        with pytest.raises(LabError, match=r"a ended with 2: .*network\.mtu"):
            node.wait_ready()


# -- configuration files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"network": {"interface": "vpnd0", "mtu": 1400, "routes": ["10.86.0.0/16"], "offloads": True}},
        {"peers": [{"name": "b", "addresses": []}, {"name": 'a "quoted" \\ name', "addresses": ["x", "y"]}]},
        {"session": {"ratio": 0.5}},
        {},
    ],
)
def test_a_written_configuration_reads_back_as_it_was(config: dict[str, object]) -> None:
    assert tomllib.loads(to_toml(config)) == config


# -- the bench's arithmetic ------------------------------------------------------------------------------

RESULTS = {
    "veth": {"tcp1_forward": 20.0, "tcp1_reverse": 20.0, "ping_avg": 0.05},
    "nebula": {"tcp1_forward": 0.6, "tcp1_reverse": 1.5, "ping_avg": 0.3, "udp": 300.0, "start": 0.1},
    "wireguard-go": {"tcp1_forward": 0.5, "tcp1_reverse": 0.5, "ping_avg": 0.4, "udp": 400.0},
    "vpnd-2": {
        "tcp1_forward": 7.0,
        "tcp1_reverse": 5.0,
        "ping_avg": 0.44,
        "udp": 350.0,
        "loaded_avg": 1.6,
        "start": 3.5,
    },
}


def test_verdicts_hold_each_requirement_against_the_same_run() -> None:
    failed = {check.text for check in verdicts(RESULTS) if not check.passed}
    assert failed == {
        "vpnd-2 UDP 1200 goodput >= 1.8 x the better",
        "vpnd-2 ping idle avg <= 1.3 x the better",
        "vpnd-2 start to first ping <= 3 s",
    }
    assert len(verdicts(RESULTS)) == 5


def test_nothing_is_judged_that_was_not_measured() -> None:
    assert verdicts({"vpnd-1": {"tcp1_forward": 7.0, "loaded_avg": 1.6}}) == []


def test_medians_pass_over_rounds_without_the_number() -> None:
    assert medians([{"udp": 1.0}, {"udp": float("nan")}, {"udp": 3.0, "start": 2.0}, {"udp": 9.0}]) == {
        "udp": 3.0,
        "start": 2.0,
    }


def test_tables_have_a_row_per_metric_and_compare_with_the_better_rival() -> None:
    table = absolute_table(RESULTS).splitlines()
    assert len(table) == len(METRICS) + 1
    rows = {line.split("  ")[0]: line.split() for line in ratio_table("vpnd-2", RESULTS).splitlines()}
    assert rows["UDP 1200 goodput"][-4:] == ["-", "1.17x", "0.88x", "0.88x"]
    assert rows["ping idle avg"][-4:] == ["8.80x", "1.47x", "1.10x", "1.47x"]


# -- the rings -------------------------------------------------------------------------------------------


def test_rings_carry_every_record_between_processes_once_in_order_undamaged() -> None:
    begin = time.monotonic()
    sent, received = stress(total_bytes=300_000_000, ring_bytes=1 << 18, seed=7)
    assert (sent.fault, received.fault) == ("", "")
    assert (sent.records, sent.payload_bytes) == (received.records, received.payload_bytes)
    assert sent.wakeups > 0, "the ring never ran full: the test tested less than it says"
    assert received.wakeups > 0, "the ring never ran empty: the test tested less than it says"
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(("asked", "code"), [("", 0), ("1", DID_NOT_RUN)])
def test_a_root_test_that_did_not_run_is_a_failure_unless_it_is_long_and_nobody_asked(
    asked: str, code: int
) -> None:
    tests = Path(__file__).parent / "netns" / "test_page_browser.py"
    environment = {**os.environ, "VPND_LONG_TESTS": asked, "PATH": "/nowhere"}  # no browser there
    command = [sys.executable, "-m", "pytest", "-q", "--root-tests-must-run", str(tests)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests.parents[2])
    assert done.returncode == code, done.stdout
