"""Variants of vpnd against each other: a pair of nodes of each is up, all at once, and they have their turns.

What a shared machine does to one run and not to the next makes a fifth, here. Of two turns that follow each other it
is much the same, so it is their difference that is averaged: some twenty rounds tell one hundredth from nothing.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import watchers
from .contenders import Vpnd
from .measure import METRICS, Plan, measure_turn
from .network import Lab, LabError
from .report import Numbers, number, table
from .traffic import wait_for_answer


class Variant(NamedTuple):
    """vpnd of the checkout `root`, with the settings `env` says (VPND_PROCESS_REALTIME and the like). `watched`: while
    it is measured, see watchers."""

    name: str
    root: Path
    env: Mapping[str, str]
    watched: bool = False


def variants(own: Path, roots: Iterable[Path], settings: Iterable[str], *, watched: bool) -> list[Variant]:
    """This checkout, what all others are compared with; other checkouts; this one with settings, each some
    NAME=VALUE with commas between them; and the checkouts once more, `watched`. Raises LabError."""
    found = [Variant("this", own, {})]
    found += [Variant(f"@{root}", root, {}) for root in roots]
    for text in settings:
        pairs = [word.partition("=") for word in text.split(",")]
        if not all(name.startswith("VPND_") and equals for name, equals, _ in pairs):
            raise LabError(f"{text}: must be VPND_TABLE_KEY=VALUE, and more of them behind commas")
        found.append(Variant(text, own, {name: value for name, _, value in pairs}))
    if watched:
        found += [
            Variant(f"{each.name}, watched", each.root, watchers.ENVIRONMENT, watched=True)
            for each in found
            if not each.env
        ]
    names = [variant.name for variant in found]
    if len(names) < 2 or len(set(names)) < len(names):
        raise LabError("nothing to compare with, or twice the same: name other checkouts or settings")
    return found


def measure_paired(
    compared: Sequence[Variant], shards: int, rounds: int, plan: Plan, say: Callable[[str], None]
) -> dict[str, list[Numbers]]:
    """The numbers of every round of each variant. Raises LabError, with the ends of the logs."""
    measured: dict[str, list[Numbers]] = {variant.name: [] for variant in compared}
    with contextlib.ExitStack() as stack:
        pairs = []
        for variant in compared:
            lab = stack.enter_context(Lab(link=plan.link))
            pairs.append((variant, lab, Vpnd(lab, shards, variant.root, variant.env)))
        for _, _, contender in pairs:
            contender.prepare()
            contender.start()
        for variant, lab, contender in pairs:
            try:
                wait_for_answer(lab, lab.nodes[0], contender.target, plan.start_timeout_s)
            except LabError as error:
                raise LabError(f"{variant.name}: {error}\n{contender.explain()}") from error
        time.sleep(plan.settle_s)
        for place in range(rounds):
            begin_s = time.monotonic()
            # Each is first, in the middle and last as often: whose turn follows its own load answers later.
            first = place % len(pairs)
            turns = [*pairs[first:], *pairs[:first]]
            for variant, lab, contender in turns if place // len(pairs) % 2 else reversed(turns):
                turn = _watched_turn if variant.watched else measure_turn
                measured[variant.name].append(turn(lab, contender, plan))
            say(f"round {place + 1}/{rounds}: {time.monotonic() - begin_s:.0f} s")
    return measured


def _watched_turn(lab: Lab, contender: Vpnd, plan: Plan) -> dict[str, float]:
    """Its first node is watched."""
    with watchers.watched(contender.nodes[0]) as looking:
        begun_s, before_s = time.monotonic(), looking.cpu_s()
        numbers = measure_turn(lab, contender, plan)
        share = (looking.cpu_s() - before_s) / (time.monotonic() - begun_s)
    return {**numbers, "watchers": 1000 * share}


def paired_table(measured: Mapping[str, Sequence[Numbers]]) -> str:
    """A row a metric: the first variant's mean, and of each other one the mean and how much it is more, in per cent
    of the first, with the standard error of that."""
    (first, base), *others = measured.items()
    header = ["", "", first, *(cell for name, _ in others for cell in (name, ""))]
    rows = []
    for metric in METRICS:
        if not any(metric.key in several[0] for several in measured.values()):
            continue
        own = [numbers.get(metric.key, float("nan")) for numbers in base]
        mean = statistics.mean(own) or float("nan")
        row = [metric.title, metric.unit, number(mean)]
        for _, several in others:
            theirs = [numbers.get(metric.key, float("nan")) for numbers in several]
            if mean != mean or theirs[0] != theirs[0]:  # one of the two has no such number
                row += [number(statistics.mean(theirs)), ""]
                continue
            more = [(other - one) / mean * 100 for one, other in zip(own, theirs, strict=True)]
            error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else float("nan")
            row += [number(statistics.mean(theirs)), f"{statistics.mean(more):+.1f} % ±{error:.1f}"]
        rows.append(row)
    return table([header, *rows])
