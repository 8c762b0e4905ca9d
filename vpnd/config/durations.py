"""Durations ("250ms", "30s") and sizes ("4MiB") as settings write them.

The smallest exact spelling is used on the way out, so that what `config show` prints reads back as the
same value.
"""

from __future__ import annotations

import re
from decimal import Decimal

#: Seconds in each unit, longest first.
_DURATION_UNITS = {"h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001")}
#: Bytes in each unit, largest first.
_SIZE_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}

DURATION_PATTERN = r"[0-9]+(\.[0-9]+)?(ms|s|m|h)"
SIZE_PATTERN = r"[0-9]+(B|KiB|MiB|GiB)"

_duration = re.compile(rf"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>{'|'.join(_DURATION_UNITS)})", re.ASCII)
_size = re.compile(rf"(?P<number>[0-9]+)(?P<unit>{'|'.join(_SIZE_UNITS)})", re.ASCII)


def parse_duration(text: str) -> float:
    """Seconds of "250ms", "1.5s", "5m" or "1h": one number, one unit. Raises ValueError."""
    match = _duration.fullmatch(text)
    if not match:
        raise ValueError('is not a duration; write it like "250ms", "30s", "5m" or "1h"')
    return float(Decimal(match["number"]) * _DURATION_UNITS[match["unit"]])


def parse_size(text: str) -> int:
    """Bytes of "512KiB", "4MiB", "1GiB" or "65536B". Raises ValueError."""
    match = _size.fullmatch(text)
    if not match:
        raise ValueError('is not a size; write it like 65536, "512KiB", "4MiB" or "1GiB"')
    return int(match["number"]) * _SIZE_UNITS[match["unit"]]


def format_duration(seconds: float) -> str:
    """The longest unit that needs no fraction: 90.0 is "90s", 300.0 is "5m", 0.25 is "250ms", 0.0 is "0s"."""
    exact = Decimal(repr(seconds))
    if not exact:
        return "0s"
    for unit, length in _DURATION_UNITS.items():
        if exact % length == 0:
            return f"{int(exact / length)}{unit}"
    return f"{exact / _DURATION_UNITS['ms']:f}ms"


def format_size(count: int) -> str:
    """The largest unit that needs no fraction: 4194304 is "4MiB", 1000 is "1000B"."""
    for unit, length in _SIZE_UNITS.items():
        if count % length == 0 and (count or unit == "B"):
            return f"{count // length}{unit}"
    raise ValueError(f"{count} is not a number of bytes")
