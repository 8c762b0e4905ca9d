"""Finding the owner of a destination costs the same whether there are ten members or ten thousand."""

from __future__ import annotations

import ipaddress
import random
import time

import pytest

from shards.prefixes import Prefixes

FEW, MANY = 10, 10_000
LOOKUPS = 20_000
ROUNDS = 7
#: Both are one look-up in a dict; the larger one misses the cache more often. A walk over members would be a
#: thousandfold.
MOST_RATIO = 3.0


def members(count: int, base: str) -> tuple[Prefixes[int], list[int]]:
    """Single addresses, as members have them, beside a few announced networks."""
    first = int(ipaddress.ip_address(base))
    table: Prefixes[int] = Prefixes()
    for number in range(count):
        address = ipaddress.ip_address(first + number)
        table.add(f"{address}/{address.max_prefixlen}", number)
    for number in range(4):
        table.add(f"192.168.{number}.0/24", number)
    return table, list(range(first, first + count))


def cost_s(table: Prefixes[int], version: int, addresses: list[int]) -> float:
    """The best of some rounds, per look-up."""
    asked = random.Random(1).choices(addresses, k=LOOKUPS)
    best = float("inf")
    for _ in range(ROUNDS):
        find, begun_s = table.find, time.perf_counter()
        for address in asked:
            find(version, address)
        best = min(best, time.perf_counter() - begun_s)
    return best / LOOKUPS


@pytest.mark.parametrize(("version", "base"), [(4, "10.86.0.1"), (6, "fd12:3456:789a::1")])
def test_a_look_up_costs_the_same_with_few_and_many_members(version, base):
    few = cost_s(*_of(version, members(FEW, base)))
    many = cost_s(*_of(version, members(MANY, base)))
    print(f"IPv{version}: {few * 1e9:.0f} ns with {FEW} members, {many * 1e9:.0f} ns with {MANY}")
    assert many < few * MOST_RATIO


def _of(version: int, table: tuple[Prefixes[int], list[int]]) -> tuple[Prefixes[int], int, list[int]]:
    return table[0], version, table[1]
