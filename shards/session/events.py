"""What a link tells the shard it belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from shards.flow.flows import Chunk
from shards.session.lane import Lane

if TYPE_CHECKING:
    from shards.session.link import Link


class LinkEvents(Protocol):
    """What a link tells its shard; the counts are of all links together."""

    packets_sent: int
    bytes_sent: int
    session_errors: int
    health_probes: int
    health_failures: int
    health_deaths: int

    def batch_done(self) -> None:
        """A batch of packets has come in."""

    def dispatch(self, chunk: Chunk) -> None:
        """Records find their flows' sinks anew."""

    def lane_ready(self, lane: Lane) -> None:
        """Packets can be sent over it."""

    def lane_closed(self, lane: Lane) -> None:
        """The peer has closed it while the session lives: its flows are still pinned to it."""

    def stream_failed(self, link: Link) -> None:
        """A stream that this side opened did not come to be."""

    def link_leaving(self, link: Link) -> None:
        """The peer takes no new streams: it means to end the session."""

    def link_suspect(self, link: Link) -> None:
        """A probe was not answered in time."""

    def link_closed(self, link: Link, reason: str, failed: bool) -> None:
        """It has ended; its flows and its queue are the shard's to place anew."""
