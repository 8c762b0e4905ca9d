"""What a link is given: the peer at its other end, and what all links of a shard have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from shards.budget import Budget
from shards.counters import Counts, Dropping
from shards.flow.prefixes import Prefixes
from shards.inbound import Inbound
from shards.outbound import Outbound
from vpnd.config.live import Live
from vpnd.metrics import Times
from vpnd.packet.record import Capabilities

#: What `fit_span` does with a span for a peer: (buffer, start, end) -> (buffer, start, end, records left out).
Fit = Callable[[memoryview, int, int], tuple[memoryview, int, int, int]]


class Delivery(Protocol):
    """Stage 6: see Inbound.deliver_untrusted."""

    def deliver_untrusted(
        self, sources: Prefixes[bool], reassembly: Any, view: memoryview, most: int
    ) -> tuple[int, int]: ...


class Remote(Protocol):
    """What a session needs of the peer at its other end. `sources`: the addresses it may send from. `budget`: what its
    sessions may use together. `drops`: counts what of its packets is dropped. `rtts`: gets all round trips."""

    peer_id: str
    name: str
    budget: Budget
    rtts: Times

    @property
    def drops(self) -> Dropping: ...

    @property
    def sources(self) -> Prefixes[bool]: ...


class Surroundings(NamedTuple):
    """What all links of a shard have in common. `hello`: what our TUN takes. `now`: the clock of everything.
    `batch_done` is called when packets have come in."""

    live: Live
    outbound: Outbound
    inbound: Inbound
    counts: Counts
    hello: Capabilities
    now: Callable[[], float]
    batch_done: Callable[[], None]
