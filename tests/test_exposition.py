"""Metrics as text: what prometheus-client makes of them, sooner."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest
from prometheus_client.exposition import choose_encoder

from vpnd.config.schema import Metrics
from vpnd.exporter import families
from vpnd.exposition import COUNTER, GAUGE, HISTOGRAM, Exposed, Family, Text
from vpnd.metrics import BOUNDS_S, TIMES
from vpnd.status import Peer, Shard, Spread, Status

#: What scrapers ask for: nothing, Prometheus 2, Prometheus 3.
ACCEPTED = (
    "",
    "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8",
    "text/plain;version=1.0.0;escaping=allow-utf-8",
)
ODD = ('"', "\\", "a\nb", "\\n", "{0}", "{", "}}", "é", "", " ", "# EOF", "%s", "+Inf")
#: /metrics of as many peers takes no longer.
MOST_S = 0.1


def odd() -> Iterator[Family]:
    values = (
        0,
        1,
        -1,
        2.5,
        1e-9,
        999_999,
        1_000_000,
        1_234_567_890,
        2**53,
        1e22,
        float("inf"),
        float("nan"),
        True,
    )
    labels = [(name, other) for name in ODD for other in ODD]
    for number, kind in enumerate((COUNTER, GAUGE)):
        yield Family(f"odd_{number}", kind, 'a "meaning" of \\ {0} (%s).', (), {(): 1.5})
        yield Family(
            f"odd_bytes_{number}", kind, "x (y).", ("z", "a"), dict(zip(labels, values * 13, strict=True))
        )
        yield Family(f"odd_empty_{number}", kind, "x (y).", ("a",), {})
    spreads = {(name,): Spread(buckets=tuple(range(len(BOUNDS_S) + 1)), sum_s=0.1) for name in ODD}
    yield Family("odd_seconds", HISTOGRAM, "x (seconds).", ("peer",), spreads)
    yield Family("plain_seconds", HISTOGRAM, "x (seconds).", (), {(): Spread()})
    yield Family("empty_seconds", HISTOGRAM, "x (seconds).", ("a",), {})


@pytest.mark.parametrize("accepted", ACCEPTED)
def test_it_is_what_prometheus_client_writes(accepted: str) -> None:
    encode, _ = choose_encoder(accepted)
    text = Text(encode)
    few, many = (Status(shards=tuple(map(shard, range(count)))) for count in (1, 3))
    for told in (odd, odd, *(lambda status=each: families(status, Metrics()) for each in (few, many, few))):
        assert text.of(told()) == encode(Exposed(told()))


def shard(index: int) -> Shard:
    return Shard(
        index=index, bytes_sent=10**index, rtt=Spread(buckets=(index,) * (len(BOUNDS_S) + 1), sum_s=1.5)
    )


@pytest.mark.alone
def test_a_thousand_peers_are_written_soon() -> None:
    """CPU of one scrape, from the status's JSON on, as the exporter's first and as a later one; the best of several."""
    peers = tuple(
        Peer(name=f"m{number}", peer_id=f"12D3KooW{number:044}", state="connected", rtt_ms=1.5, bytes_sent=number,
             rtt=Spread(buckets=(1,) * (TIMES - 1), sum_s=0.5), datagram_rtt_ms=1.0, datagram_loss_out=0.0,
             drops={"too_big": 1})
        for number in range(1000)
    )  # fmt: skip
    told = msgspec.json.encode(Status(shards=tuple(map(shard, range(4))), peers=peers))
    took_s: dict[str, list[float]] = {"first": [], "later": []}
    for _ in range(5):
        text = Text(choose_encoder(ACCEPTED[1])[0])
        for which in took_s:
            begun_s = time.thread_time()
            content = text.of(families(msgspec.json.decode(told, type=Status), Metrics()))
            took_s[which].append(time.thread_time() - begun_s)
    assert content.count(b"\nvpnd_peer_sent_bytes_total{") == 1000
    assert all(min(each) < MOST_S for each in took_s.values()), took_s
