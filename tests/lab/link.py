"""The link of a lab as links are in the world: late, uneven, lossy, slow. By name, or in numbers."""

from __future__ import annotations

import subprocess
from dataclasses import astuple, dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("impair.c")
COMPILER = "cc"


@dataclass(frozen=True)
class Link:
    """One way of a link; the other is the same. Milliseconds, per cent, Mbit/s; a rate of 0 is none.

    Each packet is late by `delay_ms` ± `jitter_ms`, for itself, so that packets overtake each other. `buffer_ms`: what
    waits for the rate; more is dropped.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss_percent: float = 0.0
    reorder_percent: float = 0.0
    rate_mbit: float = 0.0
    buffer_ms: float = 50.0

    def __str__(self) -> str:
        rate = f", {self.rate_mbit:g} Mbit/s" if self.rate_mbit else ""
        reordered = f", {self.reorder_percent:g} % reordered" if self.reorder_percent else ""
        return f"{self.delay_ms:g} ms ± {self.jitter_ms:g} each way, {self.loss_percent:g} % lost{reordered}{rate}"

    def command(self, directory: Path) -> list[str]:
        """What carries it between two devices, whose names are to be put behind; compiled into `directory`."""
        program = directory / "impair"
        if not program.exists():
            subprocess.run([COMPILER, "-O2", "-o", str(program), str(SOURCE)], check=True)
        return [str(program)]

    def words(self) -> list[str]:
        """Its numbers, as the program takes them."""
        return [f"{number:g}" for number in astuple(self)]


PROFILES = {
    "lan": Link(0.2, 0.05),
    "fibre": Link(5, 0.5, 0.01, 0, 500),
    "cable": Link(10, 2, 0.1, 0, 200),
    "dsl": Link(15, 2, 0.1, 0, 50),
    "lte": Link(25, 8, 0.3, 0, 50),
    "satellite": Link(300, 10, 0.5, 0, 50, 200),
    "bad-wifi": Link(5, 4, 3, 1, 100),
}


def parse(text: str) -> Link:
    """A profile's name, or DELAY,JITTER,LOSS,REORDER,RATE, of which later ones may be left out. Raises ValueError."""
    if text in PROFILES:
        return PROFILES[text]
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 5 or min(numbers) < 0 or max(numbers[2:4], default=0) > 100:
        raise ValueError(
            f"{text}: one of {', '.join(PROFILES)}, or DELAY,JITTER,LOSS,REORDER,RATE (ms, ms, %, %, Mbit/s)"
        )
    return Link(*numbers)
