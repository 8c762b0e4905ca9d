"""Finding the owner of a destination costs the same whether there are ten members or ten thousand."""

from __future__ import annotations

import ipaddress
import random
import time

import pytest

from shards.flow.prefixes import Prefixes

FEW, MANY = 10, 10_000
LOOKUPS = 20_000
ROUNDS = 7
#: Both are one look-up in a dict; the larger one misses the cache more often. A walk over members would be a
#: thousandfold.
MOST_RATIO = 5.0


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


def costs_s(version: int, *tables: tuple[Prefixes[int], list[int]]) -> list[float]:
    """Of each table, the best of some rounds, per look-up. In turns, and in CPU time: the machine has other work."""
    asked = [random.Random(1).choices(addresses, k=LOOKUPS) for _, addresses in tables]
    best = [float("inf")] * len(tables)
    for _ in range(ROUNDS):
        for place, (table, _) in enumerate(tables):
            find, begun_s = table.find, time.process_time()
            for address in asked[place]:
                find(version, address)
            best[place] = min(best[place], (time.process_time() - begun_s) / LOOKUPS)
    return best


@pytest.mark.alone
@pytest.mark.parametrize(("version", "base"), [(4, "10.86.0.1"), (6, "fd12:3456:789a::1")])
def test_a_look_up_costs_the_same_with_few_and_many_members(version, base):
    few, many = costs_s(version, members(FEW, base), members(MANY, base))
    print(f"IPv{version}: {few * 1e9:.0f} ns with {FEW} members, {many * 1e9:.0f} ns with {MANY}")
    assert many < few * MOST_RATIO
