"""The status report: what `vpnd status --json` prints, put together from all processes.

The books, in packets (superpackets count as one), at `books`: what was read is what was sent, dropped, and on its way.
They are exact when nothing moves; under load, counts of different processes are of slightly different moments.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import psutil

from supervisor import traffic
from supervisor.children import Child
from supervisor.fleet import Fleet
from supervisor.network.tun import Tun
from supervisor.pump import Pump
from supervisor.slots import ShardSlot
from vpnd import __version__
from vpnd.api.messages import ControlStatus, ShardStatus
from vpnd.api.reports import OwnAddresses, PeerReport, SessionReport
from vpnd.config.schema import Config
from vpnd.metrics import DROP_REASONS, OUTBOUND_DROPS
from vpnd.packet.capability import Offload

FLOW_STATES = ("active", "idle", "stalled", "draining")


def usage(child: Child) -> dict[str, Any]:
    """pid, restarts, state, CPU and memory of a child; zeros while there is no process."""
    row: dict[str, Any] = {
        "pid": child.pid,
        "restarts": child.restarts,
        "state": child.state.value,
        "cpu_percent": 0.0,
        "rss_bytes": 0,
    }
    if child.process is not None:
        try:
            row["cpu_percent"] = child.process.cpu_percent()
            row["rss_bytes"] = child.process.memory_info().rss
        except psutil.Error:
            pass  # died this moment; its pidfd will tell
    return row


def shard_row(slot: ShardSlot, child: Child) -> dict[str, Any]:
    """One row of shards[]."""
    counts = slot.page.read()
    drops = {reason: counts[f"dropped_{reason}"] for reason in DROP_REASONS}
    return {
        "index": slot.index,
        **usage(child),
        **{name: value for name, value in counts.items() if not name.startswith("dropped_")},
        "drops": {reason: count for reason, count in drops.items() if count},
        "ring": slot.ring_use(),
    }


def peer_rows(
    config: Config,
    control: ControlStatus | None,
    last_told: ControlStatus | None,
    shards: Mapping[int, ShardStatus | None],
    slots: list[ShardSlot],
) -> list[dict[str, Any]]:
    """peers[]: who they are by the configuration in force and by what control said last, how they are by what control
    says now, and what the shards measured."""
    sessions: dict[str, list[SessionReport]] = collections.defaultdict(list)
    for shard in shards.values():
        for session in shard.sessions if shard is not None else ():
            sessions[session.peer_id].append(session)
    known: dict[str, PeerReport] = (
        {peer.peer_id: peer for peer in control.peers} if control is not None else {}
    )
    rows = []
    for who in _who(config, control or last_told):
        peer_id = who["peer_id"]
        mine = sessions[peer_id]
        totals: collections.Counter[str] = collections.Counter()
        for slot in slots:
            totals.update(slot.traffic.of(peer_id))
        rows.append(
            {
                **who,
                **_told(known.get(peer_id), any(session.state == "up" for session in mine)),
                **_measured(mine),
                **{name: totals[name] for name in traffic.NAMES},
            }
        )
    return rows


def _who(config: Config, told: ControlStatus | None) -> list[dict[str, Any]]:
    """Configured peers as the configuration has them, then members."""
    rows: dict[str, dict[str, Any]] = {
        peer.peer_id: {
            "name": peer.name,
            "peer_id": peer.peer_id,
            "virtual_ip": peer.virtual_ip,
            "virtual_ips": (peer.virtual_ip,),
            "routes": (),
            "source": "configuration",
            "addresses": peer.addresses,
        }
        for peer in config.peers
    }
    for other in told.peers if told is not None else ():
        if other.peer_id in rows:
            if config.registry.kind == "contract":  # which says what else it has, or that it has not
                rows[other.peer_id]["virtual_ips"] = other.virtual_ips
        elif other.source != "configuration":
            rows[other.peer_id] = {
                "name": other.name,
                "peer_id": other.peer_id,
                "virtual_ip": other.virtual_ips[0] if other.virtual_ips else "",
                "virtual_ips": other.virtual_ips,
                "routes": other.routes,
                "source": other.source,
                "addresses": tuple(dict.fromkeys(other.addresses)),
            }
    return list(rows.values())


def network_row(
    own: OwnAddresses, control: ControlStatus | None, last_told: ControlStatus | None
) -> dict[str, Any] | None:
    """network: what control said of it last; `current` is false when that is not from now. None of a static node."""
    told = control or last_told
    if not own.network:
        return None
    row: dict[str, Any] = {"name": own.network, "label": own.label, "advertised": own.advertised}
    if told is None or told.network is None:
        return {**row, "state": "unknown", "current": False}
    network = told.network
    return {
        **row,
        "network_id": network.network_id,
        "state": network.state,
        "current": control is not None,
        "authority": network.authority,
        "authorities": network.authorities,
        "members": network.members,
        "expires_s": network.expires_s,
        "neighbours": network.neighbours,
        "conflicts": network.conflicts,
    }


def _told(peer: PeerReport | None, up: bool) -> dict[str, Any]:
    """What control says of a peer; a session that is up is known better by its shard."""
    if peer is None:
        row: dict[str, Any] = {
            "state": "unknown", "circuit": "unknown", "circuit_opened": 0,
            "last_error": "", "next_dial_s": -1.0, "dials": 0, "dial_failures": 0, "ownership": (),
        }  # fmt: skip
    else:
        row = {
            "state": peer.state, "circuit": peer.circuit, "circuit_opened": peer.circuit_opened,
            "last_error": peer.last_error, "next_dial_s": peer.next_dial_s,
            "dials": peer.dials, "dial_failures": peer.dial_failures, "ownership": peer.ownership,
        }  # fmt: skip
    return {**row, "state": "connected"} if up else row


def _measured(sessions: list[SessionReport]) -> dict[str, Any]:
    """What the shards say of the sessions with a peer: sums, but the best round trip and the longest queue."""
    rtts = [session.rtt_ms for session in sessions if session.rtt_ms is not None]
    return {
        "rtt_ms": min(rtts) if rtts else None,
        "sessions": len(sessions),
        "streams": sum(session.streams for session in sessions),
        "suspect": sum(session.health != "healthy" for session in sessions),
        "queued_bytes": sum(session.queued_bytes for session in sessions),
        "queue_delay_ms": max((session.queue_delay_ms for session in sessions), default=0.0),
    }


def dropped(pump: Pump, slots: list[ShardSlot]) -> dict[str, int]:
    """Drops by reason, of all processes; every reason is there."""
    total = dict(pump.dropped)
    for slot in slots:
        counts = slot.page.read()
        for reason in DROP_REASONS:
            total[reason] += counts[f"dropped_{reason}"]
    return total


def books(pump: Pump, slots: list[ShardSlot], drops: dict[str, int]) -> dict[str, Any]:
    """Both sums; `difference` is 0 when nothing is moving."""
    counts = [slot.page.read() for slot in slots]
    sent = sum(count["packets_sent"] for count in counts)
    in_flight = sum(count["packets_queued"] for count in counts) + sum(slot.in_ring() for slot in slots)
    local = ("malformed_local", "not_unicast", "ring_full", "shard_down")
    lost_out = sum(drops[reason] for reason in (*local, *OUTBOUND_DROPS))
    received = sum(count["packets_received"] for count in counts)
    written = sum(count["packets_to_tun"] for count in counts)
    lost_in = sum(
        drops[reason]
        for reason in (
            "malformed_remote",
            "bad_offload_header",
            "source_not_allowed",
            "destination_not_ours",
            "tun_write_failed",
        )
    )
    return {
        "out": {
            "read": pump.packets_read,
            "sent": sent,
            "dropped": lost_out,
            "in_flight": in_flight,
            "difference": pump.packets_read - sent - lost_out - in_flight,
        },
        "in": {
            "received": received,
            "written": written,
            "dropped": lost_in,
            "difference": received - written - lost_in,
        },
    }


def build(
    *,
    node: dict[str, Any],
    supervisor: dict[str, Any],
    config: Config,
    tun: Tun,
    pump: Pump,
    fleet: Fleet,
    own: OwnAddresses,
    control_status: ControlStatus | None,
    last_told: ControlStatus | None,
    shard_statuses: Mapping[int, ShardStatus | None],
) -> dict[str, Any]:
    """The whole report, ready for JSON. None, or nothing at its index, for a process that did not answer in time;
    `last_told` is what control answered last.

    retired[] are shards that were scaled away: rows like those of shards[], whose counts stay in every sum.
    """
    drops = dropped(pump, fleet.slots)
    rows = [shard_row(slot, child) for slot, child in fleet.present]
    retired = [shard_row(slot, child) for slot, child in fleet.retired]
    return {
        "version": __version__,
        "ready": fleet.ready,
        "node": {**node, "listen": fleet.control.listen},
        "supervisor": supervisor,
        "control": {
            **usage(fleet.control),
            "connections": control_status.connections if control_status is not None else None,
            "counters": fleet.control_page.read(),
        },
        "shards": rows,
        "retired": retired,
        "flows": {state: sum(row[f"flows_{state}"] for row in rows) for state in FLOW_STATES},
        "network": network_row(own, control_status, last_told),
        "peers": peer_rows(config, control_status, last_told, shard_statuses, fleet.slots),
        "tun": {
            "interface": tun.name,
            "mtu": tun.mtu,
            "offloads": [flag.name for flag in Offload if flag in tun.offloads],
            "packets_read": pump.packets_read,
            "packets_written": sum(row["packets_to_tun"] for row in (*rows, *retired)),
            "bytes_read": pump.bytes_read,
            "bytes_written": sum(row["bytes_to_tun"] for row in (*rows, *retired)),
            "reads": pump.reads,
            "merged": pump.merged,
            "flows": len(pump.flows),
        },
        "dropped": drops,
        "books": books(pump, fleet.slots, drops),
    }
