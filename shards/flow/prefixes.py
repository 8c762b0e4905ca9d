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
        network = ipaddress.ip_network(prefix)
        self.remove(prefix)
        if network.prefixlen == network.max_prefixlen:
            self._hosts[network.version][int(network.network_address)] = value
            return
        shift = network.max_prefixlen - network.prefixlen
        rows = self._networks[network.version]
        rows.append((shift, int(network.network_address) >> shift, value))
        rows.sort(key=lambda row: row[0])

    def remove(self, prefix: str) -> None:
        """Forget a prefix; harmless when it is not there."""
        network = ipaddress.ip_network(prefix)
        if network.prefixlen == network.max_prefixlen:
            self._hosts[network.version].pop(int(network.network_address), None)
            return
        shift = network.max_prefixlen - network.prefixlen
        place = (shift, int(network.network_address) >> shift)
        rows = self._networks[network.version]
        rows[:] = [row for row in rows if row[:2] != place]

    def get(self, prefix: str) -> Value | None:
        """The value of exactly this prefix."""
        network = ipaddress.ip_network(prefix)
        if network.prefixlen == network.max_prefixlen:
            return self._hosts[network.version].get(int(network.network_address))
        shift = network.max_prefixlen - network.prefixlen
        place = (shift, int(network.network_address) >> shift)
        return next((row[2] for row in self._networks[network.version] if row[:2] == place), None)

    def around(self, prefix: str) -> Value | None:
        """The value of the longest prefix that holds all of this one, itself included."""
        network = ipaddress.ip_network(prefix)
        value = self.get(prefix)
        if value is not None:
            return value
        shift = network.max_prefixlen - network.prefixlen
        for wider, start, value in self._networks[network.version]:
            if wider >= shift and int(network.network_address) >> wider == start:
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


def set_of(prefixes: Iterable[str]) -> Prefixes[bool]:
    """Prefixes that only matter as being in it."""
    found: Prefixes[bool] = Prefixes()
    for prefix in prefixes:
        found.add(prefix, True)
    return found
