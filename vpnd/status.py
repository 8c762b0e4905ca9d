"""The status of a node: what `vpnd status --json` prints, field by field, and what is wrong with the node.

The supervisor builds a `Status` (supervisor/report.py); the command line, the exporter and programs that embed a node
read it. docs/status.md and `vpnd status --schema` are made from here. What control knows is declared where it tells it
(vpnd.api.reports), what is counted in vpnd.metrics; both are inherited.

Every field has a default, and unknown ones are ignored: a command of one version reads the status of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_type_hints

import msgspec

from vpnd.api.reports import NetworkReport, PeerReport, ReachReport
from vpnd.metrics import (
    BOUNDS_S,
    CONTROL_HISTOGRAMS,
    CONTROL_METRICS,
    DROPS,
    SHARD_HISTOGRAMS,
    ShardCounters,
    told,
)
from vpnd.printable import many

HEALTHY, DEGRADED, DOWN = "healthy", "degraded", "down"
#: Of `vpnd status`.
EXIT_CODES = {HEALTHY: 0, DEGRADED: 9, DOWN: 1}

#: States of a process, in which it does its work.
_WORKS = ("up",)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is declared here."""


class Ailment(Part, frozen=True):
    """Something that keeps the node from doing what it is there for."""

    what: Annotated[str, told("What is wrong, in a few words.")] = ""
    remedy: Annotated[str, told("What to do about it; empty where the node mends it by itself.")] = ""
    health: Annotated[str, told("What it makes of the node: degraded or down.")] = DEGRADED


class NodePart(Part, frozen=True):
    """The node as its configuration and its network make it."""

    name: Annotated[str, told("Name of the node.")] = ""
    peer_id: Annotated[str, told("Its identity.")] = ""
    mode: Annotated[str, told("static: its peers are configured; network: it is in a network.")] = "static"
    virtual_ip: Annotated[str, told("Its first address in the VPN.")] = ""
    addresses: Annotated[tuple[str, ...], told("Its addresses in the VPN, IPv4 first.")] = ()
    subnet: Annotated[str, told("The VPN's network.")] = ""
    shards: Annotated[int, told("Shards there are meant to be.")] = 0
    exit_node: Annotated[str, told("network.exit_node: the member all other traffic is to go through.")] = ""
    exit_peer: Annotated[str, told("Its peer id; empty: there is no such member that may be one.")] = ""
    uptime_s: Annotated[float, told("Since its start.", "seconds")] = 0.0
    warnings: Annotated[
        tuple[str, ...], told("What does not work as wished while the node does, and hints; a line each.")
    ] = ()
    listen: Annotated[tuple[str, ...], told("Multiaddrs it listens on, without its peer id.")] = ()


#: The fields of a process.
Pid = Annotated[int, told("Its process; 0 while there is none.")]
Restarts = Annotated[int, told("Times it was started again.")]
State = Annotated[
    str,
    told("starting, up, hung (up without a heartbeat, soon to be killed), restarting, draining or stopped."),
]
Answers = Annotated[
    bool | None, told("Whether it answered within half of status.timeout; null: it was not asked.")
]
Confined = Annotated[
    bool, told("Whether the kernel refuses it the system calls that it does not need (process.seccomp).")
]
CpuPercent = Annotated[
    float, told("CPU in the last status.sample_interval, 100 is one CPU; 0 until then.", "percent")
]
CpuSeconds = Annotated[float, told("CPU since the process began, when sampled last.", "seconds")]
RssBytes = Annotated[int, told("Memory that it had resident when sampled last.", "bytes")]


class SupervisorPart(Part, frozen=True):
    """The supervisor."""

    pid: Pid = 0
    cpu_percent: CpuPercent = 0.0
    cpu_s: CpuSeconds = 0.0
    rss_bytes: RssBytes = 0


class Spread(Part, frozen=True):
    """A histogram of times."""

    buckets: Annotated[
        tuple[int, ...],
        told(
            f"How many took {', '.join(f'{bound:g}' for bound in BOUNDS_S)} s at most, and longer; each once."
        ),
    ] = ()
    sum_s: Annotated[float, told("All of them together.", "seconds")] = 0.0


class ControlPart(SupervisorPart, frozen=True):
    """Control."""

    restarts: Restarts = 0
    state: State = ""
    answers: Answers = None
    confined: Confined = False
    connections: Annotated[
        int | None, told("libp2p connections that are not data sessions; null without its answer.")
    ] = None
    counters: Annotated[dict[str, int], told("What it counted; see below.")] = {}
    handshake: Annotated[Spread, told(CONTROL_HISTOGRAMS["handshake"])] = Spread()
    to_direct: Annotated[Spread, told(CONTROL_HISTOGRAMS["to_direct"])] = Spread()


class Ring(Part, frozen=True):
    """The ring to a shard."""

    used: Annotated[int, told("In it now.", "bytes")] = 0
    size: Annotated[int, told("Its size; 0 before the first process.", "bytes")] = 0


class Shard(ShardCounters, frozen=True):
    """A shard. What it counted goes on when its process is started again."""

    index: Annotated[int, told("Its number, from 0.")] = 0
    pid: Pid = 0
    restarts: Restarts = 0
    state: State = ""
    answers: Answers = None
    confined: Confined = False
    cpu_percent: CpuPercent = 0.0
    cpu_s: CpuSeconds = 0.0
    rss_bytes: RssBytes = 0
    drops: Annotated[dict[str, int], told("Its drops by reason, without those that are 0.", "records")] = {}
    ring: Annotated[Ring, told("The ring to it.")] = Ring()
    rtt: Annotated[Spread, told(SHARD_HISTOGRAMS["rtt"])] = Spread()
    queue_delay: Annotated[Spread, told(SHARD_HISTOGRAMS["queue_delay"])] = Spread()
    first_packet: Annotated[Spread, told(SHARD_HISTOGRAMS["first_packet"])] = Spread()


class OtherPart(Part, frozen=True):
    """A process that no packet of this node depends on."""

    name: Annotated[str, told("relay, exporter or page.")] = ""
    pid: Pid = 0
    restarts: Restarts = 0
    state: State = ""
    confined: Confined = False
    cpu_percent: CpuPercent = 0.0
    cpu_s: CpuSeconds = 0.0
    rss_bytes: RssBytes = 0


class Flows(Part, frozen=True):
    """Flows of all shards by state."""

    active: Annotated[int, told("Flows that send.")] = 0
    idle: Annotated[int, told("Flows that are silent, and forgotten soon.")] = 0
    stalled: Annotated[int, told("Flows whose packets wait.")] = 0
    draining: Annotated[int, told("Flows whose packets are dropped.")] = 0


class NetworkPart(NetworkReport, frozen=True):
    """The network the node is in, as control said last."""

    label: Annotated[str, told("Name of the node in DNS.")] = ""
    advertised: Annotated[tuple[str, ...], told("Networks behind this node that it announces.")] = ()
    current: Annotated[bool, told("false: what control said before it went away.")] = False


class Peer(PeerReport, frozen=True):
    """A peer. `state` and what follows from it are unknown, and 0, while control does not answer."""

    virtual_ip: Annotated[str, told("Its first address in the VPN.")] = ""
    rtt_ms: Annotated[
        float | None, told("Round trip of its fastest session; null until measured.", "milliseconds")
    ] = None
    rtt: Annotated[Spread, told("Round trips of probes and barriers in its sessions since the start.")] = (
        Spread()
    )
    sessions: Annotated[int, told("Sessions with it.")] = 0
    streams: Annotated[int, told("Streams of those sessions.")] = 0
    suspect: Annotated[int, told("Sessions whose last probe failed.")] = 0
    queued_bytes: Annotated[int, told("Waits for its sessions.", "bytes")] = 0
    queue_delay_ms: Annotated[float, told("How long the packet sent last waited.", "milliseconds")] = 0.0
    segment_bytes: Annotated[
        int,
        told(
            "Largest TCP segment (MSS) of its sessions, the smallest of them; 0 without a session.", "bytes"
        ),
    ] = 0
    datagrams: Annotated[
        str,
        told(
            "Datagrams beside its sessions: used, unused (the way is short, streams are as good), silent "
            "(none arrive), alone (no session carries anything, all goes in datagrams) or none (one of the two nodes "
            "takes none)."
        ),
    ] = "none"
    datagram_rtt_ms: Annotated[
        float | None, told("Round trip of datagrams; null until measured.", "milliseconds")
    ] = None
    datagram_jitter_ms: Annotated[float, told("How much that changes (RFC 3550).", "milliseconds")] = 0.0
    datagram_loss_out: Annotated[
        float | None, told("Datagrams to it that were lost lately; null until measured.", "share of 1")
    ] = None
    datagram_loss_in: Annotated[
        float | None, told("Datagrams from it that were lost; null until measured.", "share of 1")
    ] = None
    datagram_bytes: Annotated[int, told("Largest datagram that arrives.", "bytes")] = 0
    bytes_sent: Annotated[int, told("To it since the start.", "bytes")] = 0
    bytes_received: Annotated[int, told("From it since the start.", "bytes")] = 0
    packets_sent: Annotated[int, told("To it since the start.", "records")] = 0
    packets_received: Annotated[int, told("From it since the start.", "records")] = 0
    segments_sent: Annotated[
        int, told("The same, each segment of a superpacket counted, as on a link.", "packets")
    ] = 0
    segments_received: Annotated[
        int, told("The same, each segment of a superpacket counted, as on a link.", "packets")
    ] = 0
    drops: Annotated[
        dict[str, int],
        told(
            "What was dropped of packets to it and from it, by reason; without those that are 0.", "records"
        ),
    ] = {}


class TunPart(Part, frozen=True):
    """The TUN device."""

    interface: Annotated[str, told("Its name.")] = ""
    mtu: Annotated[int, told("Its MTU.", "bytes")] = 0
    offloads: Annotated[tuple[str, ...], told("Offloads the kernel gave; empty: one packet at a time.")] = ()
    packets_read: Annotated[int, told("Read from the TUN device, merged ones as one.", "records")] = 0
    packets_written: Annotated[int, told("Written into the TUN device.", "records")] = 0
    bytes_read: Annotated[int, told("Read from the TUN device.", "bytes")] = 0
    bytes_written: Annotated[int, told("Written into the TUN device.", "bytes")] = 0
    reads: Annotated[int, told("Reads of the TUN device that gave something.", "reads")] = 0
    merged: Annotated[int, told("Datagrams merged into the one before them.", "datagrams")] = 0
    flows: Annotated[int, told("Flows whose shard is remembered.")] = 0


class BookOut(Part, frozen=True):
    """The way out: what this machine offered is what was sent, dropped, and on its way."""

    offered: Annotated[int, told("Read from the TUN, or dropped in its queue.", "records")] = 0
    read: Annotated[int, told("Read from the TUN.", "records")] = 0
    sent: Annotated[int, told("Sent by shards.", "records")] = 0
    dropped: Annotated[int, told("Dropped on the way out.", "records")] = 0
    in_flight: Annotated[int, told("In rings and queues.", "records")] = 0
    difference: Annotated[int, told("0 when nothing moves.", "records")] = 0
    sent_packets: Annotated[int, told("Of those sent: each segment of a superpacket counted.", "packets")] = 0
    dropped_packets: Annotated[
        int, told("Of those dropped: each segment counted, as in dropped_packets.", "packets")
    ] = 0


class BookIn(Part, frozen=True):
    """The way in: what was received is what was written, and dropped."""

    received: Annotated[int, told("Received from peers.", "records")] = 0
    written: Annotated[int, told("Written into the TUN.", "records")] = 0
    dropped: Annotated[int, told("Dropped on the way in.", "records")] = 0
    difference: Annotated[int, told("0 when nothing moves.", "records")] = 0
    received_packets: Annotated[
        int, told("Of those received: each segment of a superpacket counted.", "packets")
    ] = 0
    dropped_packets: Annotated[
        int, told("Of those dropped: each segment counted, as in dropped_packets.", "packets")
    ] = 0


class Books(Part, frozen=True, rename={"into": "in"}):
    """Sums over all processes; under load, counts of different processes are of slightly different moments."""

    out: Annotated[BookOut, told("From the TUN to peers.")] = BookOut()
    into: Annotated[BookIn, told("From peers to the TUN.")] = BookIn()


class Status(Part, frozen=True):
    """All of it."""

    version: Annotated[str, told("Version of the daemon.")] = ""
    health: Annotated[str, told("healthy, degraded or down: the worst of ailments.")] = ""
    ailments: Annotated[tuple[Ailment, ...], told("Why not healthy, most serious first.")] = ()
    ready: Annotated[bool, told("Whether all processes are up, and control has said what this node is.")] = (
        False
    )
    node: Annotated[NodePart, told("The node.")] = NodePart()
    supervisor: Annotated[SupervisorPart, told("The supervisor.")] = SupervisorPart()
    control: Annotated[ControlPart, told("Control.")] = ControlPart()
    shards: Annotated[tuple[Shard, ...], told("Shards meant to be there, and those that are leaving.")] = ()
    retired: Annotated[
        tuple[Shard, ...], told("Shards that were scaled away; their counts stay in every sum.")
    ] = ()
    others: Annotated[
        tuple[OtherPart, ...], told("Processes that no packet of this node depends on, those that run.")
    ] = ()
    flows: Annotated[Flows, told("Flows by state.")] = Flows()
    network: Annotated[NetworkPart | None, told("The network; null: the node is in none.")] = None
    reach: Annotated[
        ReachReport, told("Whether the node can be dialed from outside; unknown without control's answer.")
    ] = ReachReport()
    peers: Annotated[
        tuple[Peer, ...], told("Peers, at most status.max_peers; those with sessions first.")
    ] = ()
    tun: Annotated[TunPart, told("The TUN device.")] = TunPart()
    dropped: Annotated[dict[str, int], told("Drops of all processes by reason; see below.", "records")] = {}
    dropped_packets: Annotated[
        dict[str, int],
        told(
            "The same, each segment of a superpacket counted; but not in what the kernel or a dead shard dropped.",
            "packets",
        ),
    ] = {}
    books: Annotated[Books, told("What became of every packet.")] = Books()


# --- what is wrong


#: What a node is that is no member (any more), and what its user can do.
NOT_IN = {
    "removed": (
        "removed from network {}",
        "An authority removed this node: no other takes its packets any more. To come back, ask for a new token "
        "(vpnd invite, on an authority) and run: vpnd stop, then vpnd start --join TOKEN",
    ),
    "expired": (
        "its membership has expired in network {}",
        "This node could not renew its membership in time; it goes on trying. Does an authority run and can be "
        "reached, and are the clocks right?",
    ),
    "lost": (
        "its membership is not among what was saved any more, in network {}",
        "The files were damaged. Unless an authority that runs finds this node soon: ask for a new token (vpnd invite, "
        "on an authority) and run: vpnd stop, then vpnd start --join TOKEN",
    ),
    "early": (
        "its membership is not yet valid in network {}",
        "The membership begins in the future, by this machine's clock: is the clock right? Once it is set, nothing "
        "else has to be done.",
    ),
}


def judged(status: Status, others: tuple[Ailment, ...] = ()) -> Status:
    """`status` with its health: what its fields say, and `others`, which parts of the node told."""
    found = sorted((*_ailments(status), *others), key=lambda ailment: ailment.health != DOWN)
    health = HEALTHY if not found else found[0].health
    return msgspec.structs.replace(status, health=health, ailments=tuple(found))


def _ailments(status: Status) -> Iterator[Ailment]:
    # beyond that number are those that are coming or going at the moment
    shards = status.shards[: status.node.shards]
    yield from _processes(status, shards)
    yield from _exit(status)
    network = status.network
    if network is not None and network.state in NOT_IN:
        what, remedy = NOT_IN[network.state]
        yield Ailment(what=what.format(network.name), remedy=remedy, health=DOWN)
    elif network is not None and network.clock:
        yield Ailment(
            what=network.clock, remedy="is the clock right? Once it is set, nothing else has to be done"
        )
    elif status.peers and not any(peer.state == "connected" for peer in status.peers):
        yield Ailment(what="no peer is connected", remedy="`vpnd status` says of each peer why")


def _exit(status: Status) -> Iterator[Ailment]:
    node = status.node
    if not node.exit_node or status.network is None or status.network.state in NOT_IN:
        return
    exit_peer = next((peer for peer in status.peers if peer.peer_id == node.exit_peer), None)
    named = (peer for peer in status.peers if node.exit_node in (peer.name, peer.peer_id, *peer.virtual_ips))
    if not node.exit_peer and any(named):
        yield Ailment(
            what=f"{node.exit_node} is no exit node now: it announces no way out",
            remedy=f"vpnd status on {node.exit_node} says whether it forwards packets; else its network.advertise "
            "has to have 0.0.0.0/0, and its invitation to allow it (--route)",
        )
    elif not node.exit_peer:
        yield Ailment(
            what=f"there is no exit node {node.exit_node}",
            remedy="is it a member that announces 0.0.0.0/0 (vpnd members)? Else change network.exit_node",
        )
    elif exit_peer is not None and exit_peer.state not in ("connected", "unknown"):
        yield Ailment(what=f"the exit node {node.exit_node} is not connected", remedy="`vpnd peers` says why")


def _processes(status: Status, shards: tuple[Shard, ...]) -> Iterator[Ailment]:
    control = status.control
    log = "the node starts it again; its log says why it ended"
    if control.state not in _WORKS:
        yield Ailment(what=f"control is {control.state or 'not there'}", remedy=log)
    elif control.answers is False:
        yield Ailment(what="control does not answer", remedy=f"if it stays so: kill -9 {control.pid}")
    away = [shard for shard in shards if shard.state not in _WORKS]
    if away:
        health = DOWN if len(away) == len(shards) else DEGRADED
        which = ", ".join(f"{shard.index} {shard.state}" for shard in away)
        yield Ailment(
            what=f"{len(away)} of {many(len(shards), 'shard')} not running: {which}",
            remedy=log,
            health=health,
        )
    for shard in shards:
        if shard.state in _WORKS and shard.answers is False:
            yield Ailment(
                what=f"shard {shard.index} does not answer", remedy=f"if it stays so: kill -9 {shard.pid}"
            )
    if not status.ready and control.state in _WORKS and not away:
        yield Ailment(what="not ready yet", health=DOWN)


# --- for readers


def known_as(status: Status) -> str:
    """What the node is called: in its network, where it has one."""
    network = status.network
    return f"{network.label} in {network.name}" if network is not None and network.label else status.node.name


def connected(status: Status) -> str:
    """How many peers are: "1 of 2 peers connected"."""
    if not status.peers:
        return "no peers"
    number = sum(peer.state == "connected" for peer in status.peers)
    return f"{number} of {many(len(status.peers), 'peer')} connected"


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `vpnd status --json`; `unit` is an annotation of ours."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vpnd status",
        **msgspec.json.schema(Status),
    }


_HEAD = """\
# What `vpnd status --json` says

<!-- Made by `vpnd status --reference` from vpnd/status.py; change it there. -->

`vpnd status --schema` prints the same as a JSON Schema. Programs that embed a node get it as `vpnd.status.Status`.
Versions may add fields; what is there keeps its meaning, so read what you know and ignore the rest.

A *record* is what the kernel hands over at once: one packet, or a superpacket of up to 64 KB. Counters only grow while
the node runs, also when a process of it is started again.
"""


def reference() -> str:
    """docs/status.md."""
    rows = [
        f"| `{path}` | {kind} | {unit} | {meaning} |" for path, kind, unit, meaning in _fields(Status, "")
    ]
    fields = "\n".join(["| field | type | unit | meaning |", "|---|---|---|---|", *rows])
    counters = "\n".join(
        ["| counter | unit | meaning |", "|---|---|---|"]
        + [
            f"| `{name}` | {metric.unit}{', now' * metric.gauge} | {metric.meaning} |"
            for name, metric in CONTROL_METRICS.items()
        ]
    )
    drops = "\n".join(
        ["| reason | dropped | meaning |", "|---|---|---|"]
        + [f"| `{reason}` | {drop.stage.value} | {drop.meaning} |" for reason, drop in DROPS.items()]
    )
    return f"{_HEAD}\n{fields}\n\n## Why packets are dropped\n\n{drops}\n\n## What control counts\n\n{counters}\n"


def _fields(struct: type[msgspec.Struct], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    hints = get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        hint = hints[field.name]
        meta = hint.__metadata__[0]
        many, inner, kind = _kind(get_args(hint)[0])
        path = f"{prefix}{field.encode_name}{'[]' * many}"
        yield path, kind, (meta.extra_json_schema or {}).get("unit", ""), meta.description
        if inner is not None:
            yield from _fields(inner, f"{path}.")


def _kind(hint: Any) -> tuple[bool, type[msgspec.Struct] | None, str]:
    """Whether it is a list, the Struct in it if any, and what to call it."""
    arguments = [each for each in get_args(hint) if each is not Ellipsis]
    nothing = ", null" if type(None) in arguments else ""
    one = next((each for each in arguments if each is not type(None)), hint)
    inner = one if isinstance(one, type) and issubclass(one, msgspec.Struct) else None
    if getattr(hint, "__origin__", None) is dict:
        return False, None, "numbers by name"
    many = getattr(hint, "__origin__", None) is tuple
    names = {str: "text", int: "integer", float: "number", bool: "true, false"}
    name = "object" if inner is not None else names[one]
    return many, inner, f"list of {name}s" if many else name + nothing
