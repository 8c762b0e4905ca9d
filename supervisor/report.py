"""The status report: what `vpnd status --json` prints, put together from all processes.

The books, in packets (superpackets count as one), at `books`: what was read is what was sent, dropped, and on its way.
They are exact when nothing moves; under load, counts of different processes are of slightly different moments.
"""

from __future__ import annotations

import collections
from typing import Any

import psutil

from supervisor.children import Child, State
from supervisor.network.tun import Tun
from supervisor.pump import Pump
from supervisor.slots import Slot
from vpnd import __version__
from vpnd.api.messages import ControlStatus, PeerReport, SessionReport, ShardStatus
from vpnd.config.schema import Config
from vpnd.metrics import DROP_REASONS, OUTBOUND_DROPS, CounterPage
from vpnd.packet.capability import Offload

TRAFFIC = ("bytes_sent", "bytes_received", "packets_sent", "packets_received")


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


def shard_row(slot: Slot, child: Child) -> dict[str, Any]:
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
    config: Config, control: ControlStatus | None, shards: list[ShardStatus | None]
) -> list[dict[str, Any]]:
    """peers[]: what the configuration names, what control knows of it, what the shards measured."""
    sessions: dict[str, list[SessionReport]] = collections.defaultdict(list)
    for shard in shards:
        for session in shard.sessions if shard is not None else ():
            sessions[session.peer_id].append(session)
    traffic: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for shard in shards:
        for row in shard.traffic if shard is not None else ():
            traffic[row.peer_id].update({name: getattr(row, name) for name in TRAFFIC})
    known: dict[str, PeerReport] = (
        {peer.peer_id: peer for peer in control.peers} if control is not None else {}
    )
    rows = []
    for peer in config.peers:
        mine = sessions[peer.peer_id]
        rtts = [session.rtt_ms for session in mine if session.rtt_ms is not None]
        told = known.get(peer.peer_id)
        up = any(session.state == "up" for session in mine)
        rows.append(
            {
                "name": peer.name,
                "peer_id": peer.peer_id,
                "virtual_ip": peer.virtual_ip,
                "addresses": peer.addresses,
                "state": "connected" if up else told.state if told is not None else "unknown",
                "rtt_ms": min(rtts) if rtts else None,
                "sessions": len(mine),
                "last_error": told.last_error if told is not None else "",
                "next_dial_s": told.next_dial_s if told is not None else -1.0,
                "dials": told.dials if told is not None else 0,
                "dial_failures": told.dial_failures if told is not None else 0,
                "queued_bytes": sum(session.queued_bytes for session in mine),
                **{name: traffic[peer.peer_id][name] for name in TRAFFIC},
            }
        )
    return rows


def dropped(pump: Pump, slots: list[Slot]) -> dict[str, int]:
    """Drops by reason, of all processes; every reason is there."""
    total = dict(pump.dropped)
    for slot in slots:
        counts = slot.page.read()
        for reason in DROP_REASONS:
            total[reason] += counts[f"dropped_{reason}"]
    return total


def books(pump: Pump, slots: list[Slot], drops: dict[str, int]) -> dict[str, Any]:
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
    slots: list[Slot],
    shards: list[Child],
    control: Child,
    control_page: CounterPage,
    control_status: ControlStatus | None,
    shard_statuses: list[ShardStatus | None],
) -> dict[str, Any]:
    """The whole report, ready for JSON. None for a process that did not answer in time."""
    drops = dropped(pump, slots)
    rows = [shard_row(slot, child) for slot, child in zip(slots, shards, strict=True)]
    children_up = all(child.state is State.UP for child in (control, *shards))
    return {
        "version": __version__,
        "ready": children_up,
        "node": {**node, "listen": control.listen},
        "supervisor": supervisor,
        "control": {
            **usage(control),
            "connections": control_status.connections if control_status is not None else None,
            "counters": control_page.read(),
        },
        "shards": rows,
        "peers": peer_rows(config, control_status, shard_statuses),
        "tun": {
            "interface": tun.name,
            "mtu": tun.mtu,
            "offloads": [flag.name for flag in Offload if flag in tun.offloads],
            "packets_read": pump.packets_read,
            "packets_written": sum(row["packets_to_tun"] for row in rows),
            "bytes_read": pump.bytes_read,
            "bytes_written": sum(row["bytes_to_tun"] for row in rows),
            "reads": pump.reads,
            "merged": pump.merged,
            "flows": len(pump.flows),
        },
        "dropped": drops,
        "books": books(pump, slots, drops),
    }
