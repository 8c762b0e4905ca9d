"""Metrics as text, as prometheus-client writes it, in a sixth of its time: it judges every name and label of every
series again at every scrape. Here it writes one row of each family once, and all others are made from that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vpnd.metrics import BOUNDS_S
from vpnd.status import Spread

COUNTER, GAUGE, HISTOGRAM = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
#: Upper limits of classic buckets: every Prometheus takes them, and their number is known.
_LIMITS = (*(f"{bound:g}" for bound in BOUNDS_S), "+Inf")
#: In no label and no meaning.
_MARK = "\0"


class Family(NamedTuple):
    """The series of one name. `rows`: by the values of `labels` a number, or a Spread in a histogram."""

    name: str
    kind: type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]
    meaning: str
    labels: Sequence[str]
    rows: Mapping[Any, Any]

    def metric(self) -> Metric:
        """For prometheus-client."""
        family = self.kind(self.name, self.meaning, labels=self.labels)
        for labels, value in self.rows.items():
            if isinstance(family, HistogramMetricFamily):
                *sums, _count, total_s = _values(value)
                family.add_metric(labels, list(zip(_LIMITS, sums, strict=True)), total_s)
            else:
                family.add_metric(labels, value)
        return family


class Exposed(Collector):
    """Families, for what of prometheus-client takes a registry."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return (family.metric() for family in self._families)


def _values(spread: Spread) -> Sequence[float]:
    """Of a histogram's lines, in their order: buckets, count, sum."""
    sums = [*itertools.accumulate(spread.buckets or (0,) * len(_LIMITS))]
    return (*sums, sums[-1], spread.sum_s)


class _Escaped(dict[str, str]):
    """Labels as they are written; those of a peer come in many families."""

    def __missing__(self, label: str) -> str:
        self[label] = label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        return self[label]


class Text:
    """In one format, that of `encode`."""

    def __init__(self, encode: Callable[[Collector], bytes]) -> None:
        self._encode = encode
        self._end = encode(Exposed(()))
        # by family: its first lines, and the lines of each row, for str.format: labels, then the value
        self._known: dict[str, tuple[str, Sequence[str]]] = {}

    def of(self, families: Iterable[Family]) -> bytes:
        """What `encode` makes of them."""
        parts, told = [], _Escaped()
        for family in families:
            head, lines = self._known.get(family.name) or self._learned(family)
            parts.append(head)
            if family.kind is HISTOGRAM:
                for labels, spread in family.rows.items():
                    known = [told[label] for label in labels]
                    parts += [
                        line.format(*known, floatToGoString(value))
                        for line, value in zip(lines, _values(spread), strict=True)
                    ]
            else:
                write = lines[0].format
                parts += [
                    write(*[told[label] for label in labels], floatToGoString(value))
                    for labels, value in family.rows.items()
                ]
        return "".join(parts).encode() + self._end

    def _learned(self, family: Family) -> tuple[str, Sequence[str]]:
        """From what prometheus-client writes of a row that has `_MARK` and their places for labels."""
        places = range(len(family.labels))
        row = tuple(f"{_MARK}{place}{_MARK}" for place in places)
        value = Spread() if family.kind is HISTOGRAM else 0
        text = self._encode(Exposed([family._replace(rows={row: value})])).removesuffix(self._end).decode()
        written = text.splitlines(keepends=True)
        lines = [
            line.rpartition(" ")[0].replace("{", "{{").replace("}", "}}")
            for line in written
            if not line.startswith("#")
        ]
        for place in places:
            lines = [line.replace(row[place], f"{{{place}}}") for line in lines]
        head = "".join(line for line in written if line.startswith("#"))
        known = self._known[family.name] = head, [f"{line} {{{len(places)}}}\n" for line in lines]
        return known
