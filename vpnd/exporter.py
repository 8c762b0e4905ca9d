"""exporter: the process that answers HTTP on metrics.listen, with what the supervisor tells it.

    talks to     over                            what comes, and who serves it
    -----------  ------------------------------  ---------------------------------------------------------
    supervisor   channel (inherited descriptor)  main: ExporterStart; Told: Reconfigure, StatusTold, Stop
    strangers    HTTP, the socket it is given    Handler: /metrics, /healthz, /readyz

Rights kept after `privileges.drop`: the channel and the listening socket. A thread for each HTTP connection, at most
metrics.max_clients; the first thread has the channel. All clients together cost the supervisor one status in
metrics.max_age.
"""

from __future__ import annotations

import http.server
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from select import select
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from vpnd import logs, metrics, privileges, seccomp
from vpnd.api import messages, parts
from vpnd.api.channel import Channel, first_message, run_child
from vpnd.config.schema import Config
from vpnd.status import HEALTHY, Peer, Shard, Status, TunPart

log = logging.getLogger(__name__)


def main() -> None:
    """`python -m vpnd.exporter CHANNEL_FD`."""
    run_child("exporter", _main)


def _main(channel: Channel, parent_pid: int) -> None:
    start, (listening, page_fd) = first_message(channel, messages.ExporterStart)
    page = metrics.CounterPage((), page_fd)
    os.close(page_fd)
    logs.configure(start.config.log.level, "exporter")
    # Below this line nothing is imported: the files of vpnd may be readable by root alone.
    privileges.drop(start.config.process.user, parent_pid)
    told = Told(channel, start.config, page)
    server = Server(socket.socket(fileno=listening), told)
    if start.config.process.seccomp:
        seccomp.confine(seccomp.EXPORTER)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told.serve()


class Told:
    """What the supervisor told last. `serve` is the first thread's, `status` any other's."""

    def __init__(self, channel: Channel, config: Config, page: metrics.CounterPage) -> None:
        self._channel, self._page = channel, page
        self.config = config
        self._news = threading.Condition()
        self._asked = False
        self._status: Status | None = None
        self._at_s = 0.0

    def status(self) -> Status | None:
        """A status not older than metrics.max_age; None when the supervisor does not tell within status.timeout."""
        with self._news:
            if not self._fresh():
                if not self._asked:
                    self._asked = True
                    self._channel.send(messages.StatusWanted())
                if not self._news.wait_for(self._fresh, self.config.status.timeout):
                    self._asked = False  # it may have been lost: whoever comes next asks again
                    return None
            return self._status

    def _fresh(self) -> bool:
        return self._status is not None and time.monotonic() < self._at_s + self.config.metrics.max_age

    def serve(self) -> None:
        """Until Stop. Raises ChannelClosed when the supervisor is gone."""
        said: list[messages.StatusTold] = []
        self._channel.send(messages.Ready())
        while True:
            self._page.beat()
            received = self._channel.receive()
            if received is None:
                select([self._channel.fileno()], [], [], metrics.heartbeat_s(self.config.process.watchdog))
                continue
            match received[0]:
                case messages.Stop():
                    return
                case messages.Reconfigure(config=config):
                    self.config = config
                    logs.set_level(config.log.level)
                case messages.StatusTold() as part:
                    said.append(part)
                    if not part.more:
                        status = msgspec.json.decode(parts.joined(said).content, type=Status)
                        said = []
                        with self._news:
                            self._status, self._at_s, self._asked = status, time.monotonic(), False
                            self._news.notify_all()


# --- HTTP


class Server(http.server.ThreadingHTTPServer):
    """Serves on a socket that listens already."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, told: Told) -> None:
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.told = listening, told
        self._clients = threading.BoundedSemaphore(told.config.metrics.max_clients)

    def process_request(self, request: object, client_address: object) -> None:
        """A thread for it, while there are not too many."""
        if self._clients.acquire(blocking=False):
            super().process_request(request, client_address)  # type: ignore[arg-type]
        else:
            self.shutdown_request(request)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        """In that thread."""
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._clients.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, or sent what is no HTTP, is none of ours."""
        log.debug("%s: %s", client_address, sys.exc_info()[1])


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection, one request."""

    server: Server
    server_version, sys_version = "vpnd", ""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.told.config.metrics.timeout)

    def do_GET(self) -> None:
        """/metrics; /healthz: the daemon answers; /readyz: it is healthy, as `vpnd status` has it."""
        path = self.path.partition("?")[0]
        if path not in ("/metrics", "/healthz", "/readyz"):
            self._answer(404, "there are /metrics, /healthz and /readyz\n")
            return
        status = self.server.told.status()
        if status is None:
            self._answer(503, "the daemon does not answer\n")
        elif path == "/metrics":
            registry = CollectorRegistry()
            registry.register(Exposed(status, per_peer=self.server.told.config.metrics.per_peer))
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, encode(registry), kind)
        elif path == "/healthz":
            self._answer(200, "ok\n")
        else:
            lines = [status.health, *(f"{ailment.what}: {ailment.remedy}" for ailment in status.ailments)]
            self._answer(200 if status.health == HEALTHY else 503, "\n".join(lines) + "\n")

    do_HEAD = do_GET

    def _answer(self, code: int, body: str | bytes, kind: str = "text/plain; charset=utf-8") -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a scraper would fill the log."""


# --- what a status is to Prometheus

#: What is counted in status.tun.
_TUN = ("packets_read", "packets_written", "bytes_read", "bytes_written", "reads", "merged")
_TUN_METRICS = metrics.described(TunPart)


class Exposed(Collector):
    """One status as metrics. Shards that were scaled away are in it: no sum over shards ever shrinks."""

    def __init__(self, status: Status, *, per_peer: bool) -> None:
        self._status, self._per_peer = status, per_peer

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield from _node(status)
        yield from _processes(status)
        shards = (*status.shards, *status.retired)
        for name, metric in metrics.SHARD_METRICS.items():
            rows = {(str(shard.index),): getattr(shard, name) for shard in shards}
            yield _family(f"vpnd_shard_{name}", metric, ("shard",), rows)
        yield from _rings(status.shards)
        for name, metric in metrics.CONTROL_METRICS.items():
            yield _family(f"vpnd_control_{name}", metric, (), {(): status.control.counters.get(name, 0)})
        for name in _TUN:
            yield _family(f"vpnd_tun_{name}", _TUN_METRICS[name], (), {(): getattr(status.tun, name)})
        for unit, dropped in (("packets", status.dropped_packets), ("records", status.dropped)):
            metric = metrics.Metric("Dropped, by reason; docs/status.md explains each.", unit, False)
            rows = {(reason,): count for reason, count in dropped.items()}
            yield _family(f"vpnd_dropped_{unit}", metric, ("reason",), rows)
        if self._per_peer:
            yield from _peers(status.peers)


def _family(name: str, metric: metrics.Metric, labels: Sequence[str], rows: Mapping[Any, float]) -> Metric:
    family = (GaugeMetricFamily if metric.gauge else CounterMetricFamily)(
        name, f"{metric.meaning.removesuffix('.')} ({metric.unit}).", labels=labels
    )
    for values, value in rows.items():
        family.add_metric(values, value)
    return family


def _gauge(name: str, meaning: str, unit: str, value: float) -> Metric:
    return _family(name, metrics.Metric(meaning, unit, True), (), {(): value})


def _node(status: Status) -> Iterator[Metric]:
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
    if status.network is not None:
        network = status.network
        yield _gauge("vpnd_members", "Members of the network.", "members", network.members)
        yield _gauge(
            "vpnd_membership_expires_seconds", "Until this membership expires.", "seconds", network.expires_s
        )


def _processes(status: Status) -> Iterator[Metric]:
    shards = {(f"shard {shard.index}",): shard for shard in (*status.shards, *status.retired)}
    restarts = metrics.Metric("Times a process was started again.", "times", False)
    yield _family(
        "vpnd_restarts",
        restarts,
        ("process",),
        {("control",): status.control.restarts} | {name: shard.restarts for name, shard in shards.items()},
    )
    us = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s: dict[Any, float] = {("exporter",): us.ru_utime + us.ru_stime}
    resident: dict[Any, float] = {}
    rows: tuple[tuple[Any, Any], ...] = (
        (("supervisor",), status.supervisor),
        (("control",), status.control),
        *(((f"shard {shard.index}",), shard) for shard in status.shards),
    )
    for name, row in rows:
        cpu_s[name], resident[name] = row.cpu_s, row.rss_bytes
    cpu = metrics.Metric("CPU that a process took since it began.", "seconds", False)
    yield _family("vpnd_process_cpu_seconds", cpu, ("process",), cpu_s)
    memory = metrics.Metric("Memory that a process has resident.", "bytes", True)
    yield _family("vpnd_process_resident_memory_bytes", memory, ("process",), resident)


def _rings(shards: Sequence[Shard]) -> Iterator[Metric]:
    for name, meaning in (("used", "In the ring to a shard."), ("size", "Size of the ring to a shard.")):
        rows = {(str(shard.index),): getattr(shard.ring, name) for shard in shards}
        metric = metrics.Metric(meaning, "bytes", True)
        yield _family(f"vpnd_shard_ring_{name}_bytes", metric, ("shard",), rows)


#: Metric -> what it is, and its value of a peer; None where there is none.
_PEER: dict[str, tuple[metrics.Metric, Callable[[Peer], float | None]]] = {
    "connected": (
        metrics.Metric("Whether a session with the peer is up.", "0 or 1", True),
        lambda peer: peer.state == "connected",
    ),
    "sessions": (metrics.Metric("Sessions with the peer.", "sessions", True), lambda peer: peer.sessions),
    "suspect_sessions": (
        metrics.Metric("Sessions whose last probe failed.", "sessions", True),
        lambda peer: peer.suspect,
    ),
    "rtt_seconds": (
        metrics.Metric("Round trip of its fastest session.", "seconds", True),
        lambda peer: None if peer.rtt_ms is None else peer.rtt_ms / 1000,
    ),
    "queue_delay_seconds": (
        metrics.Metric("How long the packet sent last waited.", "seconds", True),
        lambda peer: peer.queue_delay_ms / 1000,
    ),
    "queued_bytes": (
        metrics.Metric("Waits for its sessions.", "bytes", True),
        lambda peer: peer.queued_bytes,
    ),
    "sent_bytes": (metrics.Metric("Sent to the peer.", "bytes", False), lambda peer: peer.bytes_sent),
    "received_bytes": (
        metrics.Metric("Received from the peer.", "bytes", False),
        lambda peer: peer.bytes_received,
    ),
    "sent_packets": (metrics.Metric("Sent to the peer.", "records", False), lambda peer: peer.packets_sent),
    "received_packets": (
        metrics.Metric("Received from the peer.", "records", False),
        lambda peer: peer.packets_received,
    ),
}


def _peers(peers: Sequence[Peer]) -> Iterator[Metric]:
    for name, (metric, of) in _PEER.items():
        values = {(peer.name, peer.peer_id): of(peer) for peer in peers}
        rows = {labels: value for labels, value in values.items() if value is not None}
        yield _family(f"vpnd_peer_{name}", metric, ("peer", "peer_id"), rows)


if __name__ == "__main__":
    main()
