"""What contrib/ has for Prometheus and Grafana names only what a node exposes, and that is as promtool wants it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from vpnd.config.schema import Metrics
from vpnd.exporter import families
from vpnd.exposition import Text
from vpnd.metrics import BOUNDS_S, DROP_REASONS
from vpnd.status import ControlPart, NetworkPart, NodePart, Peer, Shard, Spread, Status

CONTRIB = Path(__file__).resolve().parents[1] / "contrib"
RULES = CONTRIB / "prometheus" / "vpnd.rules.yml"
DASHBOARD = CONTRIB / "grafana" / "vpnd.json"
PROMTOOL = shutil.which("promtool")
#: A status in which every part is there.
FULL = Status(
    version="1",
    ready=True,
    node=NodePart(shards=2),
    control=ControlPart(handshake=Spread(buckets=(1,) * (len(BOUNDS_S) + 1), sum_s=2.5)),
    shards=tuple(Shard(index=index, rtt=Spread(buckets=(0, 2, *[0] * 10), sum_s=0.5)) for index in range(2)),
    network=NetworkPart(members=2, state="member"),
    peers=(
        Peer(
            name='b"\\',
            peer_id="B",
            rtt_ms=1.5,
            state="connected",
            drops={"too_big": 3},
            rtt=Spread(buckets=(0, 2, *[0] * 10), sum_s=0.5),
        ),
    ),
    dropped=dict.fromkeys(DROP_REASONS, 0),
    dropped_packets=dict.fromkeys(DROP_REASONS, 0),
)


def exposed() -> str:
    return Text(generate_latest).of(families(FULL, Metrics())).decode()


def names(text: str) -> set[str]:
    """Of the series, in queries or in an exposition."""
    return set(re.findall(r"\bvpnd_[a-z0-9_]+", text))


def queries(dashboard: Any) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def test_each_metric_that_the_dashboard_and_the_alerts_name_exists() -> None:
    there = names(exposed())
    shown = {name for query in queries(json.loads(DASHBOARD.read_text())) for name in names(query)}
    alerted = {name for line in re.findall(r"expr: (.*)", RULES.read_text()) for name in names(line)}
    assert len(shown) > 20 and len(alerted) > 8
    assert shown | alerted <= there, (shown | alerted) - there


def test_labels_that_the_dashboard_and_the_alerts_name_exist() -> None:
    text = exposed()
    labels = set(re.findall(r'[{,]([a-z_]+)="', text)) | {"instance", "le"}
    used = set(
        re.findall(r"\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}", DASHBOARD.read_text() + RULES.read_text())
    )
    assert used and used <= labels, used - labels


def test_a_histogram_has_every_bucket_and_its_sum() -> None:
    text = exposed()
    assert 'vpnd_shard_rtt_seconds_bucket{le="0.0001",shard="0"} 0.0' in text
    assert 'vpnd_shard_rtt_seconds_bucket{le="0.0003",shard="0"} 2.0' in text
    assert 'vpnd_shard_rtt_seconds_bucket{le="+Inf",shard="1"} 2.0' in text
    assert 'vpnd_shard_rtt_seconds_sum{shard="1"} 0.5' in text
    assert f"vpnd_control_handshake_seconds_count {len(BOUNDS_S) + 1}.0" in text


def test_every_series_says_what_it_is_and_in_which_unit() -> None:
    for name, told in re.findall(r"^# HELP (\S+) (.*)$", exposed(), re.MULTILINE):
        assert re.search(r"\([a-z0-9 -]+\)\.$", told), f"{name}: {told}"
        assert len(told) > 12


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")
def test_promtool_has_nothing_to_say() -> None:
    assert PROMTOOL is not None
    checked = subprocess.run([PROMTOOL, "check", "metrics"], input=exposed(), capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    rules = subprocess.run([PROMTOOL, "check", "rules", str(RULES)], capture_output=True, text=True)
    assert rules.returncode == 0, rules.stdout + rules.stderr
