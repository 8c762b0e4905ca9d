"""What the page is told of a status: what it draws, and no more. Every key is read in page.js."""

from __future__ import annotations

from typing import Any

from vpnd.metrics import DROPS
from vpnd.nat.paths import DIRECT, PUNCHED, RELAYED, kind_of
from vpnd.printable import many
from vpnd.status import Peer, Shard, Status, connected, known_as


def view(status: Status, max_peers: int) -> dict[str, Any]:
    """For JSON. Counters are totals; the page makes rates of them, by `at_s`."""
    node, network, about = status.node, status.network, "configured peers"
    if network is not None:
        about = f"network {network.name}, {many(network.members, 'member')}"
    peers = sorted(status.peers, key=lambda peer: (peer.state != "connected", peer.name))
    return {
        "at_s": node.uptime_s,
        "version": status.version,
        "health": status.health,
        "ailments": [{"what": each.what, "remedy": each.remedy} for each in status.ailments],
        "warnings": node.warnings,
        "name": known_as(status),
        "addresses": node.addresses,
        "about": about,
        "connected": connected(status),
        "known": len(status.peers),
        "peers": [_peer(peer) for peer in peers[:max_peers]],
        "shards": [_shard(shard) for shard in status.shards],
        "processes": [
            {"name": name, "cpu": part.cpu_percent, "rss": part.rss_bytes}
            for name, part in (("supervisor", status.supervisor), ("control", status.control))
        ],
        "out_bytes": status.tun.bytes_read,
        "in_bytes": status.tun.bytes_written,
        "drops": {
            reason: {"count": count, "meaning": DROPS[reason].meaning if reason in DROPS else ""}
            for reason, count in status.dropped.items()
            if count
        },
    }


def _peer(peer: Peer) -> dict[str, Any]:
    kind, via = _path(peer)
    return {
        "id": peer.peer_id,
        "name": peer.name or peer.peer_id[-8:],
        "ip": peer.virtual_ip,
        "state": peer.state,
        "why": peer.last_error,
        "seen_s": peer.seen_s,
        "circuit": peer.circuit,
        "kind": kind,
        "via": via,
        "rtt_ms": peer.rtt_ms,
        "sessions": peer.sessions,
        "suspect": peer.suspect,
        "queue_ms": peer.queue_delay_ms,
        "sent": peer.bytes_sent,
        "received": peer.bytes_received,
        "drops": sum(peer.drops.values()),
    }


def _path(peer: Peer) -> tuple[str, str]:
    """direct, punched or relayed, and by whom; of several sessions the best one. Empty: there is no session."""
    paths = {kind_of(path): path for path in reversed(peer.paths)}
    kind = next((kind for kind in (DIRECT, PUNCHED, RELAYED) if kind in paths), "")
    if peer.state != "connected" or not kind:
        return "", ""
    return kind, paths[kind].removeprefix("relayed via ").partition(" (")[0] if kind == RELAYED else ""


def _shard(shard: Shard) -> dict[str, Any]:
    return {
        "index": shard.index,
        "state": shard.state,
        "cpu": shard.cpu_percent,
        "rss": shard.rss_bytes,
        "ring": shard.ring.used / shard.ring.size if shard.ring.size else 0.0,
        "sessions": shard.sessions,
        "flows": shard.flows,
        "sent": shard.bytes_sent,
        "received": shard.bytes_received,
        "restarts": shard.restarts,
    }
