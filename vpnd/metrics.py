"""Counters of all processes, in shared memory: each declared here once, with what it counts and in which unit.

Each child slot (control, shard 0, shard 1 …) has one page of unsigned 64-bit counters, native byte order,
in a memfd that the supervisor makes and keeps: it outlives the child, so a restarted child goes on where
the dead one stopped and nothing is forgotten. A counter has one writer, the child; the supervisor reads,
and writes only while no process has the page, to settle what a dead one had under way. A name's offset is
its place among the names. Behind the counters is the heartbeat of the child, by which the supervisor's watchdog knows
that it is not hung. One 8-byte store is atomic on every machine CPython runs on.

The hot path adds to plain ints and stores them here once a batch.
"""

from __future__ import annotations

import enum
import fcntl
import functools
import mmap
import os
from bisect import bisect_left
from typing import Annotated, NamedTuple, get_type_hints

import msgspec

from vpnd.membership.refusal import REASONS
from vpnd.nat.messages import REFUSALS
from vpnd.packet.record import segments


class Stage(enum.Enum):
    """Where on a packet's way it was dropped."""

    LOCAL = "from the TUN, before a shard has it"
    OUTBOUND = "from the ring to a shard, towards a peer"
    INBOUND = "from a peer, towards the TUN"


class Drop(NamedTuple):
    """A reason to drop a packet; `meaning` is for the person who reads `vpnd status`."""

    stage: Stage
    meaning: str


#: Why a packet was dropped. Every drop, in any process, counts under one of these.
DROPS = {
    "tun_queue_full": Drop(
        Stage.LOCAL, "this machine sends faster than it is read: network.queue_length, or a slower sender"
    ),
    "malformed_local": Drop(
        Stage.LOCAL, "from this machine: not IPv4 or IPv6, or shorter than its header says"
    ),
    "not_unicast": Drop(
        Stage.LOCAL, "from this machine: multicast and broadcast are not carried (usually harmless)"
    ),
    "ring_full": Drop(Stage.LOCAL, "the shard does not keep up: more shards, or a larger worker.ring_bytes"),
    "shard_down": Drop(Stage.LOCAL, "while its shard was being restarted"),
    "shard_died": Drop(Stage.OUTBOUND, "was in the ring or the queues of a shard that died"),
    "no_route": Drop(Stage.OUTBOUND, "no peer owns the destination: is there a [[peers]] entry for it?"),
    "no_session": Drop(
        Stage.OUTBOUND, "waited in vain for a session with the peer (worker.pending_timeout, pending_bytes)"
    ),
    "circuit_open": Drop(
        Stage.OUTBOUND, "the peer cannot be reached and is left alone for a while; `vpnd status` says why"
    ),
    "flow_full": Drop(Stage.OUTBOUND, "one flow sends more than the network takes (worker.buffer_size)"),
    "queue_full": Drop(
        Stage.OUTBOUND, "the peer or the network is slower than what is sent (session.queue_bytes)"
    ),
    "queue_delay": Drop(
        Stage.OUTBOUND, "to keep waiting times short; its sender slows down (session.delay_target)"
    ),
    "too_big": Drop(Stage.OUTBOUND, "larger than the peer's TUN device takes, and must not be cut"),
    "peer_forgotten": Drop(Stage.OUTBOUND, "the destination is no longer a peer"),
    "malformed_remote": Drop(Stage.INBOUND, "a peer sent something that is no IP packet"),
    "bad_offload_header": Drop(
        Stage.INBOUND, "a peer sent a packet whose offload header does not fit it"
    ),
    "source_not_allowed": Drop(Stage.INBOUND, "a peer used a source address that is not its own"),
    "destination_not_ours": Drop(
        Stage.INBOUND, "a peer sent what is neither for this node nor for a network it routes"
    ),
    "tun_write_failed": Drop(Stage.INBOUND, "the kernel refused it on the TUN device"),
}  # fmt: skip

DROP_REASONS = tuple(DROPS)


def reasons(stage: Stage) -> tuple[str, ...]:
    return tuple(reason for reason, drop in DROPS.items() if drop.stage is stage)


#: The reasons a packet can be dropped for between the ring to a shard and the peer.
OUTBOUND_DROPS = reasons(Stage.OUTBOUND)


class Drops(dict[str, int]):
    """What was dropped, in records by reason; `packets`: the same, each segment of a superpacket counted."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(DROP_REASONS, 0))
        self.packets = dict.fromkeys(DROP_REASONS, 0)

    def span(self, reason: str, buffer: memoryview, start: int, end: int, records: int) -> None:
        """So many records, those of buffer[start:end]."""
        self[reason] += records
        self.packets[reason] += segments(buffer, start, end, records)

    def plain(self, reason: str, records: int = 1) -> None:
        """Records of which no more is known."""
        self[reason] += records
        self.packets[reason] += records


def told(meaning: str, unit: str = "") -> msgspec.Meta:
    """What a field of a report means, null included, and in which unit it is."""
    return msgspec.Meta(description=meaning, extra_json_schema={"unit": unit} if unit else {})


def gauge(meaning: str, unit: str) -> msgspec.Meta:
    """As `told`, of a counter that goes up and down; the others only grow."""
    return msgspec.Meta(description=meaning, extra_json_schema={"unit": unit}, extra={"gauge": True})


class ShardCounters(msgspec.Struct, frozen=True, kw_only=True):
    """The page of a shard, before its drops."""

    packets_from_tun: Annotated[int, told("Taken from the ring to the shard.", "records")] = 0
    bytes_from_tun: Annotated[
        int, told("Their packets, IP headers included, virtio_net_hdr not.", "bytes")
    ] = 0
    packets_to_tun: Annotated[int, told("Written into the TUN device.", "records")] = 0
    bytes_to_tun: Annotated[int, told("Written into the TUN device.", "bytes")] = 0
    packets_sent: Annotated[int, told("Sealed and given to a session.", "records")] = 0
    bytes_sent: Annotated[int, told("Sealed and given to a session.", "bytes")] = 0
    packets_received: Annotated[int, told("Received from peers, good or bad.", "records")] = 0
    bytes_received: Annotated[int, told("Received from peers, good or bad.", "bytes")] = 0
    segments_sent: Annotated[
        int,
        told(
            "Of those sent: each segment of a superpacket counted, as on a link. By records: the mean size of one.",
            "packets",
        ),
    ] = 0
    segments_received: Annotated[
        int,
        told(
            "Of those received: each segment of a superpacket counted, as on a link. By records: the mean size of one.",
            "packets",
        ),
    ] = 0
    batches: Annotated[
        int, told("Batches taken from the ring: records by batches is their mean size.", "batches")
    ] = 0
    packets_queued: Annotated[int, gauge("Wait in the queues of the shard.", "records")] = 0
    flows: Annotated[int, gauge("Flows with a worker in the shard.", "flows")] = 0
    flows_active: Annotated[int, gauge("Flows that send.", "flows")] = 0
    flows_idle: Annotated[int, gauge("Flows that are silent, and forgotten soon.", "flows")] = 0
    flows_stalled: Annotated[int, gauge("Flows whose packets wait.", "flows")] = 0
    flows_draining: Annotated[int, gauge("Flows whose packets are dropped.", "flows")] = 0
    flows_created: Annotated[int, told("Flows that began.", "flows")] = 0
    flows_reaped: Annotated[int, told("Flows that were forgotten after worker.idle_timeout.", "flows")] = 0
    flows_moved: Annotated[int, told("Flows that changed to another stream.", "flows")] = 0
    streams: Annotated[int, gauge("Open streams.", "streams")] = 0
    streams_opened: Annotated[int, told("Streams that opened.", "streams")] = 0
    streams_closed: Annotated[int, told("Streams that closed in order.", "streams")] = 0
    streams_failed: Annotated[int, told("Streams that did not open, or were reset.", "streams")] = 0
    streams_acquired: Annotated[int, told("Times a flow took a stream.", "times")] = 0
    streams_returned: Annotated[int, told("Times a flow gave a stream back.", "times")] = 0
    sessions: Annotated[int, gauge("Sessions with peers.", "sessions")] = 0
    sessions_opened: Annotated[int, told("Sessions taken over from control.", "sessions")] = 0
    sessions_closed: Annotated[int, told("Sessions that ended.", "sessions")] = 0
    sessions_rotated: Annotated[
        int, told("Sessions replaced because of session.max_age or session.max_bytes.", "sessions")
    ] = 0
    session_errors: Annotated[
        int, told("Sessions ended because the peer broke the protocol.", "sessions")
    ] = 0
    session_floods: Annotated[
        int,
        told(
            "Of those: the peer sent more control frames, or left more unfinished packets, than it may.",
            "sessions",
        ),
    ] = 0
    unreachables_told: Annotated[
        int, told("Packets without a way that were answered with ICMP host unreachable.", "packets")
    ] = 0
    health_probes: Annotated[int, told("Health probes sent.", "probes")] = 0
    health_failures: Annotated[int, told("Health probes without an answer in time.", "probes")] = 0
    health_deaths: Annotated[int, told("Sessions ended because their probes failed.", "sessions")] = 0
    datagrams_sent: Annotated[int, told("Sent beside sessions, probes too.", "datagrams")] = 0
    datagrams_unsent: Annotated[int, told("Of those: this machine's kernel refused them.", "datagrams")] = 0
    datagrams_received: Annotated[int, told("Received beside sessions, probes too.", "datagrams")] = 0
    datagrams_marked: Annotated[int, told("Of those: with a mark of congestion (ECN).", "datagrams")] = 0
    datagrams_missed: Annotated[
        int,
        told(
            "Of peers' datagrams: did not come in their turn. Those that are not late were lost.", "datagrams"
        ),
    ] = 0
    datagrams_over: Annotated[
        int, told("Dropped unopened: their peer sends more than its turns take.", "datagrams")
    ] = 0
    datagrams_late: Annotated[int, told("Of those missed: came after all.", "datagrams")] = 0
    datagrams_replayed: Annotated[
        int, told("Dropped: had come before, or are too old to tell.", "datagrams")
    ] = 0
    datagrams_forged: Annotated[int, told("Dropped: do not authenticate.", "datagrams")] = 0
    datagrams_unknown: Annotated[int, told("Dropped: belong to no session of the shard.", "datagrams")] = 0


class Metric(NamedTuple):
    """What is known of a counter but its value."""

    meaning: str
    unit: str
    #: goes up and down; the others only grow
    gauge: bool = False


def described(struct: type[msgspec.Struct]) -> dict[str, Metric]:
    hints = get_type_hints(struct, include_extras=True)
    metas = {name: hint.__metadata__[0] for name, hint in hints.items()}
    return {
        name: Metric(meta.description, (meta.extra_json_schema or {}).get("unit", ""), bool(meta.extra))
        for name, meta in metas.items()
    }


#: What control counts, before its refusals of statements, tokens and strangers' questions.
_CONTROL = {
    "dials": Metric("Dials begun.", "dials"),
    "dial_failures": Metric("Dials that failed.", "dials"),
    "sessions_dialed": Metric("Sessions that we made.", "sessions"),
    "sessions_accepted": Metric("Sessions that peers made.", "sessions"),
    "refused_unknown_peer": Metric("Connections refused: no peer of this node.", "connections"),
    "refused_session_limit": Metric("Sessions refused: p2p.max_sessions_per_peer.", "sessions"),
    "refused_connection_limit": Metric("Connections refused: p2p.max_connections_per_peer.", "connections"),
    "refused_handshake_limit": Metric("Connections refused: p2p.max_inbound_handshakes.", "connections"),
    "refused_handshake_rate": Metric("Handshakes refused: p2p.max_handshakes_per_peer.", "handshakes"),
    "refused_connect_rate": Metric(
        "Connections refused: p2p.max_connects_per_source, or of all.", "connections"
    ),
    "refused_no_shard": Metric("Sessions refused: no shard was up.", "sessions"),
    "refused_guest_limit": Metric("Strangers sent away: membership.max_guests.", "connections"),
    "handshake_failures": Metric("Handshakes that failed.", "handshakes"),
    "handler_errors": Metric("Errors in handlers of libp2p streams.", "errors"),
    "retries": Metric("Dials after a failure.", "dials"),
    "circuits_opened": Metric("Circuits that opened; a probe that fails is the same outage.", "circuits"),
    "circuits_closed": Metric("Circuits that closed again.", "circuits"),
    "circuits_open": Metric("Circuits that are open.", "circuits", gauge=True),
    "circuits_half_open": Metric("Circuits with a probe under way.", "circuits", gauge=True),
    "network_changes": Metric("Changes of the machine's addresses or routes.", "changes"),
    "connections": Metric("libp2p connections that are not data sessions.", "connections", gauge=True),
    "dns_queries": Metric("DNS queries answered, refused ones too.", "queries"),
    "dns_ignored": Metric("Not DNS queries at all, too long, or their answer could not be sent.", "queries"),
    "dns_connections_refused": Metric(
        "DNS connections closed: dns.max_connections, dns.max_connections_per_client.", "connections"
    ),
    "gossip_sent": Metric("Gossip about the directory sent to members.", "messages"),
    "gossip_received": Metric("Gossip received from members.", "messages"),
    "gossip_dropped": Metric("Gossip dropped: membership.gossip_queue.", "messages"),
    "enrolled": Metric("Memberships this authority gave to new nodes.", "members"),
    "introductions": Metric("Members, which did not know this node, asked to let it in.", "members"),
    "introduced": Metric("Members that introduced themselves here.", "members"),
    "renewals": Metric("Memberships renewed: of others by this authority, and our own.", "members"),
    "dht_published": Metric("Times our record went into the members' table.", "records"),
    "dht_found": Metric("Look-ups in the members' table with a result.", "look-ups"),
    "dht_not_found": Metric("Look-ups in the members' table without one.", "look-ups"),
    "dht_failures": Metric("Look-ups and publications without an answer in time.", "look-ups"),
    "dht_refused_records": Metric("Records refused: forged, of nobody, too old or rolled back.", "records"),
    "mdns_sent": Metric("mDNS messages sent.", "messages"),
    "mdns_received": Metric("mDNS messages received.", "messages"),
    "mdns_refused": Metric("mDNS messages not ours to read, or too many.", "messages"),
    "meetings": Metric("Meetings with members that cannot be dialed.", "meetings"),
    "meetings_refused": Metric("Meetings that a relay refused.", "meetings"),
    "calls_followed": Metric("Meetings that other members asked for.", "meetings"),
    "calls_refused": Metric("Meetings refused to other members.", "meetings"),
    "punches": Metric("Meetings after which a direct connection was tried.", "meetings"),
    "punches_won": Metric("Direct connections that came of it.", "sessions"),
    "reachable": Metric(
        "Whether members that were asked could dial this node: 1, else 0.", "yes or no", gauge=True
    ),
    "port_maps": Metric("Ports that the router gives this node.", "ports", gauge=True),
    "meets": Metric("Meetings of other members at this relay.", "meetings"),
    "relay_pairs": Metric("Sessions of other members relayed here.", "sessions", gauge=True),
    "relay_pairs_joined": Metric("Sessions relayed here so far.", "sessions"),
    "relay_bytes": Metric("Relayed here, both directions.", "bytes"),
    "registry_lookups": Metric("Questions put to the contract.", "look-ups"),
    "registry_failures": Metric("Questions without a usable answer.", "look-ups"),
    "registry_wanted": Metric(
        "Questions of shards: an address of the contract's that no peer has.", "look-ups"
    ),
    "registry_wanted_refused": Metric("Those of no network of the VPN, or too many.", "look-ups"),
    "registry_unconfirmed": Metric(
        "Addresses that peers claim, without an answer that holds.", "addresses", gauge=True
    ),
    "registry_disowned": Metric(
        "Addresses that peers claim and that are somebody else's, or nobody's.", "addresses", gauge=True
    ),
    "registry_stale": Metric(
        "Addresses whose owner is believed though the last look-up failed.", "addresses", gauge=True
    ),
}
SHARD_METRICS = described(ShardCounters)
CONTROL_METRICS = (
    _CONTROL
    | {
        f"refused_{reason}": Metric(f"Statements, tokens and questions refused: {reason}.", "refusals")
        for reason in REASONS
    }
    | {
        f"meets_refused_{reason}": Metric(f"Meetings refused at this relay: {reason}.", "refusals")
        for reason in REFUSALS
    }
)
#: Upper limits of the buckets of every histogram, in seconds; one bucket more has what is above.
BOUNDS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
#: What is measured, each with BOUNDS_S and a sum; in a page behind its counters.
SHARD_HISTOGRAMS = {
    "rtt": "Round trips of probes and barriers in sessions.",
    "queue_delay": "How long the packet sent last had waited, each time that packets left the queue of a session.",
    "first_packet": "From the first packet that waited for a session with a peer to the session that took it.",
}
CONTROL_HISTOGRAMS = {
    "handshake": "From the begin of a dial to an established session, of those that succeeded.",
    "to_direct": "From the first try for a direct session to that session, with peers that were met at a relay.",
}


@functools.cache
def histogram_counters(name: str) -> tuple[str, ...]:
    """The names of a histogram's counters in a page: its buckets, and its sum in microseconds."""
    return (*(f"{name}_le_{bound:g}" for bound in (*BOUNDS_S, float("inf"))), f"{name}_sum_us")


#: Counts of a histogram: buckets, and the sum.
TIMES = len(BOUNDS_S) + 2


class Times:
    """How long something took, as a histogram: what `histogram_counters` names, in that order."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = [0] * TIMES

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.counts[-1] += int(seconds * 1_000_000)


#: The names of a page, in the order of its counters.
SHARD_COUNTERS = (
    *SHARD_METRICS,
    *(f"dropped_{reason}" for reason in DROP_REASONS),
    *(f"dropped_packets_{reason}" for reason in DROP_REASONS),
    *(counter for name in SHARD_HISTOGRAMS for counter in histogram_counters(name)),
)
CONTROL_COUNTERS = (
    *CONTROL_METRICS,
    *(counter for name in CONTROL_HISTOGRAMS for counter in histogram_counters(name)),
)
GAUGES = frozenset(name for name, metric in (SHARD_METRICS | CONTROL_METRICS).items() if metric.gauge)


#: Heartbeats in process.watchdog.
BEATS = 5
#: Of a counter: sums of some hundred are still 64-bit integers, and each is exact as a double too.
MOST = (1 << 53) - 1
_WORD = (1 << 64) - 1


def heartbeat_s(watchdog_s: float) -> float:
    """The pause between two heartbeats of a child, by process.watchdog; where that is 0 nobody looks for them."""
    return (watchdog_s or 3600.0) / BEATS


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

    def measured(self, name: str, seconds: float) -> None:
        """Add to a histogram by name; for code that is not on the packet path."""
        first = self.index[f"{name}_le_{BOUNDS_S[0]:g}"]
        self.values[first + bisect_left(BOUNDS_S, seconds)] += 1
        self.values[first + TIMES - 1] += int(seconds * 1_000_000)

    def set(self, name: str, value: int) -> None:
        """Set a gauge by name; for code that is not on the packet path."""
        self.values[self.index[name]] = value

    def read(self) -> dict[str, int]:
        """All counters by name; each is exact, together they are of slightly different moments. What no honest child
        counts to reads as MOST."""
        counts = self.values.tolist()
        if max(counts) > MOST:
            counts = [min(count, MOST) for count in counts]
        return dict(zip(self.names, counts, strict=False))

    def mend(self) -> bool:
        """Set what no honest child counts to to 0, while no process has the page; whether there was any."""
        wrong = [place for place, count in enumerate(self.values.tolist()) if count > MOST]
        for place in wrong:
            self.values[place] = 0
        return bool(wrong)

    def beat(self) -> None:
        """The child is alive, and its loop runs."""
        place = len(self.names)
        self.values[place] = (self.values[place] + 1) & _WORD

    @property
    def beats(self) -> int:
        """Changes with every `beat`."""
        return self.values[len(self.names)]

    def close(self) -> None:
        """Unmap. Views handed out are dead afterwards."""
        self.values.release()
        self._map.close()


def page_bytes(names: tuple[str, ...]) -> int:
    """Size of the memory behind a page: whole pages of the machine."""
    return -(-(len(names) + 1) * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


def shared_memory(title: str, size: int) -> int:
    """A descriptor of `size` zeroed bytes, to be passed to another process; nothing appears in any file system.

    Its size is sealed. Cut by the other side, the next access of this one would be a SIGBUS.
    """
    fd = os.memfd_create(title, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def create_page(names: tuple[str, ...], title: str) -> tuple[CounterPage, int]:
    """A new zeroed page in a memfd called `title`, and its descriptor, to be passed to a child."""
    fd = shared_memory(title, page_bytes(names))
    return CounterPage(names, fd), fd
