"""Who has to go when there is no room for another inbound connection.

A flood comes from somewhere. So the one that has to go is of the *source* (an IPv4 address, or the /64 of an IPv6 one,
out of which a machine can choose its address) with the most places; of that source the one that has come least far, and
of those the oldest: an honest one is further than silent ones within milliseconds. Sources of members may hold some
places without being counted, so a flood from anywhere else does not get at them.
"""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable, Iterable
from enum import IntEnum

from libp2p.network.connection.raw_connection import RawConnection

from vpnd.adapter.addresses import literal
from vpnd.config.live import Live

IPV6_SOURCE_BITS = 64
SECOND_S, MINUTE_S = 1.0, 60.0


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

    def knows(self, source: str) -> bool:
        """Whether members are there, or came from there."""
        return source in self._came_from or source in self._known()

    def _least(self) -> Arrival:
        weights = {
            source: len(held) - (self._reserved if self.knows(source) else 0)
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


class Pace:
    """How many connections come in within a second: of one source, and of all together where no member is known to be.

    That is for what is made of a connection before it is known who it is, and less than a flood has. `knows`: see
    Places. Owner: the swarm's trio loop.
    """

    def __init__(self, live: Live, knows: Callable[[str], bool], now_s: Callable[[], float]) -> None:
        self._live, self._knows, self._now_s = live, knows, now_s
        self._until_s = float("-inf")
        self._came: dict[str, int] = {}  # by source, in this second
        self._of_strangers = 0
        self._slow: dict[str, float] = {}  # sources, until when

    def admits(self, source: str) -> bool:
        """Whether one more may come in; it is counted then."""
        p2p, now_s = self._live.config.p2p, self._now_s()
        if now_s >= self._until_s:
            self._until_s = now_s + SECOND_S
            self._came.clear()
            self._of_strangers = 0
            self._slow = {each: until_s for each, until_s in self._slow.items() if now_s < until_s}
        came = self._came.get(source, 0)
        most = p2p.max_connects_per_source
        if source in self._slow:
            most = min(most, max(1, int(p2p.max_handshakes_per_peer * SECOND_S / MINUTE_S)))
        if came >= most:
            return False
        if not self._knows(source):
            if self._of_strangers >= p2p.max_connects:
                return False
            self._of_strangers += 1
        self._came[source] = came + 1
        return True

    def slow_down(self, source: str) -> None:
        """A member there comes too often: for a minute it gets in as often as a member may, and no more."""
        self._slow[source] = self._now_s() + MINUTE_S


class Rate:
    """At most `most` a minute of each member. Forgets who has not come for a minute."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._times: dict[str, deque[float]] = {}
        self._refused: dict[str, int] = {}

    def allows(self, peer_id: str, most: int) -> bool:
        """Whether one more may be; it is counted then."""
        since_s = self._now_s() - MINUTE_S
        for known in [known for known, times in self._times.items() if times[-1] < since_s]:
            del self._times[known]
            self._refused.pop(known, None)
        times = self._times.setdefault(peer_id, deque())
        while times and times[0] < since_s:
            times.popleft()
        if len(times) >= most:
            self._refused[peer_id] = self._refused.get(peer_id, 0) + 1
            return False
        times.append(self._now_s())
        return True

    def refused(self, peer_id: str) -> int:
        """How often it was refused since it last kept still for a minute."""
        times = self._times.get(peer_id)
        return self._refused.get(peer_id, 0) if times and times[-1] >= self._now_s() - MINUTE_S else 0
