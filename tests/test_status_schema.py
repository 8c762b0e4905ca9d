"""The status: what its fields promise, what makes a node ill, and what people are shown of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_daemon import daemon
from prometheus_client import generate_latest

from supervisor import report
from vpnd import status
from vpnd.cli import main, memberview, statusview
from vpnd.config.live import Live
from vpnd.config.schema import Config, Metrics
from vpnd.config.schema import Status as StatusSettings
from vpnd.exporter import families
from vpnd.exposition import Text
from vpnd.status import Ailment, Status, known_as

DOCS = Path(__file__).resolve().parents[1] / "docs"
NETWORK = {
    "name": "home", "label": "a", "network_id": "00ff", "state": "member", "current": True, "authority": True,
    "authorities": 1, "members": 3, "expires_s": 3600.0, "neighbours": 2,
}  # fmt: skip
TOLD: dict[str, Any] = {
    "ready": True,
    "version": "0.1.0",
    "node": {
        "name": "a", "peer_id": "12D3KooWx", "virtual_ip": "10.86.0.1", "uptime_s": 3725.0, "shards": 1,
    },
    "supervisor": {"pid": 1},
    "control": {"pid": 2, "state": "up"},
    "shards": [
        {"index": 0, "pid": 3, "state": "up", "rss_bytes": 1 << 20, "ring": {"used": 1, "size": 4}},
    ],
    "peers": [
        {
            "name": "b", "virtual_ip": "10.86.0.2", "state": "connected", "rtt_ms": 0.25, "sessions": 2,
            "streams": 3, "suspect": 1, "queue_delay_ms": 0.75, "addresses": ["/ip4/192.0.2.2/tcp/4001"],
        },
        {
            "name": "c", "virtual_ip": "10.86.0.3", "state": "backoff", "last_error": "refused", "next_dial_s": 2.0,
            "circuit": "open", "circuit_opened": 1,
        },
    ],
    "tun": {"interface": "vpnd0", "mtu": 1400, "offloads": ["CSUM", "TSO4"]},
    "flows": {"active": 3, "stalled": 1},
    "dropped": {"no_route": 3, "ring_full": 0}, "dropped_packets": {"no_route": 3, "ring_full": 0},
}  # fmt: skip


def made(**change: Any) -> Status:
    """The status above with something changed, as a node would judge it."""
    return status.judged(msgspec.convert({**TOLD, **change}, Status))


def shown(told: Status) -> str:
    return re.sub(r"\x1b\[\d+m", "", statusview.render(told))


# --- fields


def test_the_reference_is_that_of_these_fields():
    assert (DOCS / "status.md").read_text() == status.reference(), (
        "docs/status.md is stale: vpnd status --reference > docs/status.md"
    )


def test_a_status_becomes_json_and_comes_back_as_it_was():
    told = made(network=NETWORK)
    assert msgspec.json.decode(msgspec.json.encode(told), type=Status) == told


def test_a_status_of_another_version_is_read():
    assert msgspec.convert({}, Status) == Status()
    assert msgspec.convert({"new": 1, "node": {"newer": 2}, "dropped": {"new_reason": 3}}, Status)
    assert "new_reason" in shown(made(dropped_packets={"new_reason": 3}))


def test_the_schema_describes_every_field(capsys):
    assert main(["status", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    parts = schema["$defs"]
    assert set(parts["Status"]["properties"]) == set(Status.__struct_fields__)
    for part in parts.values():
        assert all(field["description"] for field in part["properties"].values())
    assert parts["Peer"]["properties"]["rtt_ms"]["unit"] == "milliseconds"


def test_the_mean_sizes_of_superpackets_and_batches_are_shown_once_there_are_any():
    assert "in a record" not in shown(made()) and "in a batch" not in shown(made())
    books = {"out": {"sent": 10, "sent_packets": 310}, "in": {"received": 4, "received_packets": 50}}
    shards, gone = [{"packets_from_tun": 9, "batches": 2}], [{"packets_from_tun": 1, "batches": 2}]
    said = shown(made(books=books, shards=shards, retired=gone))
    assert "310 packets sent, 31.0 in a record, 2.5 records in a batch\n" in said
    assert "50 packets received, 12.5 in a record\n" in said


# --- ailments

AILING = [
    # (sentence, what is different, ailment, health)
    ("not ready", {"ready": False}, "not ready yet", "down"),
    ("control restarting", {"control": {"state": "restarting"}}, "control is restarting", "degraded"),
    (
        "control hangs",
        {"control": {"state": "up", "answers": False}},
        "control does not answer",
        "degraded",
    ),
    (
        "a shard restarting",
        {"node": {"shards": 2}, "shards": [{"state": "restarting"}, {"state": "up"}]},
        "1 of 2 shards not running: 0 restarting",
        "degraded",
    ),
    (
        "a shard hangs",
        {"node": {"shards": 2}, "shards": [{"state": "up"}, {"index": 1, "state": "up", "answers": False}]},
        "shard 1 does not answer",
        "degraded",
    ),
    (
        "one that stays is restarting while another goes",
        {"node": {"shards": 1}, "shards": [{"state": "restarting"}, {"state": "draining"}]},
        "1 of 1 shard not running: 0 restarting",
        "down",
    ),
    ("alone", {"peers": [{"state": "dialing"}]}, "no peer is connected", "degraded"),
    (
        "the exit node is nobody",
        {"node": {"shards": 1, "exit_node": "x"}, "network": NETWORK},
        "there is no exit node x",
        "degraded",
    ),
    (
        "the exit node announces nothing",
        {
            "node": {"shards": 1, "exit_node": "c"},
            "network": NETWORK,
            "peers": [{"state": "connected"}, {"name": "c", "peer_id": "C", "state": "connected"}],
        },
        "c is no exit node now: it announces no way out",
        "degraded",
    ),
    (
        "the exit node is away",
        {
            "node": {"shards": 1, "exit_node": "c", "exit_peer": "C"},
            "network": NETWORK,
            "peers": [{"state": "connected"}, {"name": "c", "peer_id": "C", "state": "backoff"}],
        },
        "the exit node c is not connected",
        "degraded",
    ),
    (
        "all others lost to a step of the clock",
        {"peers": [], "network": {**NETWORK, "clock": "the clock was set by +9 s"}},
        "the clock was set by +9 s",
        "degraded",
    ),
    ("removed", {"network": {**NETWORK, "state": "removed"}}, "removed from network home", "down"),
    (
        "expired",
        {"peers": [], "network": {**NETWORK, "state": "expired"}},
        "its membership has expired in network home",
        "down",
    ),
]


@pytest.mark.parametrize(("what", "change", "ailment", "health"), AILING, ids=[row[0] for row in AILING])
def test_what_makes_a_node_ill_is_told_with_its_remedy(what, change, ailment, health):
    told = made(**change)
    assert told.health == health
    assert [found.what for found in told.ailments] == [ailment]
    said = shown(told)
    assert said.startswith(f"{known_as(told) or 'vpnd'}: {health}, ")
    assert f"! {ailment}" in said
    assert told.ailments[0].remedy in " ".join(said.split())


def test_a_healthy_node_has_no_ailment_and_shards_that_come_or_go_are_none():
    assert made().health == "healthy"
    shards = [{"state": "up"}, {"state": "draining"}, {"state": "starting"}]
    assert not made(shards=shards).ailments


def test_the_worst_ailment_is_the_health_and_comes_first():
    told = status.judged(
        made(control={"state": "restarting"}), (Ailment(what="no address", health=status.DOWN),)
    )
    assert told.health == "down"
    assert [ailment.what for ailment in told.ailments] == ["no address", "control is restarting"]


HEALTH = [("healthy", 0), ("degraded", 9), ("down", 1), ("", 1)]


@pytest.mark.parametrize(("health", "code"), HEALTH)
def test_the_exit_code_is_the_health(health, code, tmp_path):
    with daemon(tmp_path, {**TOLD, "health": health}):
        assert main(["status", "--state-dir", str(tmp_path)]) == code


def test_a_warning_is_told_but_no_ailment():
    told = made(node={"shards": 1, "warnings": ["names are not answered", "a\x1bb"]})
    assert "\nnote: names are not answered\nnote: a\\u001bb\n" in shown(told)
    assert told.health == "healthy"


# --- for people


def test_status_as_json_is_the_daemons_answer(tmp_path, capsys):
    told = msgspec.to_builtins(made())
    with daemon(tmp_path, told) as process:
        assert main(["status", "--json", "--state-dir", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    told["supervisor"]["pid"] = process.pid
    assert said == json.loads(msgspec.json.encode(told))


def test_status_for_people_has_every_part(tmp_path, capsys):
    with daemon(tmp_path, msgspec.to_builtins(made())):
        assert main(["status", "--state-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a: healthy, 1 of 2 peers connected\n")
    for part in ("10.86.0.1 on vpnd0, mtu 1400", "CSUM TSO4", "1 h 2 m", "0.25 ms", "25 %", "1.0 MiB"):
        assert part in said
    assert "\nc: circuit open, next try in 2.0 s: refused\n" in said
    assert "\nb: 1 of 2 sessions suspect, a probe failed" in said
    assert "3 active, 1 stalled" in said
    assert "no_route  no peer owns the destination" in said
    assert "ring_full" not in said


def test_nothing_is_wider_than_80_columns():
    peers = [
        {
            "name": "a-machine-with-a-long-name-of-its-own", "virtual_ip": "fd7a:115c:a1e0:ab12:4843:cd96:6258:b240",
            "virtual_ips": ["10.86.200.200", "fd7a:115c:a1e0:ab12:4843:cd96:6258:b240"], "state": "connected",
            "rtt_ms": 1234.5, "sessions": 12, "suspect": 3, "queue_delay_ms": 1234.5, "bytes_sent": 1 << 40,
            "bytes_received": 1 << 40, "source": "configuration", "routes": ["10.9.0.0/24", "fd00:1::/64"],
            "addresses": ["/ip6/2001:db8:1234:5678:1234:5678:1234:5678/tcp/40001/p2p/12D3KooW" + "x" * 44],
        },
        {"name": "c", "state": "backoff", "last_error": "no way " * 30, "ownership": ["not confirmed " * 20]},
    ]  # fmt: skip
    members = [
        {
            "name": "a" * 63, "addresses": ["10.86.0.1"], "state": "member", "connected": True, "authority": True,
            "expires_s": 8e6, "routes": ["10.9.0.0/24"], "groups": ["ops", "everybody"],
            "peer_id": "12D3KooW" + "x" * 44,
        }
    ]  # fmt: skip
    dropped = dict.fromkeys(TOLD["dropped"] | {"no_session": 0}, 10**12)
    told = made(peers=peers, network=NETWORK, dropped_packets=dropped)
    rows = [{"name": "a" * 63, "state": "valid", "peer_id": "12D3KooW" + "x" * 44, "key": "f" * 64}]
    for said in (
        shown(told), memberview.peers(told), memberview.members(members), memberview.authorities(rows)
    ):  # fmt: skip
        assert max(map(len, said.splitlines())) <= 80


def test_what_a_peer_caused_to_be_said_cannot_steer_the_terminal():
    said = shown(made(peers=[{"name": "c", "state": "backoff", "last_error": "\x1b[2J\nroot:"}]))
    assert "\\u001b[2J\\u000aroot:" in said


def test_status_has_the_network_of_a_member_and_none_of_a_static_node():
    said = shown(made(network=NETWORK, node={"addresses": ["10.86.0.1", "fd00::1"], "shards": 1}))
    assert "10.86.0.1 and fd00::1" in said
    assert "home, id 00ff" in said and "a, member, may let others in" in said
    assert "3, of them 1 authority" in said and "valid for another 1 h 0 m" in said
    assert "network" not in shown(made())
    assert "valid for" not in shown(made(network={**NETWORK, "state": "expired"}))
    assert "before it went away" in shown(made(network={**NETWORK, "current": False}))


def test_members_that_are_not_among_the_peers_are_not_kept_back():
    peers = [{"name": f"m{number}"} for number in range(1000)]
    told = made(peers=peers, network={**NETWORK, "members": 10_000})
    for said in (memberview.peers(told), shown(told)):
        assert "… and 8,999 members without a session (status.max_peers); all: vpnd members" in said
    told = made(peers=peers, network={**NETWORK, "members": 1001})
    assert "max_peers" not in memberview.peers(told) and "max_peers" not in shown(told)


# --- Prometheus


def exposed(told: Status, **options: bool) -> str:
    return Text(generate_latest).of(families(told, Metrics(**options))).decode()


def test_every_metric_has_a_meaning_a_unit_and_a_name_by_the_conventions():
    said = exposed(made(network=NETWORK))
    helps = dict(re.findall(r"^# HELP (\w+) (.*)$", said, re.MULTILINE))
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", said, re.MULTILINE))
    assert helps.keys() == kinds.keys()
    for name, kind in kinds.items():
        assert re.fullmatch(r"\w[\w ].+ \([\w0-9 ,-]+\)\.", helps[name]), (name, helps[name])
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search("_(ms|milliseconds|percent|kib|mib|s)(_total)?$", name), name


def test_series_of_peers_can_be_switched_off():
    assert 'vpnd_peer_rtt_seconds{peer="b",peer_id=""} 0.00025' in exposed(made())
    assert 'vpnd_peer_rtt_seconds{peer="c"' not in exposed(made()), "not measured is not 0"
    assert "vpnd_peer_" not in exposed(made(), per_peer=False)


@pytest.mark.alone
def test_a_thousand_peers_are_text_within_100_ms():
    rtt = {"buckets": [1] * 12, "sum_s": 1.0}
    row = {
        "rtt_ms": 1.0,
        "rtt": rtt,
        "datagram_rtt_ms": 1.0,
        "datagram_loss_out": 0.0,
        "datagram_loss_in": 0.0,
    }
    drops = {"queue_full": 1, "too_big": 2}
    told = made(
        peers=[{**row, "name": f"m{at}", "peer_id": f"{at:052}", "drops": drops} for at in range(1000)]
    )
    took_s = []
    for _ in range(5):
        begun_s = time.thread_time()
        text = exposed(told)
        took_s.append(time.thread_time() - begun_s)
    assert text.count("vpnd_peer_sent_bytes_total{") == 1000
    assert text.count("vpnd_peer_round_trip_seconds_count{") == Metrics().peer_histograms
    print(f"{min(took_s) * 1000:.0f} to {max(took_s) * 1000:.0f} ms")
    assert min(took_s) < 0.1


# --- CPU and memory


class Alone:
    """What Usage needs of a fleet: no child."""

    children: tuple[()] = ()
    others: tuple[()] = ()
    present: tuple[()] = ()


@pytest.mark.setting("status.sample_interval")
def test_two_who_ask_get_the_same_right_figure():
    config = Config(status=StatusSettings(sample_interval=0.2))

    async def body() -> list[float]:
        usage = report.Usage(Live(config), Alone())  # type: ignore[arg-type]
        ends_s = asyncio.get_running_loop().time() + 0.7
        while asyncio.get_running_loop().time() < ends_s:  # all the CPU there is
            await asyncio.sleep(0)
        seen = [usage.of(usage.us)["cpu_percent"] for _ in range(20)]
        usage.close()
        return seen

    seen = asyncio.run(body())
    assert len(set(seen)) == 1, "whoever asks changes nothing"
    assert 5 < seen[0] < 120, "what is left of a CPU beside other tests"


def test_cpu_is_sampled_again_after_a_time_without_descriptors() -> None:
    """As with RLIMIT_NOFILE below what is open."""
    config = Config(status=StatusSettings(sample_interval=0.05))
    errors = []

    async def body() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: errors.append(context["message"]))
        usage = report.Usage(Live(config), Alone())  # type: ignore[arg-type]
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            await asyncio.sleep(0.2)
            assert not usage.of(usage.us)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        await asyncio.sleep(0.2)
        assert usage.of(usage.us)["rss_bytes"] > 0
        usage.close()

    asyncio.run(body())
    assert not errors


def test_rates_are_what_moved_between_two_statuses() -> None:
    peer = {"name": "b", "peer_id": "B", "bytes_sent": 1000, "packets_sent": 10, "bytes_received": 0}
    before = made(node={"uptime_s": 10.0}, peers=[peer], dropped_packets={"queue_full": 5, "no_route": 1})
    peer |= {
        "bytes_sent": 1000 + 4096,
        "packets_sent": 40,
        "bytes_received": 3 << 20,
        "drops": {"queue_full": 10},
    }
    after = made(node={"uptime_s": 12.0}, peers=[peer], dropped_packets={"queue_full": 15, "no_route": 1})
    lines = [line.split() for line in statusview.rates(before, after).splitlines()]
    assert lines[1] == ["b", "2.0", "KiB/s", "1.5", "MiB/s", "25.0%"]
    assert lines[-1] == ["queue_full", "5.0/s"] and "no_route" not in statusview.rates(before, after)
    assert statusview.rates(after, after) == ""


def test_watching_shows_one_status_after_the_other_until_it_is_broken_off(tmp_path: Path) -> None:
    with daemon(tmp_path, msgspec.to_builtins(made())):
        command = [
            sys.executable,
            "-P",
            "-m",
            "vpnd",
            "status",
            "--watch",
            "0.05",
            "--state-dir",
            str(tmp_path),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            seen = 0
            for line in process.stdout:
                if "peers connected" in line:
                    seen += 1
                    if seen == 3:
                        process.send_signal(signal.SIGINT)
        assert process.returncode == status.EXIT_CODES[made().health] and seen >= 3
