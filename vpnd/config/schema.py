"""Every setting of vpnd: one frozen Struct per TOML table, one declaration per key (see `setting`).

Durations are held as float seconds, sizes as integer bytes. Tables hold no behaviour: what needs two settings to judge
is in `check`.
"""

from __future__ import annotations

from vpnd.config.setting import REQUIRED, Table, choice, duration, number, share, size, switch, text
from vpnd.session import AESGCM, CHACHAPOLY, SUBNET_NODE, VPND

# A table: one setting a line where it fits.
# fmt: off


class Node(Table, frozen=True):
    """This machine's place in the network."""

    name: str = text("", "name",
        "Name of this node in status and logs; empty: the host name.", essential=True, restart=True)


class Network(Table, frozen=True):
    """The TUN device and what is routed into it."""

    interface: str = text("vpnd0", "interface",
        "Name of the TUN device, at most 15 characters.", essential=True, restart=True)
    mtu: int = number(1400, 576, 9000, "bytes", "Largest IP packet on the TUN device.", essential=True, restart=True)
    virtual_ip: str = text("", "ip",
        "Address of this node inside the VPN; empty: derived from the peer id, inside 10.86.0.0/16.",
        essential=True, restart=True)
    subnet: int = number(16, 1, 128, "bits",
        "Prefix length of the VPN's subnet around virtual_ip.", essential=True, restart=True)
    routes: tuple[str, ...] = text((), "cidr",
        "Networks routed into the TUN device beside the subnet.", essential=True, restart=True)
    allow_overlap: bool = switch(False,
        "Start even if the machine already routes the subnet or a route, or part of one.", essential=True, restart=True)
    offloads: bool = switch(True,
        "Exchange superpackets with the kernel (checksum, TSO, USO offload). Off: one packet at a time, slower.",
        restart=True)
    coalesce_udp: bool = switch(True,
        "Merge datagrams of one flow that are read together into one superpacket; needs offloads.", restart=True)
    advertise: tuple[str, ...] = text((), "cidr",
        "Networks behind this node that it announces, as far as its membership permits.", essential=True, restart=True)
    masquerade: bool = switch(True,
        "What members send into the networks this node announces comes from this machine's own address there, so that "
        "hosts there answer it; needs nftables. Off: their router needs a route to the VPN (ip route add 10.86.0.0/16 "
        "via this machine).", essential=True, restart=True)
    accept_routes: bool = switch(True,
        "Route networks announced by members into the TUN device.", essential=True, restart=True)
    exit_node: str = text("", "name",
        "Member that carries all other traffic; it must announce 0.0.0.0/0 or ::/0.", essential=True, restart=True)
    exit_kill_switch: bool = switch(True,
        "With exit_node set, block traffic that would leave past it: while the exit node is unknown or away, and after "
        "the daemon was killed. Only `vpnd stop` lifts the block. Off: traffic leaves in the clear then.",
        essential=True, restart=True)
    nftables: bool = switch(True,
        "An nftables table of the node's own: virtual addresses are reached through the VPN only, and the kill switch "
        "holds while other programs change routing rules.", restart=True)
    route_table: int = number(7669, 256, 2147483647, "table",
        "Routing table for announced networks; of a device vpndN it is N more. No other program may use it: vpnd "
        "removes what it does not know there.", restart=True)
    rule_priority: int = number(5300, 1, 30_000, "priority",
        "Priority of the first of the two routing rules for that table; of a device vpndN it is 2 N more.",
        restart=True)
    change_settle: float = duration(0.1, 0.0, 60.0,
        "Quiet time after which changes of the machine's addresses and routes are acted on together.")
    change_settle_max: float = duration(5.0, 0.0, 600.0,
        "Upper limit of change_settle, which doubles while changes continue.")
    reconcile_interval: float = duration(30.0, 0.1, 3600.0,
        "Interval of comparing device, routes, rules and nftables with what they have to be. It is done at every "
        "change the kernel reports, too.")
    suspend_check: float = duration(1.0, 0.1, 60.0,
        "Suspend-detection poll interval, and the shortest suspension that is detected.")
    unreachable_rate: int = number(100, 0, 1_000_000, "packets a second",
        "Packets dropped because nobody has their address, or its peer is away, that each shard answers with ICMP host "
        "unreachable, as routers do, so that programs fail at once. 0: none.")
    queue_length: int = number(500, 1, 100_000, "packets",
        "Transmit queue of the TUN device. Too short: bursts are dropped; too long: delay under load.", restart=True)
    read_batch: int = number(64, 1, 4096, "packets",
        "Packets read from the TUN device before the supervisor's other work.", restart=True)


class Membership(Table, frozen=True, restart=True):
    """The network this node makes or joins: its members, and how nodes tell each other of them."""

    name: str = text("home", "name", "Name of a network made here: a-z, 0-9 and -.", essential=True)
    subnet: str = text("10.86.0.0/16", "cidr", "IPv4 address range of a network made here.", essential=True)
    record_lifetime: float = duration(2592000.0, 1.0, 31536000.0, "Validity of a membership signed by this authority.")
    renew_share: float = share(0.5, 0.05, 0.95, "Remaining share of its lifetime at which a membership is renewed.")
    clock_skew: float = duration(300.0, 0.0, 86400.0, "Tolerated difference between the clocks of two nodes.")
    forget_after: float = duration(2592000.0, 0.0, 31536000.0,
        "Time after expiry in which a member may still renew and its addresses stay reserved.")
    max_members: int = number(16_384, 1, 100_000, "members", "Peer ids in the directory, removed members included.")
    invite_lifetime: float = duration(3600.0, 1.0, 31536000.0,
        "Validity of an invitation token, unless the command gives another.", essential=True)
    gossip_interval: float = duration(5.0, 0.05, 86400.0,
        "Interval of comparing the directory with that of a random neighbour.")
    gossip_push: int = size(1 << 14, 0, 1 << 24,
        "New statements sent whole in one message; beyond that they are offered and requested.")
    gossip_request_timeout: float = duration(2.0, 0.05, 3600.0,
        "Deadline of a requested statement; then another neighbour is asked.")
    presence_interval: float = duration(1.0, 0.0, 3600.0,
        "Shortest interval at which new addresses of one member are passed on.")
    neighbours: int = number(8, 1, 1024, "members",
        "Members this node stays connected to for gossip. Too few: news spread slowly.")
    neighbour_rotation: float = duration(60.0, 1.0, 86400.0,
        "Interval of replacing one neighbour by another, so that the network does not split.")
    gossip_queue: int = size(1 << 23, 1 << 17, 1 << 28,
        "Bytes queued for one neighbour; the rest is left to the next comparison.")
    save_interval: float = duration(1.0, 0.0, 3600.0,
        "Shortest interval of writing the directory to disk; removals are written at once.")
    join_timeout: float = duration(15.0, 0.5, 300.0, "Deadline of `start --join`.")
    max_guests: int = number(32, 1, 10_000, "peers",
        "Concurrent connections of strangers, to join, renew or introduce themselves.")
    guest_timeout: float = duration(10.0, 0.5, 300.0,
        "Longest connection of a stranger; p2p.handshake_timeout limits it too.")


class Discovery(Table, frozen=True, restart=True):
    """How members are found whose addresses are unknown or outdated."""

    bootstrap: tuple[str, ...] = text((), "multiaddr",
        "Multiaddrs with /p2p/<peer id> that are asked first.", essential=True)
    dht: bool = switch(True, "Publish and look up addresses in the members' Kademlia table (DHT).", essential=True)
    dht_publish_interval: float = duration(600.0, 1.0, 86400.0,
        "Interval of publishing this node's record; keep it well below dht_record_lifetime.")
    dht_record_lifetime: float = duration(3600.0, 1.0, 604800.0, "Age at which another node's record is ignored.")
    dht_backlog: int = number(256, 1, 100_000, "members", "Connected members waiting to be entered into the table.")
    dht_timeout: float = duration(5.0, 0.1, 300.0, "Deadline of one look-up in the table.")
    dht_search_interval: float = duration(10.0, 0.5, 86400.0,
        "Interval of looking up unreachable members in the table.")
    dht_searches: int = number(4, 1, 1024, "members", "Concurrent searches for members, and searches per interval.")
    mdns: bool = switch(True, "Find members on the local network (mDNS).", essential=True)
    mdns_interval: float = duration(60.0, 1.0, 86400.0, "Interval of announcing this node on the local network.")
    mdns_max_messages: int = number(100, 1, 100_000, "messages",
        "mDNS messages processed in one second; more are dropped.")
    cache_lifetime: float = duration(60.0, 0.0, 86400.0, "Lifetime of a found address in the look-up cache.")
    negative_cache_lifetime: float = duration(5.0, 0.0, 86400.0, "Lifetime of an unsuccessful look-up in the cache.")
    cache_entries: int = number(1024, 1, 1_000_000, "members",
        "Entries of the look-up cache, and of addresses seen on the local network.")


class P2P(Table, frozen=True):
    """libp2p: identity, listening, dialing."""

    listen: tuple[str, ...] = text(("/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001"), "multiaddr",
        "Multiaddrs to listen on (TCP).", essential=True, restart=True)
    announce: tuple[str, ...] = text((), "multiaddr",
        "Multiaddrs at which others can dial this node beside those of its interfaces: what a router forwards to "
        "p2p.listen. They are told first.", essential=True)
    identity_file: str = text("identity.pem", "path",
        "Private key of this node: PEM, mode 0600, relative to the state directory.", essential=True, restart=True)
    dial_timeout: float = duration(5.0, 0.1, 300.0, "Deadline of one dial, handshake included.")
    connect_timeout: float = duration(1.5, 0.1, 300.0, "Deadline of the TCP connection to one address of a dial.")
    dial_stagger: float = duration(0.3, 0.0, 60.0,
        "Time the node with the larger peer id waits for the other's dial, so that one session is made.")
    handshake_timeout: float = duration(10.0, 0.1, 300.0, "Deadline of an inbound handshake.", restart=True)
    max_inbound_handshakes: int = number(256, 1, 100_000, "connections",
        "Concurrent inbound handshakes; beyond that one is closed, of the source with most of them.", restart=True)
    max_connects_per_source: int = number(250, 1, 100_000, "connections",
        "Connections within a second that one source (an IPv4 address, an IPv6 /64) gets in; more are closed at once.")
    max_connects: int = number(1000, 1, 1_000_000, "connections",
        "The same for all sources together where no member is known to be.")
    max_handshakes_per_peer: int = number(1000, 1, 1_000_000, "handshakes",
        "Handshakes within a minute of one member; more are refused, and its source gets in no oftener then.")
    max_connections_per_peer: int = number(8, 1, 4096, "connections",
        "libp2p connections of one peer with this node; data sessions do not count.", restart=True)
    max_streams_per_connection: int = number(1024, 16, 1_000_000, "streams",
        "Open streams of one libp2p connection; beyond that it is closed.", restart=True)
    max_unread_per_connection: int = size(16 << 20, 1 << 18, 1 << 30,
        "Unread bytes buffered for one libp2p connection; beyond that it is closed.", restart=True)
    eager_peers: int = number(256, 0, 100_000, "peers",
        "Number of peers up to which sessions are made at start; with more, on first use.")
    max_dials: int = number(32, 1, 4096, "dials", "Concurrent dials.")
    address_stagger: float = duration(0.25, 0.0, 60.0,
        "Head start of one address of a peer before the next is tried beside it.")
    stream_timeout: float = duration(30.0, 0.1, 3600.0,
        "Longest life of a protocol stream (identify and others) on a libp2p connection.", restart=True)
    keepalive_interval: float = duration(10.0, 1.0, 3600.0,
        "TCP keepalive interval of a silent connection, in whole seconds.", restart=True)
    max_sessions_per_peer: int = number(64, 1, 4096, "sessions", "Data sessions of one peer with this node.")


class Nat(Table, frozen=True):
    """Reaching members that cannot be dialed, and being reached by them."""

    enabled: bool = switch(True,
        "Meet members that cannot be dialed at a relay, and be called there by others.", essential=True, restart=True)
    relays: int = number(2, 1, 3, "relays",
        "Relays a node stays connected to, so that members that cannot dial it can call it there.")
    relay_retry: float = duration(30.0, 0.1, 86400.0, "Wait before a member that was no relay is asked again.")
    relay_stagger: float = duration(0.6, 0.01, 60.0,
        "Head start of a relay that is asked for a meeting before the next one is asked as well.")
    meet_delay: float = duration(0.3, 0.0, 60.0,
        "Head start of a peer's own addresses before a meeting at a relay is tried beside them.")
    meet_timeout: float = duration(5.0, 0.1, 60.0, "Deadline for both members to come to a meeting.")
    punch_timeout: float = duration(4.0, 0.1, 60.0, "Deadline of a direct connection after a meeting.")
    punch_interval: float = duration(0.02, 0.001, 5.0, "Wait before a connection that a gateway reset is tried again.")
    birthday: bool = switch(False, "Try many ports where one of two NATs is symmetric and both members have this on; "
        "that fills the routers' tables for some minutes.", essential=True)
    birthday_ports: int = number(256, 8, 1024, "ports", "Ports that are open at once for that, on either side.")
    birthday_rate: int = number(500, 1, 10_000, "ports", "Ports opened or guessed within a second.")
    upgrade_interval: float = duration(30.0, 0.1, 86400.0,
        "Wait before a relayed peer is tried directly again; it doubles with each failure.")
    upgrade_max_interval: float = duration(1800.0, 0.1, 604800.0, "Upper limit of that wait.")
    map_ports: bool = switch(True,
        "Ask the router for a port that leads to p2p.listen, by PCP, NAT-PMP or UPnP.", essential=True)
    map_lifetime: float = duration(1800.0, 120.0, 86400.0,
        "For how long a port is asked of the router; it is renewed at half of that.")
    map_check: float = duration(60.0, 1.0, 86400.0, "Interval of asking for it again by PCP or NAT-PMP.")
    map_retry: float = duration(600.0, 1.0, 86400.0, "Wait before a router that gave no port is asked again.")
    map_timeout: float = duration(2.0, 0.1, 30.0, "Deadline of finding a router by UPnP, and of giving a port back.")
    reach_delay: float = duration(1.5, 0.0, 600.0,
        "Wait after the start, or a change, before members are asked whether they can dial this node.")
    reach_interval: float = duration(600.0, 1.0, 86400.0,
        "Interval of asking two members whether they can dial this node.")
    max_reach_questions: int = number(30, 1, 100_000, "questions",
        "Times within a minute that one member is dialed back because it asks.")
    max_calls: int = number(120, 1, 100_000, "calls",
        "Calls of one peer that are followed within a minute; others are refused.")


class Relay(Table, frozen=True):
    """Relaying sessions of members that cannot reach each other. A relay cannot read them."""

    serve: bool = switch(True, "Be a relay for other members.", essential=True)
    max_members: int = number(512, 1, 100_000, "members", "Members that may wait for calls here.")
    max_sessions: int = number(256, 1, 100_000, "sessions", "Sessions relayed at once.")
    max_sessions_per_member: int = number(64, 1, 100_000, "sessions", "Sessions of one member relayed at once.")
    max_meets: int = number(240, 1, 1_000_000, "meetings", "Meetings one member may ask for within a minute.")
    bytes_per_s: int = size(0, 0, 1 << 40,
        "Bytes a second of one session in one direction; 0: no limit.", essential=True)
    total_bytes_per_s: int = size(0, 0, 1 << 40,
        "Bytes a second of all sessions together, shared equally; 0: no limit.", essential=True)
    idle_timeout: float = duration(120.0, 1.0, 86400.0, "Silence after which a relayed session is ended.")
    report_interval: float = duration(1.0, 0.05, 60.0,
        "Interval of counting relayed bytes and of looking for silent sessions.")


class Retry(Table, frozen=True):
    """Exponential backoff with full jitter, of dials, stream opens, and changes of addresses and routes."""

    max_attempts: int = number(5, 1, 1000, "attempts",
        "Consecutive failures before giving up: a peer's circuit opens, a session whose stream does not open is "
        "replaced, a change of routes is an error.")
    initial_interval: float = duration(0.25, 0.01, 3600.0, "Upper limit of the first wait.")
    max_interval: float = duration(15.0, 0.01, 86400.0, "Upper limit of every wait.")
    multiplier: float = share(2.0, 1.0, 10.0, "Growth of the wait from one attempt to the next.")


class Peer(Table, frozen=True):
    """Another node, named by hand."""

    name: str = text(REQUIRED, "name", "Name of the peer in status and logs.", essential=True)
    peer_id: str = text(REQUIRED, "peer_id", "Its peer id, as `vpnd id` prints it there.", essential=True)
    virtual_ip: str = text(REQUIRED, "ip", "Its address inside the VPN.", essential=True)
    addresses: tuple[str, ...] = text((), "multiaddr", "Multiaddrs to dial; empty: wait for its dial.", essential=True)
    protocol: str = choice(VPND, (VPND, SUBNET_NODE),
        "What it speaks. subnet-node: it runs the Go program that vpnd rebuilds, not vpnd; see docs/interop.md.")


class Worker(Table, frozen=True):
    """Shards and their flows."""

    shards: int = number(0, 0, 64, "processes",
        "Shard processes; 0: one per CPU, at most 4.", essential=True, restart="use `vpnd scale`")
    ring_bytes: int = size(1 << 22, 1 << 19, 1 << 30,
        "Size of the ring to each shard: a power of two, room for at least four of the largest records.", restart=True)
    publish_bytes: int = size(1 << 18, 1, 1 << 20,
        "Bytes written into a ring before its reader is woken while there is more to read.", restart=True)
    max_flows: int = number(131_072, 16, 10_000_000, "flows", "Flows remembered, in the supervisor and in each shard.")
    buffer_size: int = number(4096, 1, 1_000_000, "packets",
        "Packets queued for one flow, or for a peer without a session.")
    stall_timeout: float = duration(1.0, 0.001, 3600.0,
        "Waiting time of its oldest packet at which a flow is reported as stalled.")
    idle_timeout: float = duration(60.0, 0.1, 86400.0, "Time without packets after which a flow is forgotten.")
    cleanup_interval: float = duration(5.0, 0.05, 3600.0, "Interval of the search for idle flows.")
    pending_bytes: int = size(1 << 18, 0, 1 << 30, "Bytes queued for a peer without a session.")
    pending_timeout: float = duration(3.0, 0.0, 3600.0, "Longest wait of a packet for its peer's first session.")


class Session(Table, frozen=True):
    """One encrypted TCP connection to a peer's shard."""

    window_bytes: int = size(1 << 24, 1 << 18, 1 << 30,
        "Receive window of one stream. Too small: long links are not filled.")
    send_buffer_bytes: int = size(1 << 19, 1 << 17, 1 << 26, "Buffer of sealed bytes for the socket.")
    control_reserve_bytes: int = size(1 << 14, 1 << 12, 1 << 15,
        "Part of the send buffer reserved for control frames; a peer that fills it is disconnected.")
    receive_buffer_bytes: int = size(1 << 19, 1 << 17, 1 << 26, "Buffer for one read from the socket.")
    queue_bytes: int = size(1 << 20, 1 << 17, 1 << 30, "Bytes queued for a session whose send buffer is full.")
    not_sent_lowat_bytes: int = size(1 << 18, 1 << 14, 1 << 30,
        "TCP_NOTSENT_LOWAT: unsent bytes at which the socket counts as full. Large values add delay under load.")
    cipher: str = choice("auto", ("auto", AESGCM, CHACHAPOLY),
        "Cipher of sessions; auto: AES-GCM where both CPUs have instructions for it, else ChaCha20-Poly1305.",
        essential=True, restart=True)
    congestion_control: str = text("bbr", "name",
        "TCP congestion control, where the kernel offers it; empty: the system's.")
    retransmit_min: float = duration(0.01, 0.001, 0.2,
        "TCP_RTO_MIN_US (Linux 6.15): shortest retransmission timeout beyond the round trip.")
    ack_delay_max: float = duration(0.005, 0.001, 0.2,
        "TCP_DELACK_MAX_US (Linux 6.15): longest delay of an acknowledgement.")
    max_streams: int = number(64, 1, 65536, "streams", "Streams one peer may open in a session.")
    turn_records: int = number(64, 16, 1 << 20, "records",
        "Packets and frames taken from one peer's sessions before others have their turn.")
    turn_interval: float = duration(0.001, 0.0001, 1.0,
        "Interval after which a peer may use turn_records again, even if nobody waits for a turn.")
    control_rate: int = number(200, 1, 1 << 20, "frames a second",
        "Control frames a peer may send in a session, besides one for each 128 KB sent to it; more end the session.")
    control_burst: int = number(2048, 256, 1 << 20, "frames",
        "Control frames a peer may send at once in a session; more end the session.")
    partial_bytes: int = size(1 << 22, 1 << 17, 1 << 30,
        "Unfinished packets of one peer in each shard; more end the session they come in.")
    negotiate_timeout: float = duration(10.0, 0.1, 300.0, "Deadline of opening a stream.")
    close_timeout: float = duration(10.0, 0.1, 300.0, "Deadline for a peer to close its side of a stream.")
    quantum_bytes: int = size(1 << 16, 1 << 10, 1 << 20,
        "Bytes one queued flow sends before the next one's turn (fair queueing quantum).")
    delay_target: float = duration(0.005, 0.0001, 10.0, "Acceptable standing queue delay (CoDel target).")
    delay_interval: float = duration(0.1, 0.001, 60.0,
        "Time the delay stays above delay_target before packets are dropped (CoDel interval).")
    hold_bytes: int = size(1 << 25, 1 << 17, 1 << 32,
        "Bytes held back, to keep order, while flows move between sessions.")
    drain_timeout: float = duration(5.0, 0.1, 300.0, "Deadline for a replaced session to empty its queues.")
    max_age: float = duration(43200.0, 1.0, 2592000.0, "Age at which a session is replaced by one with new keys.")
    max_bytes: int = size(1 << 40, 1 << 20, 1 << 50,
        "Bytes, each way, after which a session is replaced by one with new keys.")
    user_timeout: float = duration(15.0, 1.0, 3600.0,
        "TCP_USER_TIMEOUT: time without acknowledgement that ends a session.", restart=True)
    small_segment: int = number(1220, 536, 65495, "bytes",
        "Largest TCP segment (MSS) of sessions with a peer that larger ones do not reach, of punched and relayed "
        "sessions and of libp2p connections. 1220 passes wherever IPv6 does.", restart=True)
    stuck_retransmissions: int = number(4, 1, 15, "segments",
        "Retransmissions in a row that, for longer than health.timeout, mean that segments are too large for the way.")
    segment_trial: float = duration(1.0, 0.1, 86400.0,
        "Wait before a session with large segments is tried again beside those with small_segment. Doubles with each "
        "trial that large segments do not survive, begins anew when the network changes.")
    segment_trial_max: float = duration(3600.0, 0.1, 2592000.0, "Upper limit of that wait.")


class Carrier(Table, frozen=True):
    """Which packets go in datagrams (UDP) beside a session, and which in its streams."""

    choice: str = choice("auto", ("auto", "streams", "datagrams"),
        "streams: everything over TCP sessions. auto: TCP there, where a lost packet costs it nothing; the rest in "
        "datagrams, where one packet does not wait for another, once they reach the peer. datagrams: everything.",
        essential=True, restart=True)
    streams: tuple[str, ...] = text((), "flow",
        "Flows that go in streams whatever choice says: tcp, udp, icmp or a number, or one port, as in udp/4500.",
        essential=True)
    datagrams: tuple[str, ...] = text((), "flow", "Flows that go in datagrams whatever choice says.", essential=True)
    least_rtt: float = duration(0.002, 0.0, 10.0,
        "Round trip from which on auto uses datagrams. On shorter ones a lost segment of a stream is sent again before "
        "anybody notices, and streams cost less.")
    receive_buffer: int = size(1 << 22, 1 << 16, 1 << 28,
        "Receive buffer of each shard's UDP socket. Too small: bursts are lost.", restart=True)
    probe_interval: float = duration(0.25, 0.01, 60.0,
        "Interval of probing whether datagrams in use arrive, and the first wait before a silent peer is asked again.")
    probe_timeout: float = duration(0.7, 0.02, 60.0,
        "Time without an answered probe after which flows leave the datagrams for the streams.")
    stall_timeout: float = duration(0.4, 0.02, 60.0,
        "Time, or four round trips, without an acknowledgement after which a session is ended if datagrams arrive.")
    retry_interval: float = duration(5.0, 0.02, 3600.0,
        "Upper limit of the wait before a peer that does not answer is asked again.")
    keepalive: float = duration(25.0, 0.1, 3600.0,
        "Interval of probing datagrams that nobody uses, so that NATs and firewalls between keep the path open.")
    search_interval: float = duration(600.0, 1.0, 86400.0,
        "Interval of searching for a larger datagram that the path carries (path MTU discovery, RFC 8899).")
    largest_datagram: int = number(1472, 1200, 8952, "bytes",
        "Largest UDP payload that is tried; 1472 fills the 1500 bytes of Ethernet.")
    yield_delay: float = duration(0.003, 0.0001, 10.0,
        "Delay that TCP adds to the way, beyond jitter, from which on it is paced while few datagrams are in use.")
    yield_share: float = share(0.7, 0.01, 1.0, "What it keeps of its rate, as others may be the queue; 1: all.")
    loss_limit: float = share(0.1, 0.001, 1.0,
        "Loss of datagrams above which they are sent more slowly: the path is then taken to be full.")


class StreamPool(Table, frozen=True):
    """Streams to one peer, in each shard."""

    min_streams_per_peer: int = number(1, 1, 256, "streams", "Streams kept open.")
    max_streams_per_peer: int = number(8, 1, 256, "streams", "Streams open at once.")
    idle_timeout: float = duration(60.0, 0.1, 86400.0,
        "Time without flows after which a stream is closed, down to the minimum.")
    cleanup_interval: float = duration(5.0, 0.05, 3600.0, "Interval of the search for idle streams.")


class Multiplexer(Table, frozen=True):
    """How flows to one peer are spread over streams and sessions, in each shard."""

    min_sessions: int = number(1, 1, 64, "sessions", "Sessions (TCP connections) kept to a peer.", essential=True)
    max_sessions: int = number(2, 1, 64, "sessions", "Sessions to a peer under load.", essential=True)
    auto_scaling_interval: float = duration(0.25, 0.01, 3600.0,
        "Interval of checking the load and adding streams or sessions.")
    scale_up_delay: float = duration(0.001, 0.0001, 60.0, "Queue delay that, lasting a whole interval, adds a stream.")
    busy_bytes: int = size(1 << 21, 1, 1 << 40,
        "Bytes in one interval that make a session busy: small flows move to another.")


class CircuitBreaker(Table, frozen=True):
    """When a peer that cannot be reached is left alone."""

    failure_threshold: int = number(5, 1, 1000, "failures",
        "Consecutive failed dials and sessions that open the circuit.")
    reset_timeout: float = duration(1.0, 0.01, 3600.0, "Time an open circuit waits before one trial dial.")
    success_threshold: int = number(1, 1, 1000, "sessions", "Working sessions that close a half-open circuit.")


class Health(Table, frozen=True):
    """Liveness of silent sessions."""

    interval: float = duration(5.0, 0.05, 3600.0,
        "Interval of probing a session; anything received counts as an answer.", essential=True)
    idle_interval: float = duration(60.0, 0.05, 3600.0,
        "The same of a session that sends no packets and hears nothing; never below interval.")
    timeout: float = duration(2.0, 0.01, 300.0,
        "Deadline of a probe, and of `vpnd ping`. Below the round-trip time sessions flap.", essential=True)
    max_consecutive_failures: int = number(2, 1, 100, "probes",
        "Consecutive failed probes that end a session; the first makes it suspect.")
    urgent_timeout: float = duration(0.5, 0.01, 300.0,
        "Deadline of probes after a network change or a new dial of the peer.")
    warm_interval: float = duration(30.0, 0.05, 86400.0, "Interval of renewing lost sessions to recent peers.")
    warm_for: float = duration(300.0, 0.0, 86400.0, "Time after its last packet in which a peer counts as recent.")


class Dns(Table, frozen=True, restart=True):
    """Names of members, answered by each node on its virtual IP."""

    enabled: bool = switch(True, "Answer DNS for <name>.<network>.vpn on the virtual IP.", essential=True)
    port: int = number(53, 1, 65535, "port", "UDP and TCP port of the DNS server.", essential=True)
    register: bool = switch(True,
        "Register these names, and only these, with systemd-resolved where it runs.", essential=True)
    hosts_file: str = text("", "path",
        "Keep the names of members in a block of this file, /etc/hosts, for machines without systemd-resolved; empty: "
        "no.", essential=True, restart=True)
    hosts_interval: float = duration(5.0, 0.05, 3600.0, "Interval of comparing that block with the members.")
    register_timeout: float = duration(5.0, 0.1, 300.0, "Deadline of one resolvectl command.")
    ttl: float = duration(30.0, 0.0, 604800.0, "TTL of answers, in whole seconds.")
    negative_ttl: float = duration(5.0, 0.0, 604800.0, "TTL of answers that a name does not exist.")
    max_udp_bytes: int = size(1232, 512, 65535,
        "Largest answer over UDP; longer ones are truncated and fetched over TCP.")
    max_query_bytes: int = size(4096, 512, 65535, "Largest query; longer ones are ignored.")
    max_connections: int = number(64, 1, 65536, "connections",
        "Concurrent TCP connections; beyond that the oldest is closed.")
    max_connections_per_client: int = number(8, 1, 65536, "connections",
        "Concurrent TCP connections of one address; beyond that the new one is closed.")
    idle_timeout: float = duration(10.0, 0.05, 3600.0, "Time without a query after which a TCP connection is closed.")
    query_timeout: float = duration(3.0, 0.05, 3600.0,
        "Deadline for a query over TCP to arrive, and for the client to read the answer.")


class Registry(Table, frozen=True, restart=True):
    """Ownership of virtual addresses, beside what peers claim."""

    kind: str = choice("static", ("static", "contract"),
        "static: peers own the addresses they claim. contract: an Ethereum contract, by getPeer(uint256), says who "
        "owns an IPv4 address.", essential=True)
    rpc_url: str = text("", "url",
        "JSON-RPC endpoint of the chain. Its answers are trusted: use https unless it is local.", essential=True)
    contract_address: str = text("", "contract_address",
        "Address of the contract: 0x and 40 hex digits.", essential=True)
    timeout: float = duration(5.0, 0.1, 300.0, "Deadline of one look-up.")
    max_requests: int = number(8, 1, 1024, "requests", "Concurrent look-ups.")
    max_waiting: int = number(256, 0, 100_000, "requests",
        "Queued look-ups; more fail at once. Also the number of unowned addresses that packets may cause to be "
        "looked up within one negative_lifetime.")
    max_response_bytes: int = size(1 << 14, 1 << 10, 1 << 24, "Largest answer read from the endpoint.")
    positive_lifetime: float = duration(300.0, 0.1, 604800.0, "Cache lifetime of a known owner.")
    refresh_share: float = share(0.75, 0.05, 0.95,
        "Share of positive_lifetime after which owners of addresses in use are looked up again.")
    negative_lifetime: float = duration(30.0, 0.1, 604800.0,
        "Cache lifetime of an address without an owner, or with an unexpected one.")
    failure_lifetime: float = duration(2.0, 0.1, 86400.0,
        "Wait after a failed look-up; for addresses in use it grows with each failure, up to negative_lifetime.")
    stale_lifetime: float = duration(3600.0, 0.0, 2592000.0,
        "Time a confirmed owner remains valid while look-ups fail.")
    max_entries: int = number(65536, 1, 10_000_000, "addresses", "Cached addresses.")


class Process(Table, frozen=True):
    """The processes of a node."""

    user: str = text("vpnd", "user",
        "User the unprivileged child processes run as. A missing user vpnd is made at the start; where that cannot be, "
        "they run as nobody, with other programs' processes, and a warning says so.", essential=True, restart=True)
    seccomp: bool = switch(True,
        "Have the kernel refuse the child processes the system calls that they do not need, where it can: starting "
        "programs, tracing, mounting, namespaces, BPF and others.", restart=True)
    realtime: bool = switch(True,
        "Run shards, and the supervisor while packets are few, at the lowest real-time priority, so that packets do "
        "not wait for other programs. Has no effect on a machine with one CPU.", essential=True)
    realtime_pause: float = duration(0.0003, 0.0, 0.1,
        "Pause between two reads of a supervisor at real-time priority, left to other programs.")
    realtime_packets: int = number(20_000, 0, 10_000_000, "packets/s",
        "Packet rate above which the supervisor gives up real-time priority.")
    realtime_window: float = duration(0.02, 0.001, 10.0, "Time over which that rate is measured.")
    realtime_share: float = share(0.88, 0.1, 1.0,
        "Share of its CPU's time that a shard takes at real-time priority while floods keep it busy; above 0.95 Linux "
        "may stop it for 50 ms at a time.")
    realtime_slice: float = duration(0.005, 0.001, 1.0,
        "Time it may take beyond that share, its longest pause, and how often it looks.")
    ready_timeout: float = duration(20.0, 0.5, 600.0, "Deadline for a child to become ready.")
    stop_timeout: float = duration(3.0, 0.1, 600.0, "Deadline for a child to stop; then it is killed.")
    watchdog: float = duration(10.0, 0.0, 3600.0,
        "Time without a heartbeat after which a child is killed and started again; 0: never. It is not healthy after "
        "half of it.")
    drain_timeout: float = duration(2.0, 0.0, 600.0, "Deadline for a shard that is scaled away to empty its queues.")
    fork_timeout: float = duration(0.2, 0.0, 10.0, "Deadline to fork a child; then, and with 0: no fork.", restart=True)
    restart_initial: float = duration(0.05, 0.0, 600.0, "Wait before the first restart of a dead child.")
    restart_max: float = duration(10.0, 0.0, 3600.0, "Upper limit of that wait, which doubles with each restart.")
    restart_settle: float = duration(10.0, 0.1, 86400.0, "Lifetime after which restarts begin with the first wait.")


class Status(Table, frozen=True):
    """The socket of `vpnd status`, `vpnd stop` and other commands."""

    socket: str = text("vpnd.sock", "path",
        "Path of the socket, relative to the state directory.", essential=True, restart=True)
    timeout: float = duration(5.0, 0.1, 300.0, "Deadline of the daemon's answer to a command.")
    max_peers: int = number(1000, 1, 1500, "peers", "Peers in a status; those with sessions first.")
    poll_interval: float = duration(0.05, 0.01, 10.0,
        "Poll interval of `start --detach` and `stop`, and of a draining shard.")
    sample_interval: float = duration(2.0, 0.1, 300.0, "Interval of sampling the CPU and memory of each process.")
    why_interval: float = duration(1.0, 0.1, 10.0, "Time over which `vpnd why` looks which drops grow.")


class Metrics(Table, frozen=True):
    """Prometheus endpoint."""

    listen: str = text("", "host_port",
        "host:port of the endpoint; empty: none. Keep it on loopback.", essential=True, restart=True)
    interval: float = duration(1.0, 0.01, 60.0,
        "Interval at which a shard stores counts that do not change with every batch.")
    per_peer: bool = switch(True, "Export series for each peer; off: for the node and its shards only.")
    peer_histograms: int = number(100, 0, 1500, "peers",
        "Peers whose round trips are exported as a histogram, fourteen series each; those with sessions first.")
    max_age: float = duration(1.0, 0.05, 60.0, "Scrapes within this time get one status, whatever their number.")
    timeout: float = duration(5.0, 0.1, 300.0, "Deadline for an HTTP client to send its request and read the answer.")
    max_clients: int = number(16, 1, 1024, "connections", "Concurrent HTTP connections; further ones are closed.")


class Web(Table, frozen=True):
    """A page that shows the node live, to who has its token; `vpnd page` prints the address."""

    listen: str = text("", "host_port",
        "host:port of the page; empty: none. Keep it on loopback or an address of the VPN: it is HTTP without "
        "encryption.", essential=True, restart=True)
    interval: float = duration(1.0, 0.1, 60.0,
        "Interval of new values on open pages. Without an open page nothing is measured for it.")
    max_peers: int = number(200, 1, 1500, "peers", "Peers a page shows; those with sessions first.")
    timeout: float = duration(5.0, 0.1, 300.0, "Time a browser may take to ask, and to take an answer.")
    max_clients: int = number(16, 1, 1024, "connections", "HTTP connections at once; one more is closed.")


class Log(Table, frozen=True):
    """Messages on standard error."""

    level: str = choice("info", ("debug", "info", "warning", "error"),
        "Least severe messages that are logged.", essential=True)
    format: str = choice("plain", ("plain", "logfmt", "json"),
        "Form of a line: for people, key=value, or JSON.", restart=True)
    file_bytes: int = size(1 << 24, 0, 1 << 40,
        "Size at which the log of `start --detach` is kept as vpnd.log.1, and begun anew; 0: never.")
    files: int = number(4, 1, 100, "files", "So many of those are kept: vpnd.log.1, the newest, and so on.")
    refusal_interval: float = duration(60.0, 0.0, 86400.0,
        "Shortest interval, per kind and member, of log lines that others can cause; the next one tells how many were "
        "left out.")


class Config(Table, frozen=True):
    """All tables. `state_dir` is not a key of the file: it comes from --state-dir or VPND_STATE_DIR."""

    state_dir: str = text("/var/lib/vpnd", "path",
        "Directory of identity, socket and configuration file.", restart="stop the node and start another one there")
    node: Node = Node()
    network: Network = Network()
    membership: Membership = Membership()
    discovery: Discovery = Discovery()
    p2p: P2P = P2P()
    nat: Nat = Nat()
    relay: Relay = Relay()
    retry: Retry = Retry()
    peers: tuple[Peer, ...] = ()
    worker: Worker = Worker()
    session: Session = Session()
    carrier: Carrier = Carrier()
    stream_pool: StreamPool = StreamPool()
    multiplexer: Multiplexer = Multiplexer()
    circuit_breaker: CircuitBreaker = CircuitBreaker()
    health: Health = Health()
    dns: Dns = Dns()
    registry: Registry = Registry()
    process: Process = Process()
    status: Status = Status()
    metrics: Metrics = Metrics()
    web: Web = Web()
    log: Log = Log()
