"""Why packets to an address do not arrive: the way of a packet step by step, and which step stops it.

    route     the kernel sends it into the TUN device        supervisor, netlink
    rule      by which routing table                         supervisor, netlink
    device    the device's own queue takes it                the kernel's count
    shard     the flow's shard runs and keeps up             status, ring
    flow      what the shard has of the flow                 shard
    peer      somebody owns the destination                  shard, control
    membership  both nodes are in, and each knows the other  control, and how the peer receives us
    path      the peer's machine and port can be reached     a connection made now
    breaker   the peer is not being left alone               control
    session   one is up and answers                          a ping in it, made now
    stream    a stream of it is open                         shard
    queue     what waits for the session is not dropped      shard
    answer    what the peer says of packets from here        the peer itself, asked by its control

`judge` is a function of facts, which supervisor/walking.py gathers; the command line adds what only it may do (echo
requests). A step *stops* packets, or *loses* some, as counters show that grew while it was looked at. The same is done
on the other node when it is asked, for its way back, so what it says is its own steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, TypeVar

import msgspec

from vpnd.api.reports import FlowReport, SessionProbe
from vpnd.errors import RemoteProtocolError
from vpnd.metrics import DROPS, Stage, reasons
from vpnd.status import NOT_IN, Part, Peer, Shard, Status

OK, STOPS, LOSES, UNKNOWN = "ok", "stops", "loses", "unknown"
#: A member chooses this in the place of a muxer (vpnd.adapter.guests). Messages are framed (vpnd.adapter.framing):
#: empty → `Greeting`; LARGE bytes → as many; `Question` → `Told`.
PROTOCOL = "/vpnd/why/1.0.0"
#: More than any path carries in one packet.
LARGE = 16_384
#: Of a message, either way.
MAX_MESSAGE = 1 << 16

#: Which step is the cause where several stop packets: what lies here first, then what the peer says of itself, then
#: what lies between.
_HERE = ("route", "rule", "device", "shard", "membership", "peer", "flow")
_CAUSES = (*_HERE, "answer", "path", "breaker", "session", "stream", "queue", "echo", "port")

Line = Annotated[str, msgspec.Meta(max_length=2000)]
Name = Annotated[str, msgspec.Meta(max_length=200)]


class Step(Part, frozen=True):
    """One step. `counters` prove what it says; `lost`: records, while it was looked at."""

    name: Name = ""
    verdict: Name = OK
    says: Line = ""
    remedy: Line = ""
    counters: Annotated[dict[Name, int], msgspec.Meta(max_length=64)] = {}
    lost: int = 0


class Greeting(Part, frozen=True):
    """`now_ms`: the peer's clock, milliseconds since 1970."""

    version: Name = ""
    now_ms: int = 0


class Question(Part, frozen=True):
    """What was sent there."""

    address: Name = ""


class Told(Part, frozen=True):
    """What a peer says of packets from here: `steps` of its way back, `cause` of those. `dropped`: there, in records by
    reason, ever; `dropping`: while it looked. `busy`: nothing, it was looking for somebody else."""

    busy: bool = False
    steps: Annotated[tuple[Step, ...], msgspec.Meta(max_length=32)] = ()
    cause: Name = ""
    dropped: Annotated[dict[Name, int], msgspec.Meta(max_length=64)] = {}
    dropping: Annotated[dict[Name, int], msgspec.Meta(max_length=64)] = {}


class Asked(Part, frozen=True):
    """What came of asking the peer. Without `told`: `error` in a line, and its `kind` (vpnd.adapter.dial.DialError);
    kind large: small messages came through, large ones did not. `ahead_s`: its clock against ours."""

    told: Told | None = None
    error: str = ""
    kind: str = ""
    ahead_s: float | None = None


class Standing(Part, frozen=True):
    """What control knows of who was named. `state`: peer, removed, left, expired or unknown; `says`: more of it."""

    peer_id: str = ""
    name: str = ""
    state: str = "unknown"
    says: str = ""
    virtual_ips: tuple[str, ...] = ()


class Route(Part, frozen=True):
    """The kernel's, to an address: device, table; or `error`."""

    device: str = ""
    table: int = 0
    error: str = ""


class Facts(Part, frozen=True):
    """What is known. `shard` None: none is up. `probed`: whether that shard answered. `owner`: the peer id that it has
    for the destination. `asked` None: the peer was not asked."""

    address: str
    before: Status
    after: Status
    route: Route | None = None
    shard: int | None = None
    probed: bool = False
    owner: str = ""
    flow: FlowReport | None = None
    session: SessionProbe | None = None
    why_none: str = ""
    standing: Standing = Standing()
    asked: Asked | None = None
    clock_skew_s: float = 0.0


class Walk(Part, frozen=True):
    """The result. `cause`: the name of the step to blame; empty: none. `kind`: as in Asked; `multiaddrs`: where the
    peer is dialed. `behind`: the address is not the peer's own, but of a network behind it."""

    address: str = ""
    name: str = ""
    peer_id: str = ""
    cause: str = ""
    kind: str = ""
    multiaddrs: tuple[str, ...] = ()
    behind: bool = False
    steps: tuple[Step, ...] = ()

    def blamed(self) -> Step:
        """The step that is the cause; an empty one where there is none."""
        return next((step for step in self.steps if step.name == self.cause), Step())


Said = TypeVar("Said", Told, Greeting, Question)


def said_untrusted(data: bytes, kind: type[Said]) -> Said:
    """What a peer says. Raises RemoteProtocolError."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"no {kind.__name__}: {error}") from error


def with_step(walk: Walk, step: Step) -> Walk:
    """One step more, or another one of its name."""
    steps = {each.name: each for each in walk.steps} | {step.name: step}
    return msgspec.structs.replace(walk, steps=tuple(steps.values()), cause=cause_of(tuple(steps.values())))


def cause_of(steps: tuple[Step, ...]) -> str:
    """The step to blame: what stops packets before what loses some, and of those the one that lost most."""
    stopping = {step.name for step in steps if step.verdict == STOPS}
    if stopping:
        return min(stopping, key=_CAUSES.index)
    losing = [step for step in steps if step.verdict == LOSES]
    return min(losing, key=lambda step: (-step.lost, _CAUSES.index(step.name))).name if losing else ""


def judge(facts: Facts) -> Walk:
    after = facts.after
    peer_id = facts.owner or facts.standing.peer_id
    peer = next((row for row in after.peers if row.peer_id == peer_id), None) if peer_id else None
    name = (peer.name if peer is not None else "") or facts.standing.name or peer_id or facts.address
    steps = tuple(_steps(facts, peer, name))
    return Walk(
        address=facts.address,
        name=name,
        peer_id=peer_id,
        cause=cause_of(steps),
        kind=facts.asked.kind if facts.asked is not None else "",
        multiaddrs=peer.addresses if peer is not None else (),
        behind=peer is not None and facts.address not in ("", *peer.virtual_ips),
        steps=steps,
    )


def _steps(facts: Facts, peer: Peer | None, name: str) -> Iterator[Step]:
    if facts.route is not None:
        yield from _route(facts, facts.route, whose=peer is not None or bool(facts.owner))
    yield _device(facts)
    yield _shard(facts)
    yield _flow(facts)
    yield _peer(facts, peer, name)
    yield _membership(facts, peer, name)
    if peer is not None:
        yield _path(facts, peer)
        yield _breaker(facts, peer)
        yield _session(facts, peer)
        yield _stream(peer)
        yield _queue(facts, peer)
        if facts.asked is not None:
            yield _answer(facts.asked, peer)


# --- here


def _route(facts: Facts, route: Route, *, whose: bool) -> Iterator[Step]:
    """`whose`: somebody in the VPN has the address. Else it is not to go there, and no route is to blame."""
    device, look = facts.after.tun.interface, f"ip route get {facts.address}"
    says = f"this machine sends it to {route.device}, not to {device}"
    remedy = f"take the other route away, or make it less specific: {look}; ip route show table all"
    if route.error:
        says = f"this machine has no route: {route.error}"
        remedy = (
            f"is the address in {facts.after.node.subnet}, or in network.routes? `{look}` shows the kernel's choice; "
            "the node puts its own routes back within network.reconcile_interval"
        )
    if not route.error and route.device == device:
        yield Step(name="route", says=f"into {device}")
    else:
        yield _stops("route", says, remedy) if whose else Step(name="route", verdict=UNKNOWN, says=says)
    if not route.error:
        yield Step(name="rule", says=f"by routing table {route.table}")


def _grown(facts: Facts, *names: str) -> dict[str, int]:
    """Drops of this node that were counted meanwhile."""
    return _growth(facts.before.dropped, facts.after.dropped, names)


def _growth(before: Mapping[str, int], after: Mapping[str, int], names: tuple[str, ...]) -> dict[str, int]:
    grown = {name: after.get(name, 0) - before.get(name, 0) for name in names}
    return {name: count for name, count in grown.items() if count > 0}


def _stops(name: str, says: str, remedy: str, **counters: int) -> Step:
    return Step(name=name, verdict=STOPS, says=says, remedy=remedy, counters=counters)


def _unknown(name: str, says: str, **counters: int) -> Step:
    return Step(name=name, verdict=UNKNOWN, says=says, counters=counters)


def _losing(name: str, grown: dict[str, int], says: str, remedy: str, **also: int) -> Step:
    lost = sum(grown.values())
    return Step(name=name, verdict=LOSES, says=says, remedy=remedy, counters={**grown, **also}, lost=lost)


def _device(facts: Facts) -> Step:
    tun = facts.after.tun
    grown = _grown(facts, "tun_queue_full")
    if grown:
        return _losing(
            "device",
            grown,
            f"{tun.interface} drops packets: this machine sends faster than the node reads them",
            "a larger network.queue_length takes longer bursts; else a sender has to be slower, or the machine faster",
            packets_read=tun.packets_read - facts.before.tun.packets_read,
        )
    return Step(
        name="device",
        says=f"{tun.interface} takes it, up to {tun.mtu} bytes",
        counters={
            "tun_queue_full": facts.after.dropped.get("tun_queue_full", 0),
            "packets_read": tun.packets_read,
        },
    )


def _shard(facts: Facts) -> Step:
    before = {shard.index: shard for shard in facts.before.shards}
    rows = facts.after.shards[: facts.after.node.shards]
    log = "the node starts it again; its log (vpnd logs) says why it ended"
    again = {
        row.index: row.restarts - before.get(row.index, row).restarts for row in rows if row.state != "hung"
    }
    away = [row for row in rows if row.state not in ("up", "hung") or again.get(row.index, 0) > 0]
    if not facts.address and not away:
        return _unknown("shard", "without an address there is no flow, and no shard of it")
    if facts.shard is None or any(row.index == facts.shard for row in away):
        which = ", ".join(f"shard {row.index} is {row.state}" for row in away) or "no shard is up"
        counters = {f"restarts of shard {row.index}": row.restarts for row in rows}
        says = f"{which}: its process ends again and again"
        if not any(row.restarts for row in away):
            says = which
        return _stops("shard", says, log, **counters)
    row = next((row for row in rows if row.index == facts.shard), Shard())
    if row.state == "hung" or row.answers is False or not facts.probed:
        remedy = (
            "the watchdog (process.watchdog) kills it and starts another; "
            f"at once: kill -9 {row.pid}; its log says more"
        )
        return _stops(
            "shard",
            f"the flow is shard {row.index}'s, which hangs: it does not answer",
            remedy,
            **{"restarts": row.restarts, "ring bytes": row.ring.used},
        )
    grown = _grown(facts, "ring_full", "shard_down", "shard_died")
    if grown:
        says, remedy = "packets were lost with a shard that ended", log
        if "ring_full" in grown:
            says = f"the ring to shard {row.index} is full: it does not keep up"
            remedy = "more shards (vpnd scale), or a larger worker.ring_bytes for bursts"
        return _losing("shard", grown, says, remedy, **{"ring bytes": row.ring.used})
    if away:
        which = ", ".join(f"shard {each.index} is {each.state}" for each in away)
        says = f"the flow is shard {row.index}'s, which runs; but {which}: what it had is lost"
        return _losing("shard", {}, says, log, **{f"restarts of shard {x.index}": x.restarts for x in away})
    return Step(
        name="shard",
        says=f"the flow is shard {row.index}'s",
        counters={"ring bytes": row.ring.used, "ring size": row.ring.size, "restarts": row.restarts},
    )


_FLOW_STATES = {
    "none": "no packet of it was seen lately",
    "lane": "its packets go into a stream of a session",
    "datagrams": "its packets go in datagrams beside a session",
    "pending": "its packets wait for a session",
    "discarded": "its packets are dropped",
    "held": "its packets are held back while it changes its stream",
}


def _flow(facts: Facts) -> Step:
    flow = facts.flow
    if flow is None:
        return _unknown("flow", "the shard did not tell")
    counters = {"packets": flow.packets, "waiting": flow.waiting}
    waits = f", the oldest for {flow.waiting_ms:.0f} ms" if flow.waiting else ""
    return Step(name="flow", says=_FLOW_STATES.get(flow.state, flow.state) + waits, counters=counters)


def _peer(facts: Facts, peer: Peer | None, name: str) -> Step:
    if peer is not None or facts.owner:
        whose = f"{facts.address} is {name}'s" if facts.address else name
        return Step(name="peer", says=whose)
    grown = _grown(facts, "no_route", "peer_forgotten")
    remedy = (
        "is there a [[peers]] entry with this virtual_ip, or a member (vpnd members)? "
        "A network behind a member has to be announced there (network.advertise), and that machine to forward packets"
    )
    node = facts.after.node
    if node.exit_node and not node.exit_peer:
        remedy = f"it would go by the exit node {node.exit_node}, which is none now: vpnd status says why"
    return Step(
        name="peer",
        verdict=STOPS,
        says=f"no peer of this node has {facts.address or facts.standing.name}",
        remedy=remedy,
        counters={"no_route": facts.after.dropped.get("no_route", 0)},
        lost=sum(grown.values()),
    )


def _membership(facts: Facts, peer: Peer | None, name: str) -> Step:
    network = facts.after.network
    if network is not None and network.state in NOT_IN:
        what, remedy = NOT_IN[network.state]
        return _stops("membership", f"this node: {what.format(network.name)}", remedy + _clocks(facts))
    if peer is None and facts.standing.state in ("removed", "left", "expired"):
        remedy = f"to let it in again: vpnd invite, and on {name}: vpnd start --join TOKEN"
        if facts.standing.state == "expired":
            remedy = f"does {name} run, does it reach an authority, and are the clocks right (date -u)?"
        return _stops("membership", f"{name} {facts.standing.says}", remedy)
    refused = facts.after.control.counters.get("refused_unknown_peer", 0)
    if facts.asked is not None and facts.asked.kind == "not_admitted":
        own = facts.after.node.peer_id
        remedy = (
            f"on {name}: does a [[peers]] entry have this node's peer id ({own}, vpnd id), or are both in one "
            f"network (vpnd members)? Is the membership of one over, or a clock wrong (date -u)? Does vpnd status say "
            f"there that this node comes too often?"
        )
        says = f"{name} proves who it is, and closes: it does not know this node, or has removed it"
        return _stops("membership", says, remedy, refused_unknown_peer=refused)
    ahead_s = facts.asked.ahead_s if facts.asked is not None else None
    if ahead_s is not None and abs(ahead_s) > facts.clock_skew_s > 0:
        which = "ahead of" if ahead_s > 0 else "behind"
        says = f"the clock of {name} is {abs(ahead_s):.0f} s {which} this one's"
        remedy = (
            "set the one that is wrong (date -u on both; systemd-timesyncd or chrony): memberships end by it"
        )
        return _losing("membership", {}, says, remedy, **{"clock ahead by s": round(ahead_s)})
    if peer is not None and peer.refused:
        says = f"{name} comes too often (p2p.max_handshakes_per_peer)"
        remedy = f"on {name}: vpnd status and its log say what makes it connect again and again"
        return _losing("membership", {}, says, remedy, **{"handshakes refused": peer.refused})
    if network is not None:
        says = f"this node is a member of {network.name}" + (f", so is {name}" if peer is not None else "")
        return Step(name="membership", says=says, counters={"expires in s": round(network.expires_s)})
    return Step(name="membership", says="peers are configured", counters={"refused_unknown_peer": refused})


def _clocks(facts: Facts) -> str:
    warnings = facts.after.network.warnings if facts.after.network is not None else ()
    return "".join(f"; {warning}" for warning in warnings)


# --- between


#: Kind of a dial's failure -> what it says, and the remedy.
_PATHS = {
    "refused": (
        "its machine answers, but nothing listens there",
        "does vpnd run there (vpnd status)? Is it still at this address and port (p2p.listen)?",
    ),
    "silent": (
        "nothing comes back",
        "is the machine on, and does a firewall between, or there, let this TCP port through?",
    ),
    "unreachable": ("there is no way to it", "has this machine a network? ip route get, and the cables"),
    "wrong_key": (
        "another node answers there: its key is not the one that is known",
        "compare `vpnd id` there with its peer_id in [[peers]] here; or has another machine got its address?",
    ),
    "large": (
        "small messages come through, large ones do not: something between drops large packets without a word",
        "lower the MTU of the link (ip link set mtu), let ICMP \"fragmentation needed\" through, or "
        "sysctl net.ipv4.tcp_mtu_probing=1 on both machines",
    ),
    "no_address": (
        "it has no address to dial: this node waits for its dial",
        "let it dial: TCP port of p2p.listen open here; or give its address (addresses in [[peers]], p2p.announce)",
    ),
}  # fmt: skip


def _path(facts: Facts, peer: Peer) -> Step:
    counters = {"dials": peer.dials, "dial_failures": peer.dial_failures}
    asked = facts.asked
    works = facts.session is not None and facts.session.rtt_ms is not None
    where = ", ".join(peer.paths) or ", ".join(peer.addresses) or "no address"
    if asked is not None and asked.kind in _PATHS and not works:
        says, remedy = _PATHS[asked.kind]
        detail = f" ({asked.error})" if asked.error else ""
        return _stops("path", f"{says}{detail}", remedy, **counters)
    if works and asked is not None and asked.kind == "large":
        # sessions that meet this are made anew with segments that pass
        return Step(name="path", says=f"{where}; large packets vanish on it", counters=counters)
    if works or (asked is not None and asked.told is not None) or peer.state == "connected":
        return Step(name="path", says=where, counters=counters)
    if asked is not None and asked.kind == "not_admitted":
        return Step(name="path", says=f"{where}: it answers", counters=counters)
    last = (asked.error if asked is not None else "") or peer.last_error or peer.state
    return _stops("path", f"{last} ({where})", "see vpnd status, and vpnd why on the other node", **counters)


def _breaker(facts: Facts, peer: Peer) -> Step:
    counters = {
        "circuit_opened": peer.circuit_opened,
        "circuit_open": peer.drops.get("circuit_open", 0),
    }
    if peer.circuit in ("open", "half_open") and peer.state != "connected":
        when = (
            f"the next try is in {peer.next_dial_s:.0f} s" if peer.next_dial_s >= 0 else "it is tried again"
        )
        return _stops(
            "breaker",
            f"the circuit is {peer.circuit.replace('_', '-')}: its packets are dropped at once",
            f"{when} while packets want it (circuit_breaker.reset_timeout); it was: {peer.last_error or '-'}",
            **counters,
        )
    return Step(name="breaker", says=f"the circuit is {peer.circuit}", counters=counters)


def _session(facts: Facts, peer: Peer) -> Step:
    counters = {
        "sessions": peer.sessions,
        "suspect": peer.suspect,
        "no_session": peer.drops.get("no_session", 0),
    }
    session = facts.session
    if session is not None and session.rtt_ms is not None:
        says = (
            f"{session.session_id:x}, {session.local} -> {session.remote}, answers in {session.rtt_ms:.1f} ms"
        )
        return Step(name="session", says=says, counters=counters)
    if session is not None:
        says = f"{session.session_id:x}, {session.local} -> {session.remote}: {facts.why_none}"
        remedy = "it is given up after health.max_consecutive_failures probes, and another one is made"
        return _stops("session", says, remedy, **counters)
    if peer.datagrams == "alone":
        says = "there is none: its connections carry nothing, everything goes in datagrams"
        return Step(name="session", says=says, counters=counters)
    if not facts.probed:
        return _unknown("session", "the shard did not tell", **counters)
    says = f"there is none: {facts.why_none}"
    return _stops("session", says, "one is dialed as soon as the steps above let it", **counters)


def _stream(peer: Peer) -> Step:
    if peer.sessions and not peer.streams:
        remedy = "is the other side a vpnd of another version? Its log says why it opens none"
        return _stops("stream", "none is open in its sessions", remedy, streams=0)
    return Step(name="stream", says=f"{peer.streams} open", counters={"streams": peer.streams})


#: What a session's queue drops.
_QUEUE = ("queue_full", "queue_delay", "flow_full", "too_big")


def _queue(facts: Facts, peer: Peer) -> Step:
    before = next((row for row in facts.before.peers if row.peer_id == peer.peer_id), peer)
    grown = _growth(before.drops, peer.drops, _QUEUE)
    waits = {"queued bytes": peer.queued_bytes, "queue delay ms": round(peer.queue_delay_ms)}
    if grown:
        worst = max(grown, key=lambda reason: grown[reason])
        remedy = (
            "a slower sender, or a faster path; session.queue_bytes, session.delay_target, worker.buffer_size"
        )
        return _losing("queue", grown, DROPS[worst].meaning, remedy, **waits)
    dropped = {reason: peer.drops[reason] for reason in _QUEUE if reason in peer.drops}
    return Step(
        name="queue", says=f"packets wait {peer.queue_delay_ms:.0f} ms", counters={**waits, **dropped}
    )


# --- there


def _answer(asked: Asked, peer: Peer) -> Step:
    if asked.told is None:
        return _unknown("answer", f"{peer.name} could not be asked: {asked.error}")
    told = asked.told
    if told.busy:
        return _unknown("answer", f"{peer.name} was looking for somebody else: ask again")
    # what lies between is seen from here as well, and told by the steps before
    blamed = next((step for step in told.steps if step.name == told.cause and step.name in _HERE), None)
    inbound = reasons(Stage.INBOUND)
    dropping = {reason: count for reason, count in told.dropping.items() if reason in inbound and count > 0}
    counters = {reason: count for reason, count in told.dropped.items() if reason in inbound}
    if blamed is not None and (blamed.verdict == STOPS or not dropping):
        return Step(
            name="answer",
            verdict=STOPS if blamed.verdict == STOPS else LOSES,
            says=f"{peer.name} says of its way back: {blamed.name}: {blamed.says}",
            remedy=f"on {peer.name}: {blamed.remedy}",
            counters={**counters, **blamed.counters},
            lost=blamed.lost,
        )
    if dropping:
        worst = max(dropping, key=lambda reason: dropping[reason])
        return Step(
            name="answer",
            verdict=LOSES,
            says=f"{peer.name} drops packets from here: {DROPS[worst].meaning}",
            remedy=f"on {peer.name}: vpnd status, vpnd members; here: the addresses of this node",
            counters=counters | dropping,
            lost=sum(dropping.values()),
        )
    return Step(
        name="answer", says=f"{peer.name} gets packets from here, and has a way back", counters=counters
    )
