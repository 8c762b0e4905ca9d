"""Which value owns an address: exact addresses in a dict, networks by longest prefix.

Nearly every look-up is for a single address (a peer's virtual IP), so that is one dict look-up; networks, of
which there are few, are walked longest first.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Prefixes(Generic[Value]):
    """Addresses are (version, number) as vpnd.packet gives them. Owner: shard loop."""

    def __init__(self) -> None:
        self._hosts: dict[int, dict[int, Value]] = {4: {}, 6: {}}
        #: version → [(shift, network number >> shift, value)], longest prefix first
        self._networks: dict[int, list[tuple[int, int, Value]]] = {4: [], 6: []}

    def add(self, prefix: str, value: Value) -> None:
        """`prefix` in CIDR form; replaces the value of an equal prefix."""
        self.remove(prefix)
        version, shift, number = _parse(prefix)
        if shift:
            self._networks[version].append((shift, number, value))
            self._networks[version].sort(key=lambda row: row[0])
        else:
            self._hosts[version][number] = value

    def remove(self, prefix: str) -> None:
        """Forget a prefix; harmless when it is not there."""
        version, *place = _parse(prefix)
        rows = self._networks[version]
        rows[:] = [row for row in rows if [*row[:2]] != place]
        if not place[0]:
            self._hosts[version].pop(place[1], None)

    def get(self, prefix: str) -> Value | None:
        """The value of exactly this prefix."""
        version, *place = _parse(prefix)
        if not place[0]:
            return self._hosts[version].get(place[1])
        return next((row[2] for row in self._networks[version] if [*row[:2]] == place), None)

    def around(self, prefix: str) -> Value | None:
        """The value of the longest prefix that holds all of this one, itself included."""
        version, shift, number = _parse(prefix)
        if not shift and (value := self._hosts[version].get(number)) is not None:
            return value
        for wider, start, value in self._networks[version]:
            if wider >= shift and number >> wider - shift == start:
                return value
        return None

    def find(self, version: int, address: int) -> Value | None:
        """The value of the longest prefix that holds the address."""
        value = self._hosts[version].get(address)
        if value is not None:
            return value
        for shift, network, value in self._networks[version]:
            if address >> shift == network:
                return value
        return None


def _parse(prefix: str) -> tuple[int, int, int]:
    """IP version, bits behind the prefix, and the bits of the prefix as a number."""
    network = ipaddress.ip_network(prefix)
    shift = network.max_prefixlen - network.prefixlen
    return network.version, shift, int(network.network_address) >> shift


def set_of(prefixes: Iterable[str]) -> Prefixes[bool]:
    """Prefixes that only matter as being in it."""
    found: Prefixes[bool] = Prefixes()
    for prefix in prefixes:
        found.add(prefix, True)
    return found
