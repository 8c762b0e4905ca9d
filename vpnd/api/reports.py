"""What processes tell about themselves inside messages: rows of status, and what a node is in its network."""

from __future__ import annotations

from typing import Annotated

import msgspec

from vpnd.metrics import DROPS, MOST, TIMES, told
from vpnd.nat.paths import Path

#: Of a peer id as text; ours have 52 characters.
MAX_PEER_ID = 128
#: What a child tells is no more than a sum can take; a message that says otherwise is malformed.
COUNT = msgspec.Meta(ge=0, le=MOST)
MEASURE = msgspec.Meta(ge=-1, le=1e12)
Count = Annotated[int, COUNT]
Measure = Annotated[float, MEASURE]
#: By drop reason.
Counts = Annotated[dict[str, Count], msgspec.Meta(max_length=len(DROPS))]


class OwnAddresses(msgspec.Struct, frozen=True, kw_only=True):
    """What this node is in its network.

    `addresses`: its virtual IPs, IPv4 first. `subnets`: all networks of which members have addresses, routed into
    the TUN. `advertised`: its own networks behind it, as far as it may announce them. `network`, `label`: the names
    of network and node, both host labels, for DNS.
    """

    network: str
    label: str
    addresses: tuple[str, ...]
    subnets: tuple[str, ...]
    advertised: tuple[str, ...] = ()


class HeldSession(msgspec.Struct, frozen=True, array_like=True):
    """A session that a shard has. `initiator`: this node made it."""

    session_id: int
    peer_id: str
    initiator: bool
    path: Path = Path()


class PeerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What control knows of one peer."""

    name: Annotated[str, told("Its name.")] = ""
    peer_id: Annotated[str, told("Its identity.")] = ""
    addresses: Annotated[tuple[str, ...], told("Multiaddrs it is dialed at.")] = ()
    state: Annotated[
        str,
        told(
            "connected (packets get there), dialing, backoff, waiting (no address, or the other side's turn) or "
            "unknown."
        ),
    ] = "unknown"
    last_error: Annotated[str, told("Why the last dial failed; empty after a success.")] = ""
    seen_s: Annotated[
        float,
        told(
            "Since its last session ended; negative: one is up, or none was since control began.", "seconds"
        ),
        MEASURE,
    ] = -1.0
    next_dial_s: Annotated[
        float, told("Until the next dial; negative when none is planned.", "seconds"), MEASURE
    ] = -1.0
    dials: Annotated[int, told("Dials since the start of control.", "dials"), COUNT] = 0
    dial_failures: Annotated[int, told("Those that failed.", "dials"), COUNT] = 0
    circuit: Annotated[str, told("Its circuit breaker: closed, open, half_open or unknown.")] = "closed"
    refused: Annotated[
        int,
        told(
            "Of its handshakes, refused by p2p.max_handshakes_per_peer since it last stopped for a minute.",
            "handshakes",
        ),
        COUNT,
    ] = 0
    circuit_opened: Annotated[int, told("Times the circuit opened.", "times"), COUNT] = 0
    virtual_ips: Annotated[tuple[str, ...], told("Its addresses in the VPN.")] = ()
    routes: Annotated[tuple[str, ...], told("Networks behind it that it announces.")] = ()
    source: Annotated[str, told("configuration or membership.")] = "configuration"
    paths: Annotated[
        tuple[str, ...],
        told(
            "How each session reaches it: direct ADDRESS, direct ADDRESS (punched) through NATs, or relayed via NAME."
        ),
    ] = ()
    protocol: Annotated[str, told("What it speaks: vpnd or subnet-node.")] = "vpnd"
    ownership: Annotated[
        tuple[str, ...], told("A line for each address it claims that the contract does not confirm.")
    ] = ()


class NetworkReport(msgspec.Struct, frozen=True, kw_only=True):
    """What control knows of the network."""

    name: Annotated[str, told("Its name.")] = ""
    network_id: Annotated[str, told("Its identity.")] = ""
    state: Annotated[
        str,
        told(
            "What this node is in it: member, removed, expired, early (valid in the future only), lost (with what "
            "was saved) or unknown."
        ),
    ] = "unknown"
    authority: Annotated[bool, told("Whether this node may let others in.")] = False
    authorities: Annotated[int, told("Members that may let others in.", "members"), COUNT] = 0
    members: Annotated[int, told("Members, this node among them.", "members"), COUNT] = 0
    addresses: Annotated[tuple[str, ...], told("This node's addresses.")] = ()
    expires_s: Annotated[float, told("Until this node's membership expires.", "seconds"), MEASURE] = 0.0
    conflicts: Annotated[
        tuple[str, ...], told("A line for each name or address that two members claim.")
    ] = ()
    warnings: Annotated[tuple[str, ...], told("A line for each thing that is not as it should be.")] = ()
    clock: Annotated[str, told("What a step of this machine's clock did to all others; empty: nothing.")] = ""
    neighbours: Annotated[int, told("Members that gossip with this node.", "members"), COUNT] = 0


class ReachReport(msgspec.Struct, frozen=True, kw_only=True):
    """Whether this node can be dialed from outside, as far as control knows."""

    reachable: Annotated[str, told("Whether members that were asked could dial it: yes, no or unknown.")] = (
        "unknown"
    )
    mapping: Annotated[
        str,
        told(
            "What the NAT in front of it makes of ports: none (there is no NAT), kept, moved (another one, the same "
            "for every destination), random (another one for each: symmetric) or unknown."
        ),
    ] = "unknown"
    outside: Annotated[tuple[str, ...], told("Addresses from which members see it come.")] = ()
    port_map: Annotated[
        str, told("The port that its router gave it, and by which protocol; empty: none.")
    ] = ""
    relays: Annotated[tuple[str, ...], told("Members that can call it where it cannot be dialed.")] = ()


class DatagramReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Datagrams beside a session. `state`: silent (they do not arrive), unused (streams are as good), used, or alone
    (the session has ended). `rtt_ms` and what is lost, as shares of 1, are None until measured: `loss_out` of late,
    `loss_in` of all. `size`: of the largest datagram that arrives, in bytes of UDP payload."""

    state: str
    rtt_ms: Measure | None
    jitter_ms: Measure
    loss_out: Measure | None
    loss_in: Measure | None
    size: Count


class SessionReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One session of a shard. Bytes are packet bytes without any framing, packets are records, segments are packets as
    they are on a link; `rtt_ms` None until measured.

    `state`: opening, up, draining, or alone: it has ended, and datagrams beside it go on. `health`: healthy, or suspect
    since a probe failed. `queue_delay_ms`: how long the packet sent last had waited. `segment_bytes`: the largest TCP
    segment it sends (MSS), 0 without TCP.
    """

    peer_id: str
    session_id: Count
    initiator: bool
    state: str
    rtt_ms: Measure | None
    streams: Count
    bytes_sent: Count
    bytes_received: Count
    packets_sent: Count
    packets_received: Count
    segments_sent: Count = 0
    segments_received: Count = 0
    queued_bytes: Count
    age_s: Measure
    health: str = "healthy"
    queue_delay_ms: Measure = 0.0
    segment_bytes: Count = 0
    datagrams: DatagramReport | None = None


class SessionProbe(msgspec.Struct, frozen=True, kw_only=True):
    """One session, measured now. `local`, `remote`: the ends of its TCP connection, IP:port; empty where the kernel
    does not know any more. `rtt_ms`: from this shard to the peer's and back; None when it was not answered in time.
    """

    peer_id: str
    session_id: Count
    local: str
    remote: str
    rtt_ms: Measure | None


class FlowReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard has of a flow. `state`: none, lane (a stream of a session), datagrams (beside one), pending (waits
    for one), discarded or held (back, for the sake of order). `waiting`: packets in a queue, the oldest of them for
    `waiting_ms`.
    """

    state: str
    packets: Count = 0
    waiting: Count = 0
    waiting_ms: Measure = 0.0


class PeerTraffic(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What went between a shard and one peer, over all sessions, those that have ended too. `drops`: of its packets,
    either way, in records by reason. `rtt`: round trips, as metrics.Times has them; empty: none was measured."""

    peer_id: Annotated[str, msgspec.Meta(max_length=MAX_PEER_ID)]
    bytes_sent: Count = 0
    bytes_received: Count = 0
    packets_sent: Count = 0
    packets_received: Count = 0
    segments_sent: Count = 0
    segments_received: Count = 0
    drops: Counts = {}
    rtt: Annotated[tuple[Count, ...], msgspec.Meta(max_length=TIMES)] = ()
