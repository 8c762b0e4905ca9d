"""The bench's numbers as tables, ratios and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .measure import METRICS, Metric

Numbers = Mapping[str, float]

#: What the project asks of itself against the better of the others in the same run: at least, or at most, so many
#: times theirs. See docs/performance.md.
GOALS = {
    "tcp1_forward": 2.5,
    "tcp1_reverse": 2.5,
    "tcp4_forward": 3.0,
    "tcp4_reverse": 3.0,
    "udp": 1.8,
    "udp_small": 1.2,
    "ping_avg": 1.3,
    "loaded_avg": 1.0,
    "cpu_tcp": 0.5,
    "cpu_udp": 0.7,
}
#: And at most so much, whatever theirs is.
LIMITS = {"memory": 100.0, "start": 3.0}


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
    """The project's goals, for each vpnd, against what else was measured in the same run."""
    rivals = [numbers for name, numbers in results.items() if is_rival(name)]
    found = []
    for name, own in results.items():
        if not is_vpnd(name):
            continue
        for metric in METRICS:
            value, base = own.get(metric.key), better(metric, rivals)
            if value is None:
                continue
            if base and (goal := GOALS.get(metric.key)):
                ratio = value / base
                passed = ratio >= goal if metric.more_is_better else ratio <= goal
                sign = ">=" if metric.more_is_better else "<="
                found.append(
                    Verdict(f"{name} {metric.title} {sign} {goal:g} x the better", ratio, goal, passed)
                )
            if limit := LIMITS.get(metric.key):
                text = f"{name} {metric.title} <= {limit:g} {metric.unit}"
                found.append(Verdict(text, value, limit, value <= limit))
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
