"""A few nodes, the network between them, and the account of every packet.

What must hold, whatever happens and in whatever order (`check`, `arrived`, `conclude`):

    once       no packet arrives twice
    order      a packet is overtaken by a later one of its flow only in datagrams, or if the connection it came over had
               been given up by its sender: a fault was done to it, it had ended by one, or its peer was moved or
               forgotten
    loss       every connection nothing was done to delivers everything that was sealed for it, when it has ended too
    books      at every node: what came = what was sent, dropped under a reason, and waits
    limits     each side begins no more sessions and streams than it may
    leaks      both ends of a connection agree on its streams; no flow is pinned to a lane that is gone; nothing is
               held back when all is calm
    progress   when nothing is wrong any more, every pair of nodes that know each other can talk
    justice    between two nodes of which nothing bad happened to their connections, every packet of a small flow
               arrives soon
"""

from __future__ import annotations

from collections import defaultdict
from random import Random

from shards.session.link import Link
from simulation.clock import VirtualLoop
from simulation.network import Connection, Network
from simulation.node import Node
from simulation.packets import LEAST_BYTES, ORDERED_FROM, record
from vpnd.config.schema import Config
from vpnd.control.dialstate import Dial
from vpnd.discovery.registry import Member
from vpnd.metrics import DROP_REASONS, OUTBOUND_DROPS
from vpnd.session import Established

#: Ports of flows that send little, and whose packets must not wait for long.
SMALL_PORTS = range(1, 4)
#: A handshake takes so many ways through the network.
HANDSHAKE_TRIPS = 6
#: Ends by which nothing is lost, unless the session failed: what the side that ends it says, and what the other
#: side says.
GRACEFUL = ("replaced", "closed by the peer", "receive: ", "send: ")

Flow = tuple[str, str, int]


class World:
    """`random` plays everything that is left to chance. Within `loop.running()` only."""

    #: how long a message takes between a shard and its control
    channel_s = 0.001

    def __init__(self, random: Random, *, delay_s: float, rate: float, buffer: int = 1 << 17) -> None:
        self.random = random
        self.loop = VirtualLoop()
        self.network = Network(self.loop, random, delay_s=delay_s, rate=rate, buffer=buffer)
        self.nodes: dict[str, Node] = {}
        self.packets = 0
        self._numbers: dict[Flow, int] = defaultdict(int)
        self._highest: dict[Flow, int] = {}
        self._arrived: dict[Flow, set[int]] = defaultdict(set)
        self._sent_s: dict[tuple[str, str, int, int], float] = {}
        self._links: dict[Connection, dict[str, Link]] = defaultdict(dict)
        self.given_up: set[Connection] = set()
        #: pairs of nodes about which it cannot be said that packets arrive soon
        self.troubled: set[frozenset[str]] = set()
        #: packets of a flow that came in datagrams
        self.in_datagrams: dict[Flow, int] = defaultdict(int)
        self.slowest_s = 0.0
        self.log: list[str] = []

    def note(self, text: str) -> None:
        """For who looks at a run that failed."""
        self.log.append(f"{self.loop.now_s - 1000.0:9.4f} {text}")

    def add(self, name: str, config: Config) -> Node:
        index = len(self.nodes) + 1
        node = self.nodes[name] = Node(self, name, f"10.86.0.{index}", f"192.0.2.{index}", config)
        return node

    def introduce(self) -> None:
        """Everybody knows everybody."""
        for node in self.nodes.values():
            for other in self.nodes.values():
                if node is not other:
                    node.know(self.member(other))

    @staticmethod
    def member(node: Node) -> Member:
        return Member(
            peer_id=node.name,
            name=node.name,
            prefixes=(f"{node.address}/32",),
            addresses=(f"/ip4/{node.place}/tcp/4001",),
        )

    def in_trouble(self, node: Node, peer_id: str) -> bool:
        """Whether something bad has happened between a node and a peer."""
        return frozenset((node.name, peer_id)) in self.troubled

    # --- packets

    def send(self, source: Node, destination: Node, port: int, count: int, size: int) -> None:
        """`count` packets of one flow at once."""
        self.send_many(source, destination, [port] * count, size)

    def send_many(self, source: Node, destination: Node, ports: list[int], size: int) -> None:
        """One packet for each, in this order, at once."""
        records = []
        for port in ports:
            flow = source.name, destination.name, port
            number = self._numbers[flow]
            self._numbers[flow] += 1
            self._sent_s[(*flow, number)] = self.loop.now_s
            records.append(record(source.source, destination.source, port, number, max(size, LEAST_BYTES)))
        self.packets += len(ports)
        source.send(records)

    def arrived(
        self, node: Node, what: tuple[int, int, int], connection: Connection, in_datagrams: bool
    ) -> None:
        """A packet for `node` came over a connection, or in a datagram beside it."""
        address, port, number = what
        source = next(other for other in self.nodes.values() if other.source == address)
        assert connection.pair == {source.name, node.name}, "a packet came from somebody else"
        flow = source.name, node.name, port
        assert number not in self._arrived[flow], f"{flow}: packet {number} came twice"
        self._arrived[flow].add(number)
        highest = self._highest.get(flow, -1)
        self.in_datagrams[flow] += in_datagrams
        disordered = source.live.config.carrier.choice != "streams" and port < ORDERED_FROM
        may_overtake = in_datagrams or disordered
        given_up = connection in self.given_up or connection.faulted
        if number < highest and not may_overtake and not given_up:
            raise AssertionError(f"{flow}: packet {number} was overtaken by {highest}")
        self._highest[flow] = max(highest, number)
        if port in SMALL_PORTS and connection.pair not in self.troubled:
            self.slowest_s = max(self.slowest_s, self.loop.now_s - self._sent_s[(*flow, number)])

    def last_arrived(self, source: Node, destination: Node, port: int) -> bool:
        """Whether the last packet of a flow is there."""
        flow = source.name, destination.name, port
        return self._numbers[flow] - 1 in self._arrived[flow]

    # --- sessions

    def dial(self, node: Node, dial: Dial) -> None:
        """From the decision to dial to the hand-over of the session, or to the error."""
        other = self.nodes[dial.member.peer_id]
        address = f"/ip4/{other.place}/tcp/4001"
        connects = self.network.connects(node.name, other.name)
        reachable = address in dial.member.addresses and connects
        if not reachable or node.name not in other.members or not other.room(node.name):
            wait_s = self.network.delay_s * 2 if reachable else node.live.config.p2p.connect_timeout
            self.loop.call_later(wait_s, node.dialed, dial, None, None)
            return
        wait_s = HANDSHAKE_TRIPS * self.network.delay_s * self.random.uniform(1.0, 1.5)
        self.loop.call_later(wait_s, self._connect, node, other, dial)

    def _connect(self, node: Node, other: Node, dial: Dial) -> None:
        if not self.network.connects(node.name, other.name) or node.name not in other.members:
            node.dialed(dial, None, None)
            return
        connection = self.network.connect(node.name, (node.place, other.place), other.name)
        keys = self.random.randbytes(32), self.random.randbytes(32)
        if not node.dialed(dial, self._established(other.name, keys, initiator=True), connection):
            connection.ends[0].close(discard=False)
        self.loop.call_later(self.network.delay_s, self._accept, other, node, keys, connection)

    def _accept(self, node: Node, dialer: Node, keys: tuple[bytes, bytes], connection: Connection) -> None:
        if dialer.name in node.members and node.room(dialer.name):
            node.take(self._established(dialer.name, keys[::-1], initiator=False), connection, 1)
        else:
            connection.ends[1].close(discard=False)

    @staticmethod
    def _established(peer_id: str, keys: tuple[bytes, bytes], *, initiator: bool) -> Established:
        return Established(
            peer_id=peer_id, initiator=initiator, cipher="aesgcm",
            send_key=keys[0], send_nonce=0, receive_key=keys[1], receive_nonce=0, leftover=b"",
        )  # fmt: skip

    def opened(self, node: Node, link: Link, connection: Connection) -> None:
        """A shard has taken a session."""
        self._links[connection][node.name] = link
        self.note(f"{node.name}: session {link.session_id & 0xFFFF} with {link.peer.name}")

    def closed(self, node: Node, link: Link, reason: str, failed: bool) -> None:
        """A shard has ended a session."""
        connection = node.connections[link.session_id]
        self.note(f"{node.name}: session {link.session_id & 0xFFFF} with {link.peer.name}: {reason}")
        if not reason.startswith(GRACEFUL) and not failed:
            self.given_up.add(connection)
        elif failed and connection not in self.given_up and not connection.faulted:
            accepted = all(name in self._links[connection] for name in connection.nodes)
            assert not accepted, f"a session failed though nothing was done to it: {reason}"

    # --- what must hold

    def check(self) -> None:
        """At any moment."""
        for node in self.nodes.values():
            node.check()

    def conclude(self) -> None:
        """When everything is calm and nothing waits."""
        self.check()
        for node in self.nodes.values():
            assert node.plane.queued() == 0, f"{node.name}: something still waits"
            for peer in node.plane.peers:
                assert not peer.pool._reordering, f"{node.name}: something is still held back"
        inbound = set(DROP_REASONS) - set(OUTBOUND_DROPS)
        for connection, links in self._links.items():
            if len(links) == 2:
                self._compare(connection, *links.values())
        for node in self.nodes.values():
            if not self.given_up:
                assert not any(node.plane.counts.drops[reason] for reason in inbound), (
                    "dropped at the receiver"
                )

    def _compare(self, connection: Connection, one: Link, other: Link) -> None:
        """The two ends of a connection."""
        assert one.closed == other.closed, "one end is open, the other is not"
        if not (one.closed or one.opening or other.opening):
            streams = {lane.stream.id for lane in one.lanes}
            assert streams == {lane.stream.id for lane in other.lanes}, "the ends disagree on their streams"
        if connection not in self.given_up and not connection.faulted:
            for sender, receiver in ((one, other), (other, one)):
                beside = receiver.beside.reassembly.packets if receiver.beside is not None else 0
                lost = sender.packets_sent - (receiver.traffic().packets_received - beside)
                assert not lost, f"{lost} packets were lost in a session that did not fail"
