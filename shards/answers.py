"""What a shard answers when it is asked: for `vpnd status`, and for `vpnd ping`."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable

import msgspec

from shards.peer.table import OPEN, Peer
from shards.plane import Plane
from shards.session.link import Link, StreamLane
from vpnd.api.messages import ProbeAnswer, ProbeRequest
from vpnd.api.reports import SessionProbe, SessionReport
from vpnd.packet.flow import destination_of, echo_key


def session_report(link: Link) -> SessionReport:
    """One row; see SessionReport for units."""
    return SessionReport(
        peer_id=link.peer.peer_id,
        session_id=link.session_id,
        initiator=link.initiator,
        state="opening" if not link.lanes else "draining" if link.leaving else "up",
        rtt_ms=None if link.rtt_s is None else link.rtt_s * 1000,
        streams=len(link.lanes),
        queued_bytes=link.queue.bytes,
        age_s=link.now() - link.opened_s,
        health="suspect" if link.suspect else "healthy",
        queue_delay_ms=link.queue.delay_s * 1000,
        segment_bytes=link.segment_bytes(),
        **link.traffic()._asdict(),
    )


def probe(plane: Plane, request: ProbeRequest, tell: Callable[[ProbeAnswer], None]) -> None:
    """Which session carries the pings to an address, and its round trip now: a ping in it, behind all that was sent.
    `tell` is called once, within health.timeout."""
    key = echo_key(ipaddress.ip_address(request.destination))
    peer = plane.peers.owner(*destination_of(key))
    lane = _lane(plane, peer, key)
    if lane is None:
        tell(ProbeAnswer(serial=request.serial, why=_why_none(peer, request.destination)))
        return
    link, timeout_s = lane.carrier, plane.live.config.health.timeout
    local, remote = link.endpoints()
    session = SessionProbe(
        peer_id=link.peer.peer_id, session_id=link.session_id, local=local, remote=remote, rtt_ms=None
    )
    late = False

    def answered(sent_s: float) -> None:
        if not late:
            timer.cancel()
            rtt_ms = (plane.now() - sent_s) * 1000
            measured = msgspec.structs.replace(session, rtt_ms=rtt_ms)
            tell(ProbeAnswer(serial=request.serial, session=measured))

    def too_late() -> None:
        nonlocal late
        late = True
        why = "it has ended" if link.closed else f"no answer within {timeout_s:g} s"
        tell(ProbeAnswer(serial=request.serial, session=session, why=why))

    timer = asyncio.get_running_loop().call_later(timeout_s, too_late)
    link.barrier(answered)


def _lane(plane: Plane, peer: Peer | None, key: int) -> StreamLane | None:
    """Where the flow is, or where it would go with its next packet."""
    flow = plane.flows.flows.get(key)
    if flow is not None and isinstance(flow.sink, StreamLane) and not flow.sink.closed:
        return flow.sink
    lane = peer.multiplexer.pick() if peer is not None else None
    return lane if isinstance(lane, StreamLane) else None


def _why_none(peer: Peer | None, destination: str) -> str:
    if peer is None:
        return f"no peer owns {destination}"
    if peer.circuit == OPEN:
        return "its circuit is open, packets are dropped"
    return "packets wait for one"
