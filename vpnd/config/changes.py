"""Which settings a running node takes over, and what is different between two configurations.

Every setting is in exactly one of two places: `RESTART`, with what to do about it, when it is baked into a device, a
ring, a socket or a process's rights; else in `LIVE`. Some live settings (the buffers of a session, say) count for
what is made from then on. Peers are live: they are compared by peer id.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from vpnd.config import fields, template
from vpnd.config.fields import PEERS
from vpnd.config.schema import Config, Peer

_AGAIN = "stop the node and start it again"

#: Tables of which everything is taken at the start.
_RESTART_TABLES = ("membership", "discovery", "dns", "registry")

#: Setting -> how it gets into force.
RESTART: dict[str, str] = {
    "state_dir": "stop the node and start another one there",
    "worker.shards": "use `vpnd scale`",
    **{field.path: _AGAIN for field in fields.all_settings() if field.table in _RESTART_TABLES},
    **dict.fromkeys(
        (
            "node.name",
            "network.interface",
            "network.mtu",
            "network.virtual_ip",
            "network.subnet",
            "network.routes",
            "network.allow_overlap",
            "network.offloads",
            "network.coalesce_udp",
            "network.queue_length",
            "network.read_batch",
            "network.advertise",
            "network.accept_routes",
            "network.exit_node",
            "network.route_table",
            "network.rule_priority",
            "p2p.listen",
            "p2p.identity_file",
            # of the libp2p host and its transport, which are made once
            "p2p.handshake_timeout",
            "p2p.max_inbound_handshakes",
            "p2p.max_connections_per_peer",
            "p2p.max_streams_per_connection",
            "p2p.max_unread_per_connection",
            "p2p.stream_timeout",
            "p2p.keepalive_interval",
            "session.cipher",
            "session.user_timeout",
            "worker.ring_bytes",
            "worker.publish_bytes",
            "process.user",
            "status.socket",
            "metrics.listen",
        ),
        _AGAIN,
    ),
}

LIVE = frozenset(
    {
        "network.change_settle",
        "network.change_settle_max",
        "network.suspend_check",
        "p2p.dial_timeout",
        "p2p.connect_timeout",
        "p2p.dial_stagger",
        "p2p.address_stagger",
        "p2p.max_dials",
        "p2p.eager_peers",
        "p2p.max_sessions_per_peer",
        "retry.max_attempts",
        "retry.initial_interval",
        "retry.max_interval",
        "retry.multiplier",
        "worker.max_flows",
        "worker.buffer_size",
        "worker.stall_timeout",
        "worker.idle_timeout",
        "worker.cleanup_interval",
        "worker.pending_bytes",
        "worker.pending_timeout",
        "session.window_bytes",
        "session.send_buffer_bytes",
        "session.control_reserve_bytes",
        "session.receive_buffer_bytes",
        "session.queue_bytes",
        "session.hold_bytes",
        "session.not_sent_lowat_bytes",
        "session.congestion_control",
        "session.retransmit_min",
        "session.ack_delay_max",
        "session.max_streams",
        "session.negotiate_timeout",
        "session.close_timeout",
        "session.quantum_bytes",
        "session.delay_target",
        "session.delay_interval",
        "session.drain_timeout",
        "session.max_age",
        "session.max_bytes",
        "stream_pool.min_streams_per_peer",
        "stream_pool.max_streams_per_peer",
        "stream_pool.idle_timeout",
        "stream_pool.cleanup_interval",
        "multiplexer.min_sessions",
        "multiplexer.max_sessions",
        "multiplexer.auto_scaling_interval",
        "multiplexer.scale_up_delay",
        "multiplexer.busy_bytes",
        "circuit_breaker.failure_threshold",
        "circuit_breaker.reset_timeout",
        "circuit_breaker.success_threshold",
        "health.interval",
        "health.timeout",
        "health.max_consecutive_failures",
        "health.urgent_timeout",
        "health.warm_interval",
        "health.warm_for",
        "process.realtime",
        "process.realtime_pause",
        "process.realtime_packets",
        "process.realtime_window",
        "process.ready_timeout",
        "process.stop_timeout",
        "process.drain_timeout",
        "process.restart_initial",
        "process.restart_max",
        "process.restart_settle",
        "status.max_peers",
        "status.timeout",
        "status.poll_interval",
        "status.sample_interval",
        "metrics.interval",
        "log.level",
        "log.refusal_interval",
    }
)


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One setting. `old` and `new` are what the Structs hold: durations in seconds, sizes in bytes.

    `key` is the setting's path; of a peer that stays, its name as it was: peers[b].addresses. `remedy`: how it gets
    into force; empty for one that is in force.
    """

    key: str
    old: object
    new: object
    remedy: str = ""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a reload does. `config` is what is in force afterwards: the new one, with the old value of everything in
    `needs_restart`."""

    config: Config
    applied: tuple[Difference, ...]
    needs_restart: tuple[Difference, ...]
    peers_added: tuple[Peer, ...]
    peers_removed: tuple[Peer, ...]


def compare(running: Config, wanted: Config) -> Change:
    """From the configuration in force to another complete one (see load.complete). Nothing is judged here: that
    `config` is still one that `check` finds good, the caller has to see."""
    different = list(_differences(running, wanted))
    before = {peer.peer_id: peer for peer in running.peers}
    after = {peer.peer_id: peer for peer in wanted.peers}
    moved = [
        Difference(key=f"{PEERS}[{peer.name}].{key}", old=getattr(peer, key), new=getattr(other, key))
        for peer_id, peer in before.items()
        if (other := after.get(peer_id)) is not None
        for key in fields.tables()[PEERS]
        if getattr(peer, key) != getattr(other, key)
    ]
    kept = tuple(difference for difference in different if difference.remedy)
    return Change(
        config=_with_old(wanted, running, {difference.key for difference in kept}),
        applied=(*(difference for difference in different if not difference.remedy), *moved),
        needs_restart=kept,
        peers_added=tuple(peer for peer_id, peer in after.items() if peer_id not in before),
        peers_removed=tuple(peer for peer_id, peer in before.items() if peer_id not in after),
    )


def _differences(running: Config, wanted: Config) -> Iterator[Difference]:
    values = [("state_dir", running.state_dir, wanted.state_dir)]
    for field in fields.all_settings():
        pair = (getattr(getattr(config, field.table), field.key) for config in (running, wanted))
        values.append((field.path, *pair))
    for path, old, new in values:
        if old != new:
            yield Difference(key=path, old=old, new=new, remedy=RESTART.get(path, ""))


def _with_old(wanted: Config, running: Config, paths: set[str]) -> Config:
    changes: dict[str, object] = {}
    for table in {path.partition(".")[0] for path in paths}:
        if table == "state_dir":
            changes[table] = running.state_dir
            continue
        keys = [path.partition(".")[2] for path in paths if path.startswith(f"{table}.")]
        old = getattr(running, table)
        changes[table] = msgspec.structs.replace(
            getattr(wanted, table), **{key: getattr(old, key) for key in keys}
        )
    return msgspec.structs.replace(wanted, **changes)


def show(key: str, value: object) -> str:
    """A value of a `Difference` as the configuration file would have it."""
    table, _, name = key.rpartition(".")
    field = fields.tables().get(table.partition("[")[0], {}).get(name)
    return template.toml_value(field, value) if field is not None else str(value)
