"""exporter: the process that answers HTTP on metrics.listen, with what the supervisor tells it.

    talks to     over                            what comes, and who serves it
    -----------  ------------------------------  ---------------------------------------------------------
    supervisor   channel (inherited descriptor)  serving: ExporterStart, Reconfigure, StatusTold, Stop
    strangers    HTTP, the socket it is given    Handler: /metrics, /healthz, /readyz

Rights kept after `privileges.drop`: the channel and the listening socket. How it is served: vpnd/serving.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.exposition import choose_encoder

from vpnd import metrics, serving
from vpnd.config.schema import Config, Metrics
from vpnd.exposition import COUNTER, GAUGE, HISTOGRAM, Family, Text
from vpnd.nat.paths import DIRECT, PUNCHED, RELAYED, kind_of
from vpnd.status import HEALTHY, Peer, Shard, Spread, Status, TunPart


def main() -> None:
    """`python -m vpnd.exporter CHANNEL_FD`."""
    serving.serve("exporter", _limits, Handler)


def _limits(config: Config) -> serving.Limits:
    metrics = config.metrics
    return serving.Limits(metrics.max_age, metrics.timeout, metrics.max_clients)


class Handler(serving.Handler):
    """One connection, one request."""

    def do_GET(self) -> None:
        """/metrics; /healthz: the daemon answers; /readyz: it is healthy, as `vpnd status` has it."""
        path = self.path.partition("?")[0]
        if path not in ("/metrics", "/healthz", "/readyz"):
            self.answer(404, "there are /metrics, /healthz and /readyz\n")
            return
        told = self.server.told
        status = told.status()
        if status is None:
            self.answer(503, "the daemon does not answer\n")
        elif path == "/metrics":
            accepted, settings = self.headers.get("Accept", ""), told.config.metrics
            text = told.made(status, accepted, lambda: _text(accepted).of(families(status, settings)))
            self.answer(200, text, choose_encoder(accepted)[1])
        elif path == "/healthz":
            self.answer(200, "ok\n")
        else:
            lines = [status.health, *(f"{ailment.what}: {ailment.remedy}" for ailment in status.ailments)]
            self.answer(200 if status.health == HEALTHY else 503, "\n".join(lines) + "\n")

    do_HEAD = do_GET


@functools.lru_cache(maxsize=serving.MOST_KINDS)
def _text(accepted: str) -> Text:
    """By an Accept header: what a scraper was told last time. For `Told.made` alone, which is for one at a time."""
    return Text(choose_encoder(accepted)[0])


# --- what a status is to Prometheus

#: What is counted in status.tun.
_TUN = ("packets_read", "packets_written", "bytes_read", "bytes_written", "reads", "merged")
_TUN_METRICS = metrics.described(TunPart)


def families(status: Status, settings: Metrics) -> Iterator[Family]:
    """One status as metrics. Shards that were scaled away are in it: no sum over shards ever shrinks."""
    yield from _node(status)
    yield from _processes(status)
    shards = (*status.shards, *status.retired)
    for name, metric in metrics.SHARD_METRICS.items():
        rows = {(str(shard.index),): getattr(shard, name) for shard in shards}
        yield _family(f"vpnd_shard_{name}", metric, ("shard",), rows)
    yield from _rings(status.shards)
    for name, meaning in metrics.SHARD_HISTOGRAMS.items():
        spreads = {(str(shard.index),): getattr(shard, name) for shard in shards}
        yield _histogram(f"vpnd_shard_{name}_seconds", meaning, ("shard",), spreads)
    for name, meaning in metrics.CONTROL_HISTOGRAMS.items():
        spread = {(): getattr(status.control, name)}
        yield _histogram(f"vpnd_control_{name}_seconds", meaning, (), spread)
    for name, metric in metrics.CONTROL_METRICS.items():
        yield _family(f"vpnd_control_{name}", metric, (), {(): status.control.counters.get(name, 0)})
    for name in _TUN:
        yield _family(f"vpnd_tun_{name}", _TUN_METRICS[name], (), {(): getattr(status.tun, name)})
    for unit, dropped in (("packets", status.dropped_packets), ("records", status.dropped)):
        metric = metrics.Metric("Dropped, by reason; docs/status.md explains each.", unit, False)
        rows = {(reason,): count for reason, count in dropped.items()}
        yield _family(f"vpnd_dropped_{unit}", metric, ("reason",), rows)
    if settings.per_peer:
        yield from _peers(status.peers)
        yield _round_trips(status.peers, settings.peer_histograms)


def _family(name: str, metric: metrics.Metric, labels: Sequence[str], rows: Mapping[Any, float]) -> Family:
    kind = GAUGE if metric.gauge else COUNTER
    return Family(name, kind, f"{metric.meaning.removesuffix('.')} ({metric.unit}).", labels, rows)


def _histogram(name: str, meaning: str, labels: Sequence[str], spreads: Mapping[Any, Spread]) -> Family:
    return Family(name, HISTOGRAM, f"{meaning.removesuffix('.')} (seconds).", labels, spreads)


def _gauge(name: str, meaning: str, unit: str, value: float) -> Family:
    return _family(name, metrics.Metric(meaning, unit, True), (), {(): value})


def _node(status: Status) -> Iterator[Family]:
    build = metrics.Metric("Version of the daemon.", "always 1", True)
    yield _family("vpnd_build_info", build, ("version",), {(status.version,): 1})
    yield _gauge("vpnd_ready", "Whether all processes are up.", "0 or 1", int(status.ready))
    yield _gauge("vpnd_healthy", "Whether the node is healthy.", "0 or 1", int(status.health == HEALTHY))
    yield _gauge("vpnd_ailments", "Things that are wrong with the node.", "ailments", len(status.ailments))
    yield _gauge("vpnd_uptime_seconds", "Since the start of the node.", "seconds", status.node.uptime_s)
    yield _gauge("vpnd_shards", "Shards there are meant to be.", "shards", status.node.shards)
    connected = sum(peer.state == "connected" for peer in status.peers)
    yield _gauge("vpnd_peers", "Peers that status tells of.", "peers", len(status.peers))
    yield _gauge("vpnd_peers_connected", "Peers with a session.", "peers", connected)
    by_path = metrics.Metric("Sessions with peers, by how they reach them.", "sessions", True)
    kinds = [kind_of(path) for peer in status.peers for path in peer.paths]
    rows = {(kind,): kinds.count(kind) for kind in (DIRECT, PUNCHED, RELAYED)}
    yield _family("vpnd_sessions", by_path, ("path",), rows)
    if status.network is not None:
        network = status.network
        yield _gauge("vpnd_members", "Members of the network.", "members", network.members)
        yield _gauge(
            "vpnd_membership_expires_seconds", "Until this membership expires.", "seconds", network.expires_s
        )


def _processes(status: Status) -> Iterator[Family]:
    shards = {(f"shard {shard.index}",): shard for shard in (*status.shards, *status.retired)}
    restarts = metrics.Metric("Times a process was started again.", "times", False)
    yield _family(
        "vpnd_restarts",
        restarts,
        ("process",),
        {("control",): status.control.restarts}
        | {name: shard.restarts for name, shard in shards.items()}
        | {(other.name,): other.restarts for other in status.others},
    )
    cpu_s: dict[Any, float] = {}
    resident: dict[Any, float] = {}
    rows: tuple[tuple[Any, Any], ...] = (
        (("supervisor",), status.supervisor),
        (("control",), status.control),
        *(((f"shard {shard.index}",), shard) for shard in status.shards),
        *(((other.name,), other) for other in status.others),
    )
    for name, row in rows:
        cpu_s[name], resident[name] = row.cpu_s, row.rss_bytes
    cpu = metrics.Metric("CPU that a process took since it began.", "seconds", False)
    yield _family("vpnd_process_cpu_seconds", cpu, ("process",), cpu_s)
    memory = metrics.Metric("Memory that a process has resident.", "bytes", True)
    yield _family("vpnd_process_resident_memory_bytes", memory, ("process",), resident)


def _rings(shards: Sequence[Shard]) -> Iterator[Family]:
    for name, meaning in (("used", "In the ring to a shard."), ("size", "Size of the ring to a shard.")):
        rows = {(str(shard.index),): getattr(shard.ring, name) for shard in shards}
        metric = metrics.Metric(meaning, "bytes", True)
        yield _family(f"vpnd_shard_ring_{name}_bytes", metric, ("shard",), rows)


#: Metric -> what it is, its unit, and its value of a peer; None where there is none.
_PEER: dict[str, tuple[str, str, Callable[[Peer], float | None]]] = {
    "connected": ("Whether a session with the peer is up.", "0 or 1", lambda peer: peer.state == "connected"),
    "sessions": ("Sessions with the peer.", "sessions", lambda peer: peer.sessions),
    "suspect_sessions": ("Sessions whose last probe failed.", "sessions", lambda peer: peer.suspect),
    "rtt_seconds": (
        "Round trip of its fastest session.",
        "seconds",
        lambda peer: None if peer.rtt_ms is None else peer.rtt_ms / 1000,
    ),
    "datagrams_used": (
        "Whether packets go in datagrams beside a session.",
        "0 or 1",
        lambda peer: peer.datagrams in ("used", "alone"),
    ),
    "datagram_rtt_seconds": (
        "Round trip of datagrams.",
        "seconds",
        lambda peer: None if peer.datagram_rtt_ms is None else peer.datagram_rtt_ms / 1000,
    ),
    "datagram_jitter_seconds": (
        "How much the round trip of datagrams changes.",
        "seconds",
        lambda peer: None if peer.datagram_rtt_ms is None else peer.datagram_jitter_ms / 1000,
    ),
    "datagram_loss_out_ratio": (
        "Datagrams to the peer that were lost lately.",
        "share of 1",
        lambda peer: peer.datagram_loss_out,
    ),
    "datagram_loss_in_ratio": (
        "Datagrams from the peer that were lost.",
        "share of 1",
        lambda peer: peer.datagram_loss_in,
    ),
    "queue_delay_seconds": (
        "How long the packet sent last waited.",
        "seconds",
        lambda peer: peer.queue_delay_ms / 1000,
    ),
    "queued_bytes": ("Waits for its sessions.", "bytes", lambda peer: peer.queued_bytes),
    "sent_bytes": ("Sent to the peer.", "bytes", lambda peer: peer.bytes_sent),
    "received_bytes": ("Received from the peer.", "bytes", lambda peer: peer.bytes_received),
    "sent_packets": ("Sent to the peer.", "packets", lambda peer: peer.segments_sent),
    "received_packets": ("Received from the peer.", "packets", lambda peer: peer.segments_received),
}
#: Of these, those that only grow.
_PEER_TOTALS = ("sent_bytes", "received_bytes", "sent_packets", "received_packets")


def _round_trips(peers: Sequence[Peer], most: int) -> Family:
    """Of so many peers: a histogram is fourteen series."""
    measured = [peer for peer in peers if peer.rtt.buckets][:most]
    spreads = {(peer.name, peer.peer_id): peer.rtt for peer in measured}
    meaning = "Round trips of probes and barriers in sessions with the peer."
    return _histogram("vpnd_peer_round_trip_seconds", meaning, ("peer", "peer_id"), spreads)


def _peers(peers: Sequence[Peer]) -> Iterator[Family]:
    for name, (meaning, unit, of) in _PEER.items():
        metric = metrics.Metric(meaning, unit, name not in _PEER_TOTALS)
        values = {(peer.name, peer.peer_id): of(peer) for peer in peers}
        rows = {labels: value for labels, value in values.items() if value is not None}
        yield _family(f"vpnd_peer_{name}", metric, ("peer", "peer_id"), rows)
    dropped = metrics.Metric("Dropped of packets to it and from it, by reason.", "records", False)
    drops = {
        (peer.name, peer.peer_id, reason): count for peer in peers for reason, count in peer.drops.items()
    }
    yield _family("vpnd_peer_dropped_records", dropped, ("peer", "peer_id", "reason"), drops)


if __name__ == "__main__":
    main()
