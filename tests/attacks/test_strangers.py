"""Strangers against real nodes: what they send costs little, and members beside them notice nothing."""

from __future__ import annotations

import time

import pytest
from attack_tools import (
    ATTACK_S,
    assert_unharmed,
    beside,
    come_in,
    connect_flood,
    counter,
    knock,
    stranger_of,
    strike,
)
from lab import Node
from lab.stranger import RSA, rsa_bomb, with_key

from vpnd import identity

pytestmark = [pytest.mark.root, pytest.mark.alone]  # round trips are compared

#: How long control may keep anybody waiting while strangers do their worst.
KNOCK_S = 0.5
#: Connections a second; the round trip to a member that dials meanwhile, and how long it may take to get in, which is
#: half of what a dial has by default.
FLOOD_HZ = 1000
ROUND_TRIP_S = 0.15
FAR_S = 5.0


@pytest.mark.parametrize("length", [16_000, 64_000])
def test_a_key_that_takes_long_to_decode_costs_nothing(nodes: list[Node], length: int) -> None:
    a, b, _ = nodes
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


def test_a_connect_flood_keeps_nobody_out_who_is_far_away(nodes: list[Node]) -> None:
    """The flood is faster than a member's handshake by some hundred times the places there are."""
    a, b, c = nodes
    source, enough, waits = stranger_of(a), counter(b, "refused_handshake_limit") + FLOOD_HZ, list[float]()
    key = identity.read_private(c.state_dir / "identity.pem")
    c.stop()
    with connect_flood(source, b, FLOOD_HZ), beside(a, b) as during:
        while len(waits) < 5 or counter(b, "refused_handshake_limit") < enough:
            waits.append(come_in(c.namespace, b, key, ROUND_TRIP_S))
    assert max(waits) < FAR_S
    assert_unharmed(during)
