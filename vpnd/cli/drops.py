"""What each drop reason means, in words for the person who reads `vpnd status`."""

from __future__ import annotations

#: Every name of vpnd.metrics.DROP_REASONS.
DROP_MEANINGS = {
    "malformed_local": "from this machine: not IPv4 or IPv6, or shorter than its header says",
    "not_unicast": "from this machine: multicast and broadcast are not carried (usually harmless)",
    "ring_full": "the shard does not keep up: more shards, or a larger worker.ring_bytes",
    "shard_down": "while its shard was being restarted",
    "shard_died": "was in a shard that died, on the way to a peer",
    "no_route": "no peer owns the destination: is there a [[peers]] entry for it?",
    "no_session": "waited in vain for a session with the peer (worker.pending_timeout, pending_bytes)",
    "circuit_open": "the peer cannot be reached and is left alone for a while; `vpnd status` says why",
    "flow_full": "one flow sends more than the network takes (worker.buffer_size)",
    "queue_full": "the peer or the network is slower than what is sent (session.queue_bytes)",
    "queue_delay": "to keep waiting times short; its sender slows down (session.delay_target)",
    "too_big": "larger than the peer's TUN device takes, and must not be cut",
    "peer_forgotten": "the destination is no longer a peer",
    "malformed_remote": "a peer sent something that is no IP packet",
    "bad_offload_header": "a peer sent a packet whose offload header does not fit it",
    "source_not_allowed": "a peer used a source address that is not its own",
    "destination_not_ours": "a peer sent what is neither for this node nor for a network it routes",
    "tun_write_failed": "the kernel refused it on the TUN device",
}
