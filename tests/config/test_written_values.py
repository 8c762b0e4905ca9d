"""Durations and sizes: what is written is what is meant, and nothing else is let through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.config import values
from vpnd.packet import flow

DURATIONS = [
    ("milliseconds", "250ms", 0.25),
    ("seconds", "30s", 30.0),
    ("a fraction", "1.5s", 1.5),
    ("minutes", "5m", 300.0),
    ("hours", "24h", 86400.0),
    ("nothing", "0s", 0.0),
]


@pytest.mark.parametrize(("what", "text", "seconds"), DURATIONS, ids=[row[0] for row in DURATIONS])
def test_a_duration_is_read_and_written(what, text, seconds):
    assert values.parse_duration(text) == seconds
    assert values.parse_duration(values.format_duration(seconds)) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "30 s", "-1s", "s", "1e3s", "1h30m", "30S", "٣s", ".5s", "30s\n", "nans"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="30s"):
        values.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("0B", 0), ("65536B", 65536), ("512KiB", 1 << 19), ("4MiB", 1 << 22), ("1GiB", 1 << 30)],
)
def test_a_size_is_read_and_written(text, count):
    assert values.parse_size(text) == count
    assert values.parse_size(values.format_size(count)) == count


@pytest.mark.parametrize("text", ["", "4", "4MB", "4mib", "1.5MiB", "-1KiB", "4 MiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="4MiB"):
        values.parse_size(text)


@given(st.integers(0, 10**9))
def test_every_millisecond_survives_the_round_trip(milliseconds):
    seconds = milliseconds / 1000
    assert values.parse_duration(values.format_duration(seconds)) == seconds


@given(st.integers(0, 1 << 50))
def test_every_size_survives_the_round_trip(count):
    assert values.parse_size(values.format_size(count)) == count


FLOWS = [
    ("tcp", 6 << 16),
    ("udp/53", 17 << 16 | 53),
    ("icmp", 1 << 16),
    ("47", 47 << 16),
    ("132/9", 132 << 16 | 9),
]


@pytest.mark.parametrize(("text", "kind"), FLOWS, ids=[row[0] for row in FLOWS])
def test_a_rule_for_flows_is_read(text, kind):
    assert flow.rule_of(text) == kind


@pytest.mark.parametrize(
    "text", ["", "dns", "udp/", "udp/0", "udp/65536", "udp/x", "icmp/8", "0", "256", "UDP", "udp/5 "]
)
def test_what_is_no_rule_for_flows_is_refused(text):
    with pytest.raises(ValueError, match="names"):
        flow.rule_of(text)
