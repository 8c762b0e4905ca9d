"""Strangers against real nodes: what they send costs little, and members beside them notice nothing."""

from __future__ import annotations

import time

import pytest
from attack_tools import (
    ATTACK_S,
    assert_unharmed,
    beside,
    busy,
    closed_at_once,
    come_in,
    connect_flood,
    counter,
    knock,
    never_accepted,
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
FLOOD_HZ = (1000, 5000)
#: Between two handshakes of one source, which may not come without end.
PACE_S = 0.02
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
            time.sleep(PACE_S)
    assert max(waits) < KNOCK_S
    assert counter(b, "handshake_failures") - failures == len(waits)
    assert_unharmed(during)


@pytest.mark.parametrize("rate_hz", FLOOD_HZ)
def test_a_connect_flood_keeps_nobody_out_who_is_far_away(nodes: list[Node], rate_hz: int) -> None:
    """The flood is faster than a member's handshake by some hundred times the places there are, on a busy machine, and
    not one connection is lost because nobody accepts it."""
    a, b, c = nodes
    source, enough, waits = stranger_of(a), closed_at_once(b) + rate_hz, list[float]()
    key, lost = identity.read_private(c.state_dir / "identity.pem"), never_accepted(b)
    if c.process is not None and c.process.poll() is None:
        c.stop()
    with busy(), connect_flood(source, b, rate_hz), beside(a, b) as during:
        until_s = time.monotonic() + ATTACK_S
        while time.monotonic() < until_s or closed_at_once(b) < enough:
            waits.append(come_in(c.namespace, b, key, ROUND_TRIP_S))
    print(f"got in after {waits} s; {never_accepted(b) - lost} connections were never accepted")
    assert never_accepted(b) == lost
    assert max(waits) < FAR_S
    assert_unharmed(during)
