"""Inputs for fuzz entries: seeds cut, joined and changed, the same ones for the same number."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

MOST_BYTES = 4096
#: Numbers at which lengths and counts go wrong.
EDGES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80\x80\x80\x80\x01",
)


def inputs(seeds: Sequence[bytes], count: int, number: int = 0) -> Iterator[bytes]:
    """The seeds themselves, then `count` others."""
    yield from seeds
    dice = random.Random(number)
    for _ in range(count):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.choice((1, 1, 2, 4, 8))):
            _change(data, dice, seeds)
        yield bytes(data[:MOST_BYTES])


def _change(data: bytearray, dice: random.Random, seeds: Sequence[bytes]) -> None:
    place = dice.randrange(len(data) + 1)
    match dice.randrange(7):
        case 0 if data:
            data[place % len(data)] ^= 1 << dice.randrange(8)
        case 1 if data:
            data[place % len(data)] = dice.randrange(256)
        case 2:
            edge = dice.choice(EDGES)
            data[place : place + len(edge)] = edge
        case 3:
            del data[place:]
        case 4:
            del data[place : place + dice.randrange(1, 9)]
        case 5:
            data[place:place] = dice.randbytes(dice.randrange(1, 9))
        case _:
            other = dice.choice(seeds)
            data[place:] = other[dice.randrange(len(other) + 1) :]
