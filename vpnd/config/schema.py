"""Every setting of vpnd: one frozen Struct per TOML table, one annotated field per key.

A field carries its unit, its limits and its line of the reference in `Meta`; `load` turns TOML,
environment and flags into a `Config`, `reference` prints docs/configuration.md from these Structs.
Durations are written "250ms", "30s", "5m", "1h" and are held as float seconds; sizes are integer
bytes and may be written "4MiB". Tables hold no behaviour: anything that needs two fields to judge is
in `check`.
"""

from __future__ import annotations

from typing import Annotated

from vpnd.config.naming import Dns, Registry
from vpnd.config.network import Discovery, Membership
from vpnd.config.streams import CircuitBreaker, Health, Multiplexer, Retry, Session, StreamPool
from vpnd.config.units import Table, duration, number, size, switch, text


class Node(Table, frozen=True):
    """This machine's place in the network."""

    name: Annotated[str, text("Name of this node in status and logs; empty: the host name.", "name")] = ""


class Network(Table, frozen=True):
    """The TUN device and what is routed into it."""

    interface: Annotated[str, text("Name of the TUN device, at most 15 characters.", "interface")] = "vpnd0"
    mtu: Annotated[int, number("Largest IP packet on the TUN device.", 576, 9000, "bytes")] = 1400
    virtual_ip: Annotated[
        str,
        text(
            "Address of this node inside the VPN; empty: chosen from the peer id inside 10.86.0.0/16.", "ip"
        ),
    ] = ""
    subnet: Annotated[int, number("Prefix length of the VPN's subnet around virtual_ip.", 1, 128, "bits")] = (
        16
    )
    routes: Annotated[
        tuple[str, ...], text("Networks sent into the TUN device beside the subnet.", "cidr")
    ] = ()
    allow_overlap: Annotated[
        bool, switch("Start even if the machine already routes (part of) the subnet or a route.")
    ] = False
    offloads: Annotated[
        bool, switch("Ask the kernel for superpackets (checksum, TSO, USO); off: one packet at a time.")
    ] = True
    coalesce_udp: Annotated[
        bool,
        switch("Merge datagrams of one flow that are read in one go into one superpacket (needs offloads)."),
    ] = True
    advertise: Annotated[
        tuple[str, ...],
        text("Networks behind this node that it announces, if its membership lets it.", "cidr"),
    ] = ()
    accept_routes: Annotated[bool, switch("Route into the TUN device what members announce.")] = True
    exit_node: Annotated[
        str,
        text("Member through which everything else goes (it must announce 0.0.0.0/0 or ::/0).", "name"),
    ] = ""
    route_table: Annotated[
        int,
        number(
            "Routing table for what members announce; no other program may use it.", 256, 2147483647, "table"
        ),
    ] = 7669
    rule_priority: Annotated[
        int,
        number("Priority of the first of the two routing rules that lead there.", 1, 32764, "priority"),
    ] = 5300
    change_settle: Annotated[
        float,
        duration("Changes of the machine's addresses and routes within so long are taken as one.", 0.0, 60.0),
    ] = 0.1
    change_settle_max: Annotated[
        float,
        duration("While changes do not end, that time doubles from one to the next, up to this.", 0.0, 600.0),
    ] = 5.0
    suspend_check: Annotated[
        float,
        duration("How often it is looked whether the machine was suspended for longer than this.", 0.1, 60.0),
    ] = 1.0
    queue_length: Annotated[int, number("Transmit queue of the TUN device.", 1, 100_000, "packets")] = 500
    read_batch: Annotated[
        int,
        number(
            "Packets read from the TUN device before the other work of the supervisor.", 1, 4096, "packets"
        ),
    ] = 64


class P2P(Table, frozen=True):
    """libp2p: identity, listening, dialing."""

    listen: Annotated[tuple[str, ...], text("Multiaddrs to listen on (TCP).", "multiaddr")] = (
        "/ip4/0.0.0.0/tcp/4001",
    )
    identity_file: Annotated[
        str, text("Private key of this node, PEM, 0600; relative to the state directory.", "path")
    ] = "identity.pem"
    dial_timeout: Annotated[float, duration("Deadline of one dial, handshake included.", 0.1, 300.0)] = 5.0
    connect_timeout: Annotated[
        float, duration("Deadline of the TCP connection of a dial, to one address.", 0.1, 300.0)
    ] = 1.5
    dial_stagger: Annotated[
        float,
        duration("How long the node with the larger peer id waits for the other side's dial.", 0.0, 60.0),
    ] = 0.3
    handshake_timeout: Annotated[float, duration("Deadline of an inbound handshake.", 0.1, 300.0)] = 10.0
    max_inbound_handshakes: Annotated[
        int,
        number(
            "Inbound handshakes under way at once; one more, and the oldest is closed.",
            1,
            100_000,
            "connections",
        ),
    ] = 256
    max_connections_per_peer: Annotated[
        int,
        number(
            "libp2p connections (not data sessions) one peer may hold with this node.", 1, 4096, "connections"
        ),
    ] = 8
    max_streams_per_connection: Annotated[
        int,
        number(
            "Open streams of one libp2p connection; one more, and it is closed.", 16, 1_000_000, "streams"
        ),
    ] = 1024
    max_unread_per_connection: Annotated[
        int,
        size(
            "What a libp2p connection may have sent without its being read yet; more, and it is closed.",
            1 << 18,
            1 << 30,
        ),
    ] = 16 << 20
    eager_peers: Annotated[
        int,
        number(
            "Up to so many peers have sessions from the start; of more, each with its first packet.",
            0,
            100_000,
            "peers",
        ),
    ] = 256
    max_dials: Annotated[int, number("Dials under way at once.", 1, 4096, "dials")] = 32
    address_stagger: Annotated[
        float,
        duration("Head start of one address of a peer before the next one is tried beside it.", 0.0, 60.0),
    ] = 0.25
    stream_timeout: Annotated[
        float,
        duration("Longest life of a stream of identify and the like on a libp2p connection.", 0.1, 3600.0),
    ] = 30.0
    keepalive_interval: Annotated[
        float, duration("How often a silent TCP connection is probed, in whole seconds.", 1.0, 3600.0)
    ] = 3.0
    max_sessions_per_peer: Annotated[
        int, number("Data sessions one peer may hold with this node.", 1, 4096, "sessions")
    ] = 64


class Peer(Table, frozen=True):
    """Another node, named by hand."""

    name: Annotated[str, text("Name of the peer in status and logs.", "name")]
    peer_id: Annotated[str, text("Its peer id, as `vpnd id` prints it there.", "peer_id")]
    virtual_ip: Annotated[str, text("Its address inside the VPN.", "ip")]
    addresses: Annotated[
        tuple[str, ...], text("Multiaddrs to dial; empty: wait for its dial.", "multiaddr")
    ] = ()


class Worker(Table, frozen=True):
    """Shards and what runs in them."""

    shards: Annotated[int, number("Shard processes; 0: one per CPU, at most 4.", 0, 64, "processes")] = 0
    ring_bytes: Annotated[
        int,
        size("Size of each ring; a power of two, room for four of the largest records.", 1 << 19, 1 << 30),
    ] = 1 << 22
    publish_bytes: Annotated[
        int, size("Bytes put into a ring before its reader is told, when there is more to read.", 1, 1 << 20)
    ] = 1 << 18
    max_flows: Annotated[
        int, number("Flows remembered at once, in the supervisor and in each shard.", 16, 10_000_000, "flows")
    ] = 131_072
    buffer_size: Annotated[
        int, number("Packets waiting in one flow, or for a peer without a session.", 1, 1_000_000, "packets")
    ] = 4096
    stall_timeout: Annotated[
        float, duration("A flow whose oldest packet waits for so long is called stalled.", 0.001, 3600.0)
    ] = 1.0
    idle_timeout: Annotated[
        float, duration("A flow without packets for so long is forgotten.", 0.1, 86400.0)
    ] = 60.0
    cleanup_interval: Annotated[float, duration("How often idle flows are looked for.", 0.05, 3600.0)] = 5.0
    pending_bytes: Annotated[int, size("Bytes waiting for a peer that has no session yet.", 0, 1 << 30)] = (
        1 << 18
    )
    pending_timeout: Annotated[
        float, duration("How long packets wait for a peer that has no session yet.", 0.0, 3600.0)
    ] = 3.0


class Process(Table, frozen=True):
    """The processes of a node."""

    user: Annotated[str, text("User the children run as.", "user")] = "nobody"
    realtime: Annotated[
        bool,
        switch(
            "Let shards, and the supervisor while packets are few, run at the lowest real-time priority, so that "
            "packets do not wait for other programs; not on a machine with one CPU."
        ),
    ] = True
    realtime_pause: Annotated[
        float,
        duration(
            "What a supervisor of that priority leaves others between two reads while packets come.", 0.0, 0.1
        ),
    ] = 0.0003
    realtime_packets: Annotated[
        int, number("Packets a second beyond which it has no such priority.", 0, 10_000_000, "packets/s")
    ] = 20_000
    realtime_window: Annotated[float, duration("How long they are counted.", 0.001, 10.0)] = 0.02
    ready_timeout: Annotated[float, duration("How long a child may take to get ready.", 0.5, 600.0)] = 20.0
    stop_timeout: Annotated[
        float, duration("How long a child may take to stop before it is killed.", 0.1, 600.0)
    ] = 3.0
    drain_timeout: Annotated[
        float, duration("How long a shard that is scaled away may take to empty its queues.", 0.0, 600.0)
    ] = 2.0
    restart_initial: Annotated[float, duration("Wait before a dead child is started again.", 0.0, 600.0)] = (
        0.05
    )
    restart_max: Annotated[
        float, duration("Longest wait before a dead child is started again.", 0.0, 3600.0)
    ] = 10.0
    restart_settle: Annotated[
        float, duration("A child that lived so long starts again without extra wait.", 0.1, 86400.0)
    ] = 10.0


class Status(Table, frozen=True):
    """The socket `vpnd status` and `vpnd stop` talk to."""

    socket: Annotated[str, text("Path of the status socket; relative to the state directory.", "path")] = (
        "vpnd.sock"
    )
    timeout: Annotated[float, duration("How long a command waits for the daemon's answer.", 0.1, 300.0)] = 5.0
    max_peers: Annotated[
        int, number("Peers that status tells of; those with sessions first.", 1, 1500, "peers")
    ] = 1000
    poll_interval: Annotated[
        float,
        duration(
            "How often `start --detach` and `stop` look whether the daemon is ready, or gone.", 0.01, 10.0
        ),
    ] = 0.05
    sample_interval: Annotated[
        float, duration("CPU and memory of each process are sampled once in this time.", 0.1, 300.0)
    ] = 2.0


class Metrics(Table, frozen=True):
    """Prometheus endpoint."""

    listen: Annotated[
        str, text("host:port of the Prometheus endpoint; empty: off. Keep it on loopback.", "host_port")
    ] = ""
    interval: Annotated[
        float,
        duration("How often a shard stores the counts that do not change with every batch.", 0.01, 60.0),
    ] = 0.25


class Log(Table, frozen=True):
    """What goes to standard error."""

    level: Annotated[str, text("debug, info, warning or error.", "level")] = "info"
    refusal_interval: Annotated[
        float,
        duration(
            "What strangers can cause to be logged is logged at most this often per kind.", 0.0, 86400.0
        ),
    ] = 10.0


class Config(Table, frozen=True):
    """All tables. `state_dir` is not a key of the file: it comes from --state-dir or VPND_STATE_DIR."""

    state_dir: Annotated[str, text("Directory of the identity, socket and config file.", "path")] = (
        "/var/lib/vpnd"
    )
    node: Node = Node()
    network: Network = Network()
    membership: Membership = Membership()
    discovery: Discovery = Discovery()
    p2p: P2P = P2P()
    retry: Retry = Retry()
    peers: tuple[Peer, ...] = ()
    worker: Worker = Worker()
    session: Session = Session()
    stream_pool: StreamPool = StreamPool()
    multiplexer: Multiplexer = Multiplexer()
    circuit_breaker: CircuitBreaker = CircuitBreaker()
    health: Health = Health()
    dns: Dns = Dns()
    registry: Registry = Registry()
    process: Process = Process()
    status: Status = Status()
    metrics: Metrics = Metrics()
    log: Log = Log()
