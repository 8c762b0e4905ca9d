"""A message of each kind, and a channel on which what a message's rule asks for has gone before it."""

from __future__ import annotations

import os
import socket

import msgspec

from vpnd.api import ends, messages, reports
from vpnd.api.channel import Channel
from vpnd.api.rules import Message, Way
from vpnd.config.schema import Config
from vpnd.session import Established

REPORT = reports.SessionReport(
    peer_id="p", session_id=7, initiator=True, state="up", rtt_ms=None, streams=1, bytes_sent=1,
    bytes_received=2, packets_sent=3, packets_received=4, queued_bytes=0, age_s=1.5,
)  # fmt: skip
PROBE = reports.SessionProbe(
    peer_id="p", session_id=1 << 47, local="192.0.2.1:40001", remote="[2001:db8::2]:4001", rtt_ms=None
)
PEER_REPORT = reports.PeerReport(name="b", peer_id="p", addresses=("/ip4/1.2.3.4/tcp/1",), state="dialing")
OWN = reports.OwnAddresses(
    network="home", label="a", addresses=("10.86.0.1", "fd00::1"), subnets=("10.86.0.0/16", "fd00::/64")
)
SESSION = Established(
    peer_id="p", initiator=False, cipher="aesgcm", send_key=bytes(32), send_nonce=0,
    receive_key=bytes(range(32)), receive_nonce=2, leftover=b"x",
)  # fmt: skip
#: One of each.
MESSAGES: list[Message] = [
    messages.ControlStart(config=Config(), node_name="n", peer_id="p", virtual_ip="10.0.0.1"),
    messages.ShardStart(config=Config(), index=1, own=("10.0.0.1/32",), tun_offloads=3),
    messages.ExporterStart(config=Config()),
    messages.NurseryStart(config=Config(), modules=("shards",)),
    messages.Fork(module="shards"),
    messages.Forked(pid=2, error=""),
    messages.Ready(listen=("/ip4/1.2.3.4/tcp/1",)),
    messages.Failed(kind="MachineError", error="no"),
    messages.Reconfigure(config=Config()),
    messages.NetworkChanged(reason="r", addresses=("10.1.2.3",)),
    messages.OwnChanged(own=OWN),
    messages.OwnPrefixes(own=("10.86.0.1/32",)),
    messages.RoutesKnown(routes=("192.0.2.0/24",)),
    messages.Withheld(routes=("192.0.2.0/24",)),
    messages.NameSockets(udp=2),
    messages.Request(serial=1, command="members", arguments={"name": "b", "uses": 1}),
    messages.Answer(serial=1, result=b"[]"),
    messages.DatagramSocket(number=1, port=4001),
    messages.Stop(drain=True),
    messages.ShardArrived(index=0),
    messages.ShardLeft(index=0),
    messages.ControlArrived(),
    messages.StatusRequest(serial=9),
    messages.ControlStatus(serial=9, listen=(), peers=(PEER_REPORT,), connections=2),
    messages.ShardStatus(serial=9, sessions=(REPORT,), traffic=(reports.PeerTraffic(peer_id="p"),)),
    messages.ProbeRequest(serial=9, destination="fd00::2", protocol=17, port=53),
    messages.ProbeAnswer(
        serial=9, session=PROBE, why="no answer within 2 s", owner="p", flow=reports.FlowReport(state="lane")
    ),
    messages.WalkWanted(serial=3, peer_id="p", address="10.86.0.1"),
    messages.WalkTold(serial=3, content=b"{}"),
    messages.StatusWanted(),
    messages.StatusTold(content=b"{}"),
    messages.PeerKnown(peer_id="p", name="b", prefixes=("10.0.0.2/32",)),
    messages.PeerForgotten(peer_id="p"),
    messages.PeerCircuit(peer_id="p", state="open"),
    messages.SessionsDoubted(peer_id="p"),
    messages.PeersComplete(),
    messages.SessionHandover(session_id=1 << 47, session=SESSION),
    messages.SessionsHeld(sessions=(reports.HeldSession(1, "p", True),)),
    messages.SessionUp(session_id=1, peer_id="p"),
    messages.RelayStart(config=Config()),
    messages.RelayWanted(),
    messages.RelayArrived(),
    messages.RelayHeld(pairs=((1, "p", "q"),)),
    messages.RelayPair(number=1, members=("p", "q")),
    messages.RelayLeave(number=1),
    messages.RelayPairEnded(number=1, reason="both ends have closed"),
    messages.RelayMoved(bytes=1 << 40),
    messages.SessionDown(session_id=1, peer_id="p", reason="gone"),
    messages.SessionWanted(peer_id="p"),
    messages.SegmentsStuck(peer_id="p"),
    messages.OwnersAsked(networks=("10.86.0.0/16",)),
    messages.OwnerWanted(address=0x0A560002),
]  # fmt: skip
SAMPLES = {type(message): message for message in MESSAGES}


class Pair:
    """Two roles and what they have said; each message is preceded by what its rule says must go before it."""

    def __init__(self, way: Way) -> None:
        self.raw = dict(zip(way, ends.pair(), strict=True))
        self.ends = {
            here: Channel(self.raw[here], here, there) for here, there in (way, (way.receiver, way.sender))
        }
        self.said: set[type[Message]] = set()

    def prepare(self, way: Way, kind: type[Message]) -> None:
        """All that has to go before a message of `kind`."""
        for before in (*messages.OPENERS[way][:1], *kind.rule.after):
            if before not in self.said and not kind.rule.first:
                self.pass_on(before)

    def pass_on(self, kind: type[Message]) -> None:
        way = next(way for way in kind.rule.ways if set(way) == self.ends.keys())
        self.prepare(way, kind)
        self.send(way, SAMPLES[kind])
        received = self.ends[way.receiver].receive()
        assert received is not None and received[0] == SAMPLES[kind]
        for fd in received[1]:
            os.close(fd)

    def send(self, way: Way, message: Message, more: int = 0) -> None:
        self.said.add(type(message))
        count = type(message).rule.descriptors.least + more
        self.ends[way.sender].send(message, (self.raw[way.sender].fileno(),) * count)

    def send_raw(self, way: Way, message: Message, more: int = 0) -> None:
        """Past the rules of the sending end."""
        fds = [self.raw[way.sender].fileno()] * (type(message).rule.descriptors.least + more)
        socket.send_fds(self.raw[way.sender], [msgspec.msgpack.encode(message)], fds)

    def close(self) -> None:
        for end in self.ends.values():
            end.close()
