"""Every message between the processes of a node, each with its rule: who sends it to whom, when, and what it carries.

A channel (`vpnd.api.channel`) is a SOCK_SEQPACKET socketpair. One datagram is one message, msgpack tagged with the
Struct's name, with its descriptors. Both ends enforce the rules: a message that is unlisted, early, repeated or carries
other descriptors ends the channel of its sender. `python -m vpnd.api.messages` prints the table in docs/messages.md.
"""

from __future__ import annotations

from vpnd.api import reports
from vpnd.api.forking import Fork as Fork
from vpnd.api.forking import Forked as Forked
from vpnd.api.forking import NurseryStart as NurseryStart
from vpnd.api.rules import (
    CONTROL_TO_RELAY,
    CONTROL_TO_SHARD,
    CONTROL_TO_SUPERVISOR,
    EXPORTER_TO_SUPERVISOR,
    MAX_DESCRIPTORS,
    RELAY_TO_CONTROL,
    SHARD_TO_CONTROL,
    SHARD_TO_SUPERVISOR,
    SUPERVISOR_TO_CONTROL,
    SUPERVISOR_TO_EXPORTER,
    SUPERVISOR_TO_RELAY,
    SUPERVISOR_TO_SHARD,
    TO_ALL,
    TO_CHILDREN,
    TO_SUPERVISOR,
    Descriptors,
    Message,
    Rule,
    Way,
    single,
)
from vpnd.config.schema import Config
from vpnd.session import Established


class ControlStart(Message, frozen=True):
    """Configuration and privileged descriptors of control.

    The identity file is read only. The network directory, which belongs to process.user, comes with a node that is in a
    network, or is to make or join one; `virtual_ip` is empty then, for the address comes with Ready. `token`: of
    `start --join`, used once, when that directory is empty.
    """

    rule = Rule(
        (SUPERVISOR_TO_CONTROL,),
        first=True,
        descriptors=Descriptors(2, 3, "identity file, counter page, network directory if any"),
    )

    config: Config
    node_name: str
    peer_id: str
    virtual_ip: str
    token: str = ""

    def __repr__(self) -> str:  # a token is a secret
        return f"ControlStart(peer_id={self.peer_id!r})"


class ShardStart(Message, frozen=True):
    """Configuration of one shard.

    The ring is the one to the shard; the TUN is only written to. `own`: prefixes that peers may address packets to.
    `tun_offloads`: the `Offload` bits of this node's TUN, announced to peers.
    """

    rule = Rule(
        (SUPERVISOR_TO_SHARD,),
        first=True,
        descriptors=Descriptors(4, 4, "ring, its eventfd, counter page, TUN"),
    )

    config: Config
    index: int
    own: tuple[str, ...]
    tun_offloads: int


class ExporterStart(Message, frozen=True):
    """Configuration of a process that answers HTTP: the Prometheus endpoint, or the page.

    Descriptors: the socket that listens on metrics.listen or web.listen, a page for its heartbeat alone. `token`: what
    clients of the page must show.
    """

    rule = Rule((SUPERVISOR_TO_EXPORTER,), first=True, descriptors=Descriptors(2, 2, "socket, heartbeat"))

    config: Config
    token: str = ""

    def __repr__(self) -> str:  # a token is a secret
        return "ExporterStart()"


class Ready(Message, frozen=True):
    """The child works. `listen`: control's addresses, without the /p2p part; empty from shards. `own`: what the node is
    in its network; None from shards, and of a node whose peers are all configured by hand."""

    rule = Rule(TO_SUPERVISOR, first=True)

    listen: tuple[str, ...] = ()
    own: reports.OwnAddresses | None = None


class Failed(Message, frozen=True):
    """The child cannot work. `error` is one line for the user; `kind` the VpndError class it stands for."""

    rule = Rule(TO_SUPERVISOR, first=True)

    kind: str
    error: str


class Reconfigure(Message, frozen=True):
    """The configuration from now on; only what vpnd.config.changes names differs from the one before."""

    rule = Rule(TO_ALL, after=(Ready,))

    config: Config


class NetworkChanged(Message, frozen=True):
    """Addresses or routes of the machine changed, or it was suspended: look after every connection now.

    `addresses`: all local IP addresses, without prefix length, those of the TUN not among them.
    """

    rule = Rule(TO_CHILDREN, after=(Ready,))

    reason: str
    addresses: tuple[str, ...]


class OwnChanged(Message, frozen=True):
    """From now on the node has these virtual addresses and may announce these networks."""

    rule = Rule((CONTROL_TO_SUPERVISOR,), after=(Ready,))

    own: reports.OwnAddresses


class OwnPrefixes(Message, frozen=True):
    """From now on packets from peers may be addressed to these prefixes and to nothing else."""

    rule = Rule((SUPERVISOR_TO_SHARD,), after=(Ready,))

    own: tuple[str, ...]


class RoutesKnown(Message, frozen=True):
    """Networks that members announce and this node accepts, to be routed into the TUN instead of those before.

    `exit_peer`: the member all other traffic goes through, by network.exit_node; empty: none.
    """

    rule = Rule((CONTROL_TO_SUPERVISOR,), after=(Ready,))

    routes: tuple[str, ...]
    exit_peer: str = ""


class Withheld(Message, frozen=True):
    """Of the networks that this node may announce, tell members none of these until further notice: the machine does
    not forward to them."""

    rule = Rule((SUPERVISOR_TO_CONTROL,), after=(Ready,))

    routes: tuple[str, ...]


class NameSockets(Message, frozen=True):
    """Answer DNS on these bound sockets. Descriptors: `udp` UDP sockets, then as many TCP ones."""

    rule = Rule(
        (SUPERVISOR_TO_CONTROL,),
        after=(Ready,),
        descriptors=Descriptors(0, MAX_DESCRIPTORS, "UDP sockets, TCP sockets"),
    )

    udp: int


class Request(Message, frozen=True):
    """A user's command for control: invite, members, remove … (vpnd/control/requests.py)."""

    rule = Rule((SUPERVISOR_TO_CONTROL,), after=(Ready,))

    serial: int
    command: str
    arguments: dict[str, str | int | float | bool | None]

    def __repr__(self) -> str:  # arguments may hold secrets
        return f"Request({self.serial}, {self.command})"


class Answer(Message, frozen=True):
    """The result of a Request: JSON for the command line; or `error`, a line for the user, and the VpndError
    class `kind`. `more`: as in ControlStatus."""

    rule = Rule((CONTROL_TO_SUPERVISOR,), after=(Request,))

    serial: int
    result: bytes = b"{}"
    error: str = ""
    kind: str = ""
    more: bool = False

    def __repr__(self) -> str:  # an invitation is a secret
        return f"Answer({self.serial}, error={self.error!r})"


class DatagramSocket(Message, frozen=True):
    """The shard's UDP socket, the one of this number at `port`: later sessions have datagrams beside them."""

    rule = Rule(
        (SUPERVISOR_TO_SHARD,), once=True, after=(Ready,), descriptors=Descriptors(1, 1, "UDP socket")
    )

    number: int
    port: int


class Stop(Message, frozen=True):
    """End, cleanly. `drain` (shards only): the ring gets no more; first send what is in it and in the queues."""

    rule = Rule(TO_ALL, once=True)

    drain: bool = False


class ShardArrived(Message, frozen=True):
    """Shard `index` (new or restarted) can take sessions. Descriptor: control's end of its channel."""

    rule = Rule((SUPERVISOR_TO_CONTROL,), after=(Ready,), descriptors=single("channel to the shard"))

    index: int


class ShardLeft(Message, frozen=True):
    """Shard `index` is gone, and its sessions with it."""

    rule = Rule((SUPERVISOR_TO_CONTROL,), after=(Ready,))

    index: int


class ControlArrived(Message, frozen=True):
    """Control is there (again). Descriptor: the receiver's end of its channel."""

    rule = Rule(
        (SUPERVISOR_TO_SHARD, SUPERVISOR_TO_RELAY), after=(Ready,), descriptors=single("channel to control")
    )


class StatusRequest(Message, frozen=True):
    """Ask for a status. The answer carries the same `serial`."""

    rule = Rule(TO_CHILDREN, after=(Ready,))

    serial: int


class ControlStatus(Message, frozen=True):
    """Control's answer to StatusRequest. `more`: it goes on in the next one; see vpnd.api.parts. `warnings`: what the
    user should know, a line each.
    """

    rule = Rule((CONTROL_TO_SUPERVISOR,), after=(StatusRequest,))

    serial: int
    listen: tuple[str, ...]
    peers: tuple[reports.PeerReport, ...]
    connections: reports.Count
    network: reports.NetworkReport | None = None
    reach: reports.ReachReport = reports.ReachReport()
    warnings: tuple[str, ...] = ()
    more: bool = False


class ShardStatus(Message, frozen=True):
    """A shard's answer to StatusRequest. Counts live in the counter page, not here. `more`: as in ControlStatus."""

    rule = Rule((SHARD_TO_SUPERVISOR,), after=(StatusRequest,))

    serial: int
    sessions: tuple[reports.SessionReport, ...]
    traffic: tuple[reports.PeerTraffic, ...]
    more: bool = False


class ProbeRequest(Message, frozen=True):
    """Measure the session that carries a flow to this IP address: of an IP protocol and port; protocol 0: pings (ICMP
    echo requests)."""

    rule = Rule((SUPERVISOR_TO_SHARD,), after=(Ready,))

    serial: int
    destination: str
    protocol: int = 0
    port: int = 0


class ProbeAnswer(Message, frozen=True):
    """The result of a ProbeRequest, at the latest after health.timeout. `session` None: none carries that flow; `why`
    says so, or why the session was not measured, in one line. `owner`: the peer id of who has the address."""

    rule = Rule((SHARD_TO_SUPERVISOR,), after=(ProbeRequest,))

    serial: int
    session: reports.SessionProbe | None = None
    why: str = ""
    owner: str = ""
    flow: reports.FlowReport | None = None


class WalkWanted(Message, frozen=True):
    """A peer asks what becomes of its packets to this address, and of those back."""

    rule = Rule((CONTROL_TO_SUPERVISOR,), after=(Ready,))

    serial: int
    peer_id: str
    address: str


class WalkTold(Message, frozen=True):
    """The answer, vpnd.why.Told as JSON."""

    rule = Rule((SUPERVISOR_TO_CONTROL,), after=(WalkWanted,))

    serial: int
    content: bytes


class StatusWanted(Message, frozen=True):
    """The exporter asks for the status of the node. It asks again when it has been told, or after
    status.timeout."""

    rule = Rule((EXPORTER_TO_SUPERVISOR,), after=(Ready,))


class StatusTold(Message, frozen=True):
    """The next bytes of the status, JSON as `vpnd status --json` prints it. `more`: it goes on in the next one."""

    rule = Rule((SUPERVISOR_TO_EXPORTER,), after=(StatusWanted,))

    content: bytes
    more: bool = False


class OwnersAsked(Message, frozen=True):
    """In these networks single addresses have owners, and a peer's wider prefix does not own what lies in them. The
    owner of an address that no peer has may be asked for (OwnerWanted)."""

    rule = Rule((CONTROL_TO_SHARD,), once=True)

    networks: tuple[str, ...]


class PeerKnown(Message, frozen=True):
    """A peer and the prefixes it may send from; replaces what was known of the peer id."""

    rule = Rule((CONTROL_TO_SHARD,))

    peer_id: str
    name: str
    prefixes: tuple[str, ...]


class PeerCircuit(Message, frozen=True):
    """The peer's circuit breaker is now `state`: closed (as at first), open or half_open."""

    rule = Rule((CONTROL_TO_SHARD,), after=(PeerKnown,))

    peer_id: str
    state: str


class PeersComplete(Message, frozen=True):
    """All peers have been told. A shard forgets those it knew before and was not told again."""

    rule = Rule((CONTROL_TO_SHARD,), once=True)


class PeerForgotten(Message, frozen=True):
    """This is no longer a peer: close its sessions, drop its packets."""

    rule = Rule((CONTROL_TO_SHARD,), after=(PeersComplete,))

    peer_id: str


class SessionsHeld(Message, frozen=True):
    """Every session the shard has, for a new control."""

    rule = Rule((SHARD_TO_CONTROL,), first=True)

    sessions: tuple[reports.HeldSession, ...]


class SessionsDoubted(Message, frozen=True):
    """To a shard: the peer dialed, and another shard got the session, so it may have lost those it had; or one with it
    has failed in another shard, or is in doubt there. Probe those there are. From a shard: one is in doubt."""

    rule = Rule((CONTROL_TO_SHARD, SHARD_TO_CONTROL), after=(SessionsHeld,))

    peer_id: str


class SessionHandover(Message, frozen=True):
    """An established session, the shard's from now on. The socket is non-blocking."""

    rule = Rule((CONTROL_TO_SHARD,), after=(PeersComplete, SessionsHeld), descriptors=single("TCP socket"))

    session_id: int
    session: Established


class SessionUp(Message, frozen=True):
    """A stream of the session is open: packets flow."""

    rule = Rule((SHARD_TO_CONTROL,))

    session_id: int
    peer_id: str


class SessionDown(Message, frozen=True):
    """The session has ended; `reason` is one line. `failed`: not by anybody's will, which counts against the peer."""

    rule = Rule((SHARD_TO_CONTROL,))

    session_id: int
    peer_id: str
    reason: str
    failed: bool = True


class SessionWanted(Message, frozen=True):
    """The shard wants `sessions` sessions with the peer, until it says another number.

    `urgent`: packets wait, so no backoff holds up the dial.
    """

    rule = Rule((SHARD_TO_CONTROL,))

    peer_id: str
    sessions: int = 1
    urgent: bool = True


class SegmentsStuck(Message, frozen=True):
    """Large TCP segments seem not to reach the peer: its next sessions are to have small ones. A SessionWanted follows,
    if one is missing."""

    rule = Rule((SHARD_TO_CONTROL,))

    peer_id: str


class OwnerWanted(Message, frozen=True):
    """Packets are for an IPv4 address, given as a number, that no peer has. A PeerKnown may follow."""

    rule = Rule((SHARD_TO_CONTROL,), after=(OwnersAsked,))

    address: int


class RelayStart(Message, frozen=True):
    """Configuration of the relay process, and its privileges. Descriptor: a counter page for the heartbeat alone."""

    rule = Rule((SUPERVISOR_TO_RELAY,), first=True, descriptors=single("heartbeat"))

    config: Config


class RelayWanted(Message, frozen=True):
    """Members wait for calls here, so sessions may have to be relayed: start the relay process, if there is none."""

    rule = Rule((CONTROL_TO_SUPERVISOR,), after=(Ready,))


class RelayArrived(Message, frozen=True):
    """The relay process is there (again). Descriptor: control's end of its channel."""

    rule = Rule((SUPERVISOR_TO_CONTROL,), after=(Ready,), descriptors=single("channel to the relay"))


class RelayHeld(Message, frozen=True):
    """(number, member, member) of every pair the relay process has, told to a new control."""

    rule = Rule((RELAY_TO_CONTROL,), first=True)

    pairs: tuple[tuple[int, str, str], ...]


class RelayPair(Message, frozen=True):
    """Join two sockets until one ends. `members`: whose they are, in the order of the descriptors."""

    rule = Rule((CONTROL_TO_RELAY,), descriptors=Descriptors(2, 2, "two TCP sockets"))

    number: int
    members: tuple[str, str]


class RelayLeave(Message, frozen=True):
    """That pair is not to be relayed any more."""

    rule = Rule((CONTROL_TO_RELAY,))

    number: int


class RelayPairEnded(Message, frozen=True):
    """The pair is no more; `reason` is one line."""

    rule = Rule((RELAY_TO_CONTROL,))

    number: int
    reason: str


class RelayMoved(Message, frozen=True):
    """So many bytes were relayed since it was said last, all pairs and both directions together."""

    rule = Rule((RELAY_TO_CONTROL,))

    bytes: reports.Count


#: Every message, in the order of this module.
ALL: tuple[type[Message], ...] = tuple(Message.__subclasses__())

#: Way -> the messages one of which opens it; none where it has no such message.
OPENERS: dict[Way, tuple[type[Message], ...]] = {
    way: tuple(kind for kind in ALL if kind.rule.first and way in kind.rule.ways)
    for way in dict.fromkeys(way for kind in ALL for way in kind.rule.ways)
}


def table() -> str:
    """docs/messages.md."""
    rows = [
        f"| `{kind.__name__}` | {'<br>'.join(map(str, kind.rule.ways))} | {_when(kind.rule)} "
        f"| {kind.rule.descriptors.text} | {_meaning(kind)} |"
        for kind in ALL
    ]
    return "\n".join([_TABLE_HEAD, *rows]) + "\n"


def _when(rule: Rule) -> str:
    if rule.first:
        return "first"
    openers = dict.fromkeys(opener for way in rule.ways for opener in OPENERS[way])
    after = " and ".join(kind.__name__ for kind in rule.after)
    before = after or " or ".join(kind.__name__ for kind in openers)
    words = [*(["once"] if rule.once else []), *([f"after {before}"] if before else [])]
    return ", ".join(words) or "any time"


def _meaning(kind: type[Message]) -> str:
    """The first paragraph of what its class says."""
    import inspect

    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


_TABLE_HEAD = """\
# Messages between the processes of a node

<!-- Made by `python -m vpnd.api.messages` from the rules there; change them there. -->

What is *first* opens its way: it comes once, and nothing goes that way before it. *After* means on the same channel.
A message that breaks its rule ends the channel: the supervisor kills and restarts a child that sends one, a child that
gets one ends, and the log names the message.

| message | from, to | when | descriptors | meaning |
|---|---|---|---|---|"""

if __name__ == "__main__":
    print(table(), end="")
