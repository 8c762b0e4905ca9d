"""What `vpnd ping` asks of a shard: which session carries the pings to an address, and its round trip now."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable

import msgspec

from shards.peer.table import OPEN, Peer
from shards.plane import Plane
from shards.session.lane import Lane
from vpnd.api.messages import ProbeAnswer, ProbeRequest
from vpnd.api.reports import SessionProbe
from vpnd.packet.flow import destination_of, echo_key


def probe(plane: Plane, request: ProbeRequest, tell: Callable[[ProbeAnswer], None]) -> None:
    """Ping in the session, behind all that was sent in it. `tell` is called once, within health.timeout."""
    key = echo_key(ipaddress.ip_address(request.destination))
    peer = plane.peers.owner(*destination_of(key))
    lane = _lane(plane, peer, key)
    if lane is None:
        tell(ProbeAnswer(serial=request.serial, why=_why_none(peer, request.destination)))
        return
    link, timeout_s = lane.link, plane.live.config.health.timeout
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


def _lane(plane: Plane, peer: Peer | None, key: int) -> Lane | None:
    """Where the flow is, or where it would go with its next packet."""
    flow = plane.flows.flows.get(key)
    if flow is not None and isinstance(flow.sink, Lane) and not flow.sink.closed:
        return flow.sink
    return peer.multiplexer.pick() if peer is not None else None


def _why_none(peer: Peer | None, destination: str) -> str:
    if peer is None:
        return f"no peer owns {destination}"
    if peer.circuit == OPEN:
        return "its circuit is open, packets are dropped"
    return "packets wait for one"
