"""Who has to go when there is no room for another inbound connection.

A flood comes from somewhere. So the one that has to go is of the *source* (an IPv4 address, or the /64 of an IPv6 one,
out of which a machine can choose its address) with the most places; of that source the one that has come least far, and
of those the oldest: an honest one is further than silent ones within milliseconds. Sources of members may hold some
places without being counted, so a flood from anywhere else does not get at them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from enum import IntEnum

from libp2p.network.connection.raw_connection import RawConnection

from vpnd.adapter.addresses import literal

IPV6_SOURCE_BITS = 64


class Progress(IntEnum):
    """How far the other side of an inbound connection has come."""

    SILENT = 0
    SPOKE = 1
    AGREED = 2  # on Noise
    PROVEN = 3  # to hold the key of a peer id that may come in


def source_of(ip: str) -> str:
    """What an address counts as."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, IPV6_SOURCE_BITS), strict=False))


class Arrival(RawConnection):
    """An inbound connection, with where it comes from and how far it has come."""

    def __init__(self, stream: object) -> None:
        super().__init__(stream, False)  # type: ignore[arg-type]
        self.progress = Progress.SILENT
        remote = self.get_remote_address()
        self.source = source_of(remote[0]) if remote is not None else ""

    async def read(self, n: int | None = None) -> bytes:
        data = await super().read(n)
        if not self.progress:
            self.progress = Progress.SPOKE
        return data


class Places:
    """At most `most` arrivals at once. Owner: the swarm's trio loop.

    `members()`: multiaddrs of members, looked up again when `fresh_s` have passed (`now_s` is a clock); where members
    came from is remembered beside them, as many sources as there are places. Either may hold `reserved` places.
    """

    def __init__(
        self,
        most: int,
        reserved: int,
        members: Callable[[], Iterable[str]],
        fresh_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self._most, self._reserved = most, reserved
        self._members, self._fresh_s, self._now_s = members, fresh_s, now_s
        self._by_source: dict[str, dict[Arrival, None]] = {}  # the oldest first
        self._taken = 0
        self._came_from: dict[str, None] = {}  # the longest ago first
        self._listed: frozenset[str] = frozenset()
        self._listed_until_s = float("-inf")

    def enter(self, arrival: Arrival) -> Arrival | None:
        """Give it a place; returns who has to go for it, which has left already."""
        gone = None
        if self._taken >= self._most:
            gone = self._least()
            self.leave(gone)
        self._by_source.setdefault(arrival.source, {})[arrival] = None
        self._taken += 1
        return gone

    def leave(self, arrival: Arrival) -> None:
        """Its place is free; nothing when it has none."""
        of_source = self._by_source.get(arrival.source, {})
        if arrival in of_source:
            del of_source[arrival]
            self._taken -= 1
            if not of_source:
                del self._by_source[arrival.source]

    def member_from(self, source: str) -> None:
        """A member has come in from there."""
        self._came_from.pop(source, None)
        self._came_from[source] = None
        if len(self._came_from) > self._most:
            del self._came_from[next(iter(self._came_from))]

    def _least(self) -> Arrival:
        known = self._known()
        weights = {
            source: len(held) - (self._reserved if source in known or source in self._came_from else 0)
            for source, held in self._by_source.items()
        }
        most = max(weights.values())
        heaviest = (self._by_source[source] for source, weight in weights.items() if weight == most)
        return min((one for held in heaviest for one in held), key=lambda one: one.progress)

    def _known(self) -> frozenset[str]:
        now_s = self._now_s()
        if now_s >= self._listed_until_s:
            self._listed = frozenset(
                source_of(str(endpoint.ip)) for text in self._members() if (endpoint := literal(text))
            )
            self._listed_until_s = now_s + self._fresh_s
        return self._listed
