"""Strangers against real nodes: what they send costs little, and members beside them notice nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from attack_tools import (
    ATTACK_S,
    arena,
    assert_unharmed,
    beside,
    counter,
    knock,
    stranger_of,
    strike,
)
from lab import Node
from lab.stranger import RSA, rsa_bomb, with_key

pytestmark = pytest.mark.root

#: How long control may keep anybody waiting while strangers do their worst.
KNOCK_S = 0.5


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with arena(2) as nodes:
        yield nodes


@pytest.mark.parametrize("length", [16_000, 64_000])
def test_a_key_that_takes_long_to_decode_costs_nothing(nodes: list[Node], length: int) -> None:
    a, b = nodes
    source = stranger_of(a)
    bomb = with_key(RSA, rsa_bomb(length))
    waits, failures = [], counter(b, "handshake_failures")
    with beside(a, b) as during:
        end = time.monotonic() + ATTACK_S
        while time.monotonic() < end:
            with strike(source, b, bomb):
                waits.append(knock(source, b))
    assert max(waits) < KNOCK_S
    assert counter(b, "handshake_failures") - failures == len(waits)
    assert_unharmed(during)
