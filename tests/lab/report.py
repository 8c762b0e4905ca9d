"""The bench's numbers as tables, ratios and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .measure import METRICS, Metric

Numbers = Mapping[str, float]

#: The least the project asks of itself; see docs/performance.md.
LEAST_SHARE_OF_VETH = 0.30
LEAST_TIMES_OTHERS = 5.0
MOST_PING_TO_BETTER = 1.5
MOST_LOADED_PING_MS = 1.5
MOST_START_S = 3.0


@dataclass(frozen=True)
class Verdict:
    """One requirement, what was measured, and whether it is met."""

    text: str
    value: float
    limit: float
    passed: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.text}: {self.value:.2f}"


def medians(rounds: Iterable[Numbers]) -> dict[str, float]:
    """The median of each metric over the rounds that have it; not-a-number counts as missing."""
    values: dict[str, list[float]] = {}
    for numbers in rounds:
        for key, value in numbers.items():
            if value == value:
                values.setdefault(key, []).append(value)
    return {key: statistics.median(several) for key, several in values.items()}


def absolute_table(results: Mapping[str, Numbers]) -> str:
    """A row per metric, a column per contender."""
    header = ["", "", *results]
    rows = [
        [metric.title, metric.unit, *(number(numbers.get(metric.key)) for numbers in results.values())]
        for metric in METRICS
    ]
    return table([header, *rows])


def ratio_table(name: str, results: Mapping[str, Numbers]) -> str:
    """One contender over each of the others, and over the better VPN among them."""
    others = {other: numbers for other, numbers in results.items() if other != name}
    rivals = {other: numbers for other, numbers in others.items() if is_rival(other)}
    header = [f"{name} /", *others, *(["better rival"] if len(rivals) > 1 else [])]
    rows = []
    for metric in filter(lambda metric: metric.divisible, METRICS):
        own = results[name].get(metric.key)
        row = [metric.title, *(_ratio(own, numbers.get(metric.key)) for numbers in others.values())]
        if len(rivals) > 1:
            row.append(_ratio(own, better(metric, rivals.values())))
        rows.append(row)
    return table([header, *rows])


def is_rival(name: str) -> bool:
    """Whether a contender is another VPN: neither the bare link nor vpnd itself."""
    return name != "veth" and not is_vpnd(name)


def is_vpnd(name: str) -> bool:
    """Whether a contender is vpnd, with any number of shards, of any checkout."""
    return name.startswith("vpnd-")


def better(metric: Metric, several: Iterable[Numbers]) -> float | None:
    """The best of these contenders' values of a metric; None when none has one."""
    values = [numbers[metric.key] for numbers in several if metric.key in numbers]
    if not values:
        return None
    return max(values) if metric.more_is_better else min(values)


def verdicts(results: Mapping[str, Numbers]) -> list[Verdict]:
    """The project's requirements, for each vpnd, against what else was measured in the same run."""
    metric = {entry.key: entry for entry in METRICS}
    rivals = {name: numbers for name, numbers in results.items() if is_rival(name)}
    found = []

    def at_least(text: str, value: float | None, base: float | None, limit: float) -> None:
        if value is not None and base:
            found.append(Verdict(text, value / base, limit, value / base >= limit))

    for name, own in results.items():
        if not is_vpnd(name):
            continue
        for direction, arrow in (("forward", "A->B"), ("reverse", "B->A")):
            key = f"tcp1_{direction}"
            base = results.get("veth", {}).get(key)
            text = f"{name} TCP 1 flow {arrow} >= {LEAST_SHARE_OF_VETH} x veth"
            at_least(text, own.get(key), base, LEAST_SHARE_OF_VETH)
            for rival, numbers in rivals.items():
                text = f"{name} TCP 1 flow {arrow} >= {LEAST_TIMES_OTHERS:g} x {rival}"
                at_least(text, own.get(key), numbers.get(key), LEAST_TIMES_OTHERS)
        for rival, numbers in rivals.items():
            text = f"{name} UDP 1200-byte goodput >= {rival}"
            at_least(text, own.get("udp"), numbers.get("udp"), 1.0)
        base = better(metric["ping_avg"], rivals.values())
        if base and "ping_avg" in own:
            ratio = own["ping_avg"] / base
            text = f"{name} idle ping avg <= {MOST_PING_TO_BETTER} x the better of the others"
            found.append(Verdict(text, ratio, MOST_PING_TO_BETTER, ratio <= MOST_PING_TO_BETTER))
        if "loaded_avg" in own:
            text = f"{name} ping under TCP avg <= {MOST_LOADED_PING_MS} ms"
            passed = own["loaded_avg"] <= MOST_LOADED_PING_MS
            found.append(Verdict(text, own["loaded_avg"], MOST_LOADED_PING_MS, passed))
        if "start" in own:
            text = f"{name} start to first ping <= {MOST_START_S:g} s"
            found.append(Verdict(text, own["start"], MOST_START_S, own["start"] <= MOST_START_S))
    return found


def number(value: float | None) -> str:
    """Three digits of it, or a dash."""
    if value is None or value != value:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value: float | None, base: float | None) -> str:
    if value is None or not base:
        return "-"
    return f"{number(value / base)}x"


def table(rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
