"""The Prometheus endpoint: the counters of all processes under their own names.

Served by prometheus-client from a thread of its own. A scrape reads counters in memory and asks no child,
so it costs the packet path next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vpnd import metrics
from vpnd.errors import MachineError
from vpnd.status import Status


class Exporter(Collector):
    """Serves on metrics.listen until `close`. `report` gives the status report without asking the children."""

    def __init__(self, listen: str, report: Callable[[], Status]) -> None:
        self._report = report
        registry = CollectorRegistry()
        registry.register(self)
        host, _, port = listen.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            raise MachineError(
                f"metrics.listen = {listen}: {error.strerror}; choose another address or empty it"
            ) from error

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        """All metrics, from one report. Shards that were scaled away are in it: no sum over shards ever shrinks."""
        report = self._report()
        shards = (*report.shards, *report.retired)
        for name, metric in metrics.SHARD_METRICS.items():
            family = _family(f"vpnd_shard_{name}", metric, ["shard"])
            for row in shards:
                family.add_metric([str(row.index)], getattr(row, name))
            yield family
        restarts = CounterMetricFamily(
            "vpnd_restarts", "Times a process was started again.", labels=["process"]
        )
        restarts.add_metric(["control"], report.control.restarts)
        for row in shards:
            restarts.add_metric([f"shard {row.index}"], row.restarts)
        yield restarts
        for name, metric in metrics.CONTROL_METRICS.items():
            family = _family(f"vpnd_control_{name}", metric, [])
            family.add_metric([], report.control.counters[name])
            yield family
        for name in ("packets_read", "packets_written", "bytes_read", "bytes_written", "reads", "merged"):
            yield CounterMetricFamily(f"vpnd_tun_{name}", f"TUN device: {name}.", getattr(report.tun, name))
        drops = CounterMetricFamily("vpnd_dropped_packets", "Dropped packets by reason.", labels=["reason"])
        for reason, count in report.dropped.items():
            drops.add_metric([reason], count)
        yield drops
        yield GaugeMetricFamily("vpnd_shards", "Shards there are meant to be.", report.node.shards)
        yield GaugeMetricFamily("vpnd_ready", "1 when all processes are up.", int(report.ready))

    def close(self) -> None:
        """Stop serving; waits for the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _family(name: str, metric: metrics.Metric, labels: list[str]) -> GaugeMetricFamily | CounterMetricFamily:
    kind = GaugeMetricFamily if metric.gauge else CounterMetricFamily
    return kind(name, metric.meaning, labels=labels)
