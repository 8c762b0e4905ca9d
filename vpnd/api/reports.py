"""What processes tell about themselves inside messages: rows of status, and what a node is in its network."""

from __future__ import annotations

import msgspec


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


class PeerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What control knows of one peer.

    `state`: connected (at least one session is up), dialing, backoff, waiting (no address, or the other
    side's turn). `last_error`: why the last dial failed; empty after a success. `next_dial_s`: seconds
    until the next dial; negative when none is planned. `circuit`: closed, open or half_open;
    `circuit_opened`: how often it opened. `virtual_ips`: its own addresses, `routes`: what it announces; `source`:
    configuration or membership. `ownership`: a line for each address it claims that the contract does not confirm.
    """

    name: str
    peer_id: str
    addresses: tuple[str, ...]
    state: str
    last_error: str = ""
    next_dial_s: float = -1.0
    dials: int = 0
    dial_failures: int = 0
    circuit: str = "closed"
    circuit_opened: int = 0
    virtual_ips: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    source: str = "configuration"
    ownership: tuple[str, ...] = ()


class NetworkReport(msgspec.Struct, frozen=True, kw_only=True):
    """What control knows of the network. `state`: member, removed, expired. `conflicts`: one line each."""

    name: str
    network_id: str
    state: str
    authority: bool
    authorities: int
    members: int
    addresses: tuple[str, ...]
    expires_s: float
    conflicts: tuple[str, ...] = ()
    neighbours: int = 0


class SessionReport(msgspec.Struct, frozen=True, kw_only=True):
    """One session of a shard. Bytes are packet bytes without any framing; `rtt_ms` None until measured.

    `state`: opening, up, draining. `health`: healthy, or suspect since a probe failed. `queue_delay_ms`: how long
    the packet sent last had waited.
    """

    peer_id: str
    session_id: int
    initiator: bool
    state: str
    rtt_ms: float | None
    streams: int
    bytes_sent: int
    bytes_received: int
    packets_sent: int
    packets_received: int
    queued_bytes: int
    age_s: float
    health: str = "healthy"
    queue_delay_ms: float = 0.0


class SessionProbe(msgspec.Struct, frozen=True, kw_only=True):
    """One session, measured now. `local`, `remote`: the ends of its TCP connection, IP:port; empty where the kernel
    does not know any more. `rtt_ms`: from this shard to the peer's and back; None when it was not answered in time.
    """

    peer_id: str
    session_id: int
    local: str
    remote: str
    rtt_ms: float | None


class PeerTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """What went between a shard and one peer, over all sessions, those that have ended too."""

    peer_id: str
    bytes_sent: int = 0
    bytes_received: int = 0
    packets_sent: int = 0
    packets_received: int = 0
