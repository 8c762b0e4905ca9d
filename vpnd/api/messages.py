"""Every message between the processes of a node.

Three kinds of channel, each a SOCK_SEQPACKET socketpair (`vpnd.api.channel`); one datagram is one
message, msgpack, tagged by the Struct's name, with the descriptors it speaks of:

    S  supervisor      C  control      H  shard

    message          from to   when                                             descriptors
    ---------------  --------  -----------------------------------------------  --------------------------------
    ControlStart     S -> C    once, first                                      identity file, counter page
    ShardStart       S -> H    once, first                                      see ShardStart
    Ready            C,H -> S  once, as the answer to Start                     -
    Failed           C,H -> S  instead of Ready; the sender then exits          -
    Reconfigure      S -> C,H  after Ready: settings changed                    -
    NetworkChanged   S -> C,H  after Ready: addresses or routes changed         -
    Stop             S -> C,H  once, last; the receiver exits                   -
    ShardArrived     S -> C    after Ready                                      channel C-H
    ShardLeft        S -> C    after ShardArrived of that index                 -
    ControlArrived   S -> H    after Ready, again after each control restart    channel C-H
    OwnChanged       C -> S    after Ready: other virtual addresses of ours     -
    OwnPrefixes      S -> H    after Ready: what packets may be addressed to    -
    RoutesKnown      C -> S    after Ready: networks that members announce      -
    NameSockets      S -> C    after Ready, again after each control restart    UDP sockets, then TCP
    Request          S -> C    after Ready: a command of the user               -
    Answer           C -> S    answer to Request                                -
    StatusRequest    S -> C,H  after Ready                                      -
    ControlStatus    C -> S    answer to StatusRequest                          -
    ShardStatus      H -> S    answer to StatusRequest                          -
    ProbeRequest     S -> H    after Ready: `vpnd ping` asks                    -
    ProbeAnswer      H -> S    answer to ProbeRequest                           -
    PeerKnown        C -> H    all peers first, then on every change            -
    PeerForgotten    C -> H    after PeerKnown of that peer                     -
    PeerCircuit      C -> H    after PeerKnown of that peer, on every change     -
    PeerDialed       C -> H    after PeerKnown of that peer, on every dial      -
    PeersComplete    C -> H    after the first PeerKnowns of a channel          -
    OwnersAsked      C -> H    before all PeerKnowns, if addresses have owners  -
    SessionHandover  C -> H    after PeerKnown of that peer                     the TCP socket
    SessionsHeld     H -> C    once, first: what a shard has when control came  -
    SessionUp        H -> C    a stream of a handed-over session is open        -
    SessionDown      H -> C    a session has ended                              -
    SessionWanted    H -> C    a shard wants (more) sessions with a peer        -
    OwnerWanted      H -> C    after OwnersAsked: packets for an address of it  -

`vpnd.api.permitted` is this table as data; a message outside it is fatal to the sender's channel.
"""

from __future__ import annotations

import msgspec

from vpnd.api.reports import (
    NetworkReport,
    OwnAddresses,
    PeerReport,
    PeerTraffic,
    SessionProbe,
    SessionReport,
)
from vpnd.config.schema import Config


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of all messages."""


class ControlStart(Message, frozen=True):
    """Configuration and privileges of control.

    Descriptors: identity file (read only), counter page, and where the node is in a network, or is to make or
    join one, the directory of what it keeps of it, which belongs to process.user. `virtual_ip` is empty then: it
    comes with Ready.
    `token`: of `start --join`, used once, when the directory is empty.
    """

    config: Config
    node_name: str
    peer_id: str
    virtual_ip: str
    token: str = ""

    def __repr__(self) -> str:  # a token is a secret
        return f"ControlStart(peer_id={self.peer_id!r})"


class ShardStart(Message, frozen=True):
    """Configuration of one shard.

    Descriptors, in order: memory of the ring to the shard, its wake-up eventfd, the counter page, the TUN (only to be
    written to). `own` are the prefixes packets from peers may be addressed to. `tun_offloads` are the `Offload` bits of
    this node's TUN, announced to peers.
    """

    config: Config
    index: int
    own: tuple[str, ...]
    tun_offloads: int


class Ready(Message, frozen=True):
    """The child works. `listen`: control's addresses, without the /p2p part; empty from shards. `own`: what the node is
    in its network; None from shards, and of a node whose peers are all configured by hand.
    """

    listen: tuple[str, ...] = ()
    own: OwnAddresses | None = None


class Failed(Message, frozen=True):
    """The child cannot work. `error` is one line for the user; `kind` the VpndError class it stands for."""

    kind: str
    error: str


class Reconfigure(Message, frozen=True):
    """The configuration from now on; only what vpnd.config.changes names differs from the one before."""

    config: Config


class NetworkChanged(Message, frozen=True):
    """Addresses or routes of the machine changed, or it was suspended: look after every connection now.

    `addresses`: all local IP addresses, without prefix length, those of the TUN not among them.
    """

    reason: str
    addresses: tuple[str, ...]


class OwnChanged(Message, frozen=True):
    """The node has other virtual addresses, or may announce other networks, from now on."""

    own: OwnAddresses


class OwnPrefixes(Message, frozen=True):
    """Packets from peers may be addressed to these, and to nothing else, from now on."""

    own: tuple[str, ...]


class RoutesKnown(Message, frozen=True):
    """Networks that members announce and this node wants: to be routed into the TUN, instead of those before.

    `exit_peer`: the member all other traffic goes through, by network.exit_node; empty: none.
    """

    routes: tuple[str, ...]
    exit_peer: str = ""


class NameSockets(Message, frozen=True):
    """DNS is to be answered on these bound sockets. Descriptors: `udp` UDP sockets, then as many TCP ones."""

    udp: int


class Request(Message, frozen=True):
    """A command of the user that control carries out: invite, members, remove … (vpnd/control/requests.py)."""

    serial: int
    command: str
    arguments: dict[str, str | int | float | bool | None]

    def __repr__(self) -> str:  # arguments may hold secrets
        return f"Request({self.serial}, {self.command})"


class Answer(Message, frozen=True):
    """What came of a Request: JSON for the command line; or `error`, a line for the user, and the VpndError
    class `kind`. `more`: as in ControlStatus."""

    serial: int
    result: bytes = b"{}"
    error: str = ""
    kind: str = ""
    more: bool = False

    def __repr__(self) -> str:  # an invitation is a secret
        return f"Answer({self.serial}, error={self.error!r})"


class Stop(Message, frozen=True):
    """End, cleanly. `drain` (shards only): the ring gets no more; first send what is in it and in the queues."""

    drain: bool = False


class ShardArrived(Message, frozen=True):
    """Shard `index` (new or restarted) can take sessions. Descriptor: control's end of its channel."""

    index: int


class ShardLeft(Message, frozen=True):
    """Shard `index` is gone, and its sessions with it."""

    index: int


class ControlArrived(Message, frozen=True):
    """Control is there (again). Descriptor: the shard's end of its channel."""


class StatusRequest(Message, frozen=True):
    """Tell how you are; `serial` comes back in the answer."""

    serial: int


class ControlStatus(Message, frozen=True):
    """Control's answer to StatusRequest. `more`: it goes on in the next one; see vpnd.api.parts. `warnings`: what the
    user should know, a line each.
    """

    serial: int
    listen: tuple[str, ...]
    peers: tuple[PeerReport, ...]
    connections: int
    network: NetworkReport | None = None
    warnings: tuple[str, ...] = ()
    more: bool = False


class ShardStatus(Message, frozen=True):
    """A shard's answer to StatusRequest. Counts live in the counter page, not here. `more`: as in ControlStatus."""

    serial: int
    sessions: tuple[SessionReport, ...]
    traffic: tuple[PeerTraffic, ...]
    more: bool = False


class ProbeRequest(Message, frozen=True):
    """Measure the session that carries pings (ICMP echo requests) to this IP address."""

    serial: int
    destination: str


class ProbeAnswer(Message, frozen=True):
    """What came of a ProbeRequest, at the latest after health.timeout. `session` None: none carries that flow; `why`
    says so, or why the session was not measured, in one line."""

    serial: int
    session: SessionProbe | None = None
    why: str = ""


class PeerKnown(Message, frozen=True):
    """A peer and the prefixes it may send from; replaces what was known of the peer id."""

    peer_id: str
    name: str
    prefixes: tuple[str, ...]


class PeerForgotten(Message, frozen=True):
    """No longer a peer: close its sessions, drop its packets."""

    peer_id: str


class PeerCircuit(Message, frozen=True):
    """The peer's circuit breaker is `state` now: closed, open or half_open; closed is what it is until told."""

    peer_id: str
    state: str


class PeerDialed(Message, frozen=True):
    """The peer made a session, which another shard has got: perhaps those it had are gone. Look after them."""

    peer_id: str


class PeersComplete(Message, frozen=True):
    """All peers have been told: what was known before this channel and not told again is forgotten."""


class OwnersAsked(Message, frozen=True):
    """Of these networks single addresses have owners, and nobody has what is in them because of a network around it.
    Who owns an address that no peer has may be asked for (OwnerWanted)."""

    networks: tuple[str, ...]


class SessionHandover(Message, frozen=True):
    """An established libp2p session, Noise handshake done and muxer id agreed, now the shard's.

    `cipher`: chachapoly or aesgcm, as vpnd.adapter.cipher names them. `send_key`, `receive_key`: 32 bytes
    each; nonces: the next ones to use. `leftover`: plaintext received behind the muxer negotiation, to be
    parsed first. Descriptor: the TCP socket, non-blocking.
    """

    session_id: int
    peer_id: str
    initiator: bool
    cipher: str
    send_key: bytes
    send_nonce: int
    receive_key: bytes
    receive_nonce: int
    leftover: bytes

    def __repr__(self) -> str:  # keys never reach a log
        return f"SessionHandover(session_id={self.session_id}, peer_id={self.peer_id!r})"


class SessionsHeld(Message, frozen=True):
    """(session id, peer id, initiator) of every session the shard has, told to a new control."""

    sessions: tuple[tuple[int, str, bool], ...]


class SessionUp(Message, frozen=True):
    """A stream of the session is open: packets flow."""

    session_id: int
    peer_id: str


class SessionDown(Message, frozen=True):
    """The session has ended; `reason` is one line. `failed`: not by anybody's will, which counts against the peer."""

    session_id: int
    peer_id: str
    reason: str
    failed: bool = True


class SessionWanted(Message, frozen=True):
    """This shard wants to have `sessions` sessions with the peer, from now until it says another number.

    `urgent`: packets wait, so no backoff holds up the dial.
    """

    peer_id: str
    sessions: int = 1
    urgent: bool = True


class OwnerWanted(Message, frozen=True):
    """Packets are for an IPv4 address that no peer has; `address` is its number. A PeerKnown may come of it."""

    address: int


Any = (
    ControlStart
    | ShardStart
    | Ready
    | Failed
    | Reconfigure
    | NetworkChanged
    | OwnChanged
    | OwnPrefixes
    | RoutesKnown
    | NameSockets
    | Request
    | Answer
    | Stop
    | ShardArrived
    | ShardLeft
    | ControlArrived
    | StatusRequest
    | ControlStatus
    | ShardStatus
    | ProbeRequest
    | ProbeAnswer
    | PeerKnown
    | PeerForgotten
    | PeerCircuit
    | PeerDialed
    | PeersComplete
    | SessionHandover
    | SessionsHeld
    | SessionUp
    | SessionDown
    | SessionWanted
    | OwnersAsked
    | OwnerWanted
)
