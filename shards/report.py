"""What a shard tells about a session, for `vpnd status`."""

from __future__ import annotations

from shards.session.link import Link
from vpnd.api.reports import SessionReport


def session_report(link: Link) -> SessionReport:
    """One row; see SessionReport for units."""
    packets, size = link.received()
    state = "opening" if not link.lanes else "draining" if link.leaving else "up"
    return SessionReport(
        peer_id=link.peer.peer_id,
        session_id=link.session_id,
        initiator=link.initiator,
        state=state,
        rtt_ms=None if link.rtt_s is None else link.rtt_s * 1000,
        streams=len(link.lanes),
        bytes_sent=link.bytes_sent,
        bytes_received=size,
        packets_sent=link.packets_sent,
        packets_received=packets,
        queued_bytes=link.queue.bytes,
        age_s=link.now() - link.opened_s,
        health="suspect" if link.vitals.suspect else "healthy",
        queue_delay_ms=link.queue.delay_s * 1000,
    )
