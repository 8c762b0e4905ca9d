"""What a shard answers when it is asked: for `vpnd status`, `vpnd ping` and `vpnd why`."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable

from msgspec.structs import replace

from shards.flow.flows import Discard
from shards.flow.queues import Pending, ReorderBuffer
from shards.peer.table import OPEN, Peer
from shards.plane import Plane
from shards.session.alone import Alone
from shards.session.beside import DatagramLane
from shards.session.link import Link, StreamLane
from vpnd.api.messages import ProbeAnswer, ProbeRequest
from vpnd.api.reports import FlowReport, SessionProbe, SessionReport
from vpnd.packet.flow import destination_of, echo_key, key_to


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
        datagrams=None if link.beside is None else link.beside.report(),
        **link.traffic()._asdict(),
    )


def alone_report(alone: Alone) -> SessionReport:
    """Of datagrams that have outlived their session."""
    return SessionReport(
        peer_id=alone.peer.peer_id,
        session_id=alone.session_id,
        initiator=alone.initiator,
        state="alone",
        rtt_ms=None,
        streams=0,
        queued_bytes=alone.beside.queue.bytes,
        age_s=alone.age_s(),
        queue_delay_ms=alone.beside.queue.delay_s * 1000,
        datagrams=alone.beside.report(),
        **alone.traffic()._asdict(),
    )


def probe(plane: Plane, request: ProbeRequest, tell: Callable[[ProbeAnswer], None]) -> None:
    """Which session carries a flow, and its round trip now: a ping in it, behind all that was sent.
    `tell` is called once, within health.timeout."""
    address = ipaddress.ip_address(request.destination)
    key = key_to(address, request.protocol, request.port) if request.protocol else echo_key(address)
    peer = plane.peers.owner(*destination_of(key))
    lane = _lane(plane, peer, key)
    answer = ProbeAnswer(
        serial=request.serial,
        owner=peer.peer_id if peer is not None else "",
        flow=_flow_report(plane, key),
    )
    if lane is None:
        tell(replace(answer, why=_why_none(peer, request.destination)))
        return
    link, timeout_s = lane.carrier, plane.live.config.health.timeout
    local, remote = link.transport.endpoints()
    session = SessionProbe(
        peer_id=link.peer.peer_id, session_id=link.session_id, local=local, remote=remote, rtt_ms=None
    )
    late = False

    def answered(sent_s: float) -> None:
        if not late:
            timer.cancel()
            rtt_ms = (plane.now() - sent_s) * 1000
            tell(replace(answer, session=replace(session, rtt_ms=rtt_ms)))

    def too_late() -> None:
        nonlocal late
        late = True
        why = "it has ended" if link.closed else f"no answer within {timeout_s:g} s"
        tell(replace(answer, session=session, why=why))

    timer = asyncio.get_running_loop().call_later(timeout_s, too_late)
    link.barrier(answered)


def _flow_report(plane: Plane, key: int) -> FlowReport:
    flow = plane.flows.flows.get(key)
    if flow is None or flow.sink is None:
        return FlowReport(state="none", packets=flow.packets if flow is not None else 0)
    kinds = {
        StreamLane: "lane",
        DatagramLane: "datagrams",
        Pending: "pending",
        Discard: "discarded",
        ReorderBuffer: "held",
    }
    oldest_s = flow.oldest_s()
    return FlowReport(
        state=kinds.get(type(flow.sink), "lane"),
        packets=flow.packets,
        waiting=flow.backlog.packets if flow.backlog is not None else 0,
        waiting_ms=0.0 if oldest_s is None else max(0.0, (plane.now() - oldest_s) * 1000),
    )


def _lane(plane: Plane, peer: Peer | None, key: int) -> StreamLane | None:
    """Where the flow is, or where it would go with its next packet; beside which, if it goes in datagrams."""
    flow = plane.flows.flows.get(key)
    if flow is not None and isinstance(flow.sink, StreamLane) and not flow.sink.closed:
        return flow.sink
    if flow is not None and isinstance(flow.sink, DatagramLane) and (lanes := flow.sink.carrier.lanes):
        return lanes[0]
    lane = peer.multiplexer.pick() if peer is not None else None
    return lane if isinstance(lane, StreamLane) else None


def _why_none(peer: Peer | None, destination: str) -> str:
    if peer is None:
        return f"no peer owns {destination}"
    if peer.pool.datagrams() is not None:
        return "its connections carry nothing, packets go in datagrams"
    if peer.circuit == OPEN:
        return "its circuit is open, packets are dropped"
    return "packets wait for one"
