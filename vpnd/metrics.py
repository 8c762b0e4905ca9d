"""Counters of all processes, in shared memory.

Each child slot (control, shard 0, shard 1 …) has one page of unsigned 64-bit counters, native byte order,
in a memfd that the supervisor makes and keeps: it outlives the child, so a restarted child goes on where
the dead one stopped and nothing is forgotten. A counter has one writer, the child; the supervisor reads,
and writes only while no process has the page, to settle what a dead one had under way. A name's offset is
its place in the tuple below. One 8-byte store is atomic on every machine CPython runs on.

The hot path adds to plain ints and stores them here once a batch.
"""

from __future__ import annotations

import mmap
import os

from vpnd.membership.refusal import REASONS

#: Why a packet was dropped. Every drop, in any process, counts under one of these.
DROP_REASONS = (
    # supervisor: from the TUN, before a shard has it
    "malformed_local",  # not IPv4 or IPv6, or shorter than its header says
    "not_unicast",  # multicast and broadcast are not carried
    "ring_full",  # the shard does not keep up
    "shard_down",  # the shard is being restarted
    "shard_died",  # in a shard that died: in its ring, or in its queues
    # shard: from the ring, towards a peer
    "no_route",  # no peer owns the destination
    "no_session",  # waited for a session longer than worker.pending_timeout, or pending_bytes were full
    "circuit_open",  # the peer's circuit is open and it has no session
    "flow_full",  # worker.buffer_size packets of its flow waited already
    "queue_full",  # session.queue_bytes were full
    "queue_delay",  # waited longer than session.delay_target for longer than session.delay_interval
    "too_big",  # the peer's TUN cannot take it and it cannot be cut
    "peer_forgotten",  # its destination is no longer a peer
    # shard: from a peer, towards the TUN
    "malformed_remote",  # IP header, or length, is wrong
    "bad_offload_header",  # virtio_net_hdr does not fit the packet
    "source_not_allowed",  # cryptokey routing: the peer may not use this source address
    "destination_not_ours",  # neither our address nor a network we route
    "tun_write_failed",  # the kernel refused it
)

#: The reasons a packet can be dropped for between the ring to a shard and the peer.
OUTBOUND_DROPS = (
    "shard_died",
    "no_route",
    "no_session",
    "circuit_open",
    "flow_full",
    "queue_full",
    "queue_delay",
    "too_big",
    "peer_forgotten",
)

SHARD_COUNTERS = (
    "packets_from_tun",  # records taken from the ring to the shard
    "bytes_from_tun",  # their packet bytes, headers of IP included, virtio_net_hdr not
    "packets_to_tun",  # records written into the TUN
    "bytes_to_tun",
    "packets_sent",  # records sealed and given to a session
    "bytes_sent",
    "packets_received",  # records received from peers, good or bad
    "bytes_received",
    "packets_queued",  # gauge: records waiting in queues of this shard
    "flows",  # gauge; the next four are flows by state
    "flows_active",
    "flows_idle",
    "flows_stalled",
    "flows_draining",
    "flows_created",
    "flows_reaped",
    "flows_moved",  # to another stream
    "streams",  # gauge
    "streams_opened",
    "streams_closed",
    "streams_failed",  # did not open, or were reset
    "streams_acquired",  # by a flow
    "streams_returned",
    "sessions",  # gauge
    "sessions_opened",
    "sessions_closed",
    "sessions_rotated",  # replaced because of session.max_age or session.max_bytes
    "session_errors",
    "health_probes",
    "health_failures",
    "health_deaths",  # sessions ended because probes failed
    *(f"dropped_{reason}" for reason in DROP_REASONS),
)

CONTROL_COUNTERS = (
    "dials",
    "dial_failures",
    "sessions_dialed",
    "sessions_accepted",
    "refused_unknown_peer",
    "refused_session_limit",
    "refused_connection_limit",
    "refused_handshake_limit",
    "refused_no_shard",
    "refused_guest_limit",  # strangers sent away because of membership.max_guests
    *(f"refused_{reason}" for reason in REASONS),  # statements, tokens, and what strangers ask
    "handshake_failures",
    "handler_errors",
    "retries",  # dials after a failure
    "circuits_opened",  # from closed; a probe that fails is the same outage
    "circuits_closed",
    "circuits_open",  # gauge
    "circuits_half_open",  # gauge
    "network_changes",
    "connections",  # gauge: libp2p connections that are not data sessions
    "dns_queries",  # answered, refused ones too
    "dns_ignored",  # not queries at all, too long, or their answer could not be sent
    "dns_connections_refused",  # closed because of dns.max_connections or dns.max_connections_per_client
    "gossip_sent",  # messages about the directory, to other members
    "gossip_received",
    "gossip_dropped",  # because of membership.gossip_queue
    "enrolled",  # memberships this authority gave to new nodes
    "introductions",  # members asked to let this node in, which they did not know
    "introduced",  # members that let themselves be known here in that way
    "renewals",  # memberships renewed, of others by this authority and our own
    "dht_published",  # our record, into the members' table
    "dht_found",
    "dht_not_found",
    "dht_failures",  # look-ups and publications without an answer in time
    "dht_refused_records",  # forged, of nobody, too old or rolled back
    "mdns_sent",
    "mdns_received",
    "mdns_refused",  # not ours to read, or too many
    "registry_lookups",  # questions put to the contract
    "registry_failures",  # without a usable answer
    "registry_wanted",  # asked for by shards: an address of the contract's that no peer has
    "registry_wanted_refused",  # those of no network of the VPN, or too many
    "registry_unconfirmed",  # gauge: addresses that peers claim, without an answer that holds
    "registry_disowned",  # gauge: addresses that peers claim, and the contract has for somebody else's or nobody's
    "registry_stale",  # gauge: addresses whose owner is believed though the last look-up failed
)

#: Names above that go up and down; the rest only grow.
GAUGES = frozenset(
    {
        "packets_queued",
        "flows",
        "flows_active",
        "flows_idle",
        "flows_stalled",
        "flows_draining",
        "streams",
        "sessions",
        "connections",
        "circuits_open",
        "circuits_half_open",
        "registry_unconfirmed",
        "registry_disowned",
        "registry_stale",
    }
)


class CounterPage:
    """One page. `values` is the live memoryview of unsigned 64-bit counters: page.values[page.index["dials"]] += 1."""

    def __init__(self, names: tuple[str, ...], fd: int) -> None:
        """Map the page behind `fd`, which stays the caller's and may be closed at once."""
        self.names = names
        self.index = {name: place for place, name in enumerate(names)}
        self._map = mmap.mmap(fd, page_bytes(names))
        self.values = memoryview(self._map).cast("Q")

    def add(self, name: str, amount: int = 1) -> None:
        """Add to one counter by name; for code that is not on the packet path."""
        self.values[self.index[name]] += amount

    def set(self, name: str, value: int) -> None:
        """Set a gauge by name; for code that is not on the packet path."""
        self.values[self.index[name]] = value

    def read(self) -> dict[str, int]:
        """All counters by name; each is exact, together they are of slightly different moments."""
        return dict(zip(self.names, self.values.tolist(), strict=False))

    def close(self) -> None:
        """Unmap. Views handed out are dead afterwards."""
        self.values.release()
        self._map.close()


def page_bytes(names: tuple[str, ...]) -> int:
    """Size of the memory behind a page: whole pages of the machine."""
    return -(-len(names) * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


def create_page(names: tuple[str, ...], title: str) -> tuple[CounterPage, int]:
    """A new zeroed page in a memfd called `title`, and its descriptor, to be passed to a child."""
    fd = os.memfd_create(title, os.MFD_CLOEXEC)
    os.ftruncate(fd, page_bytes(names))
    return CounterPage(names, fd), fd
