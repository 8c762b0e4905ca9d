"""The Prometheus endpoint: the counters of all processes under their own names.

Served by prometheus-client from a thread of its own. A scrape reads counters in memory and asks no child,
so it costs the packet path next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vpnd.errors import MachineError
from vpnd.metrics import CONTROL_COUNTERS, GAUGES, SHARD_COUNTERS


class Exporter(Collector):
    """Serves on metrics.listen until `close`. `report` gives the status report without asking the children."""

    def __init__(self, listen: str, report: Callable[[], dict[str, Any]]) -> None:
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
        shards = [*report["shards"], *report["retired"]]
        for name in SHARD_COUNTERS:
            if name.startswith("dropped_"):
                continue
            family = _family(f"vpnd_shard_{name}", name in GAUGES, ["shard"])
            for row in shards:
                family.add_metric([str(row["index"])], row[name])
            yield family
        restarts = CounterMetricFamily(
            "vpnd_restarts", "Times a process was started again.", labels=["process"]
        )
        restarts.add_metric(["control"], report["control"]["restarts"])
        for row in shards:
            restarts.add_metric([f"shard {row['index']}"], row["restarts"])
        yield restarts
        for name in CONTROL_COUNTERS:
            family = _family(f"vpnd_control_{name}", name in GAUGES, [])
            family.add_metric([], report["control"]["counters"][name])
            yield family
        for name in ("packets_read", "packets_written", "bytes_read", "bytes_written", "reads", "merged"):
            yield CounterMetricFamily(f"vpnd_tun_{name}", f"TUN device: {name}.", report["tun"][name])
        drops = CounterMetricFamily("vpnd_dropped_packets", "Dropped packets by reason.", labels=["reason"])
        for reason, count in report["dropped"].items():
            drops.add_metric([reason], count)
        yield drops
        yield GaugeMetricFamily("vpnd_shards", "Shards there are meant to be.", report["node"]["shards"])
        yield GaugeMetricFamily("vpnd_ready", "1 when all processes are up.", int(report["ready"]))

    def close(self) -> None:
        """Stop serving; waits for the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _family(name: str, gauge: bool, labels: list[str]) -> GaugeMetricFamily | CounterMetricFamily:
    kind = GaugeMetricFamily if gauge else CounterMetricFamily
    return kind(name, name.removeprefix("vpnd_").replace("_", " ") + ".", labels=labels)
