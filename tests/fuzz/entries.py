"""A fuzz entry for each function that reads bytes of strangers, peers or children: what goes in, and what may come out.

An entry takes any bytes; what it raises beside `errors` is a fault of the product. `covers` are the `*_untrusted`
functions it runs, by module and name: the seeds reach all of them, which a test looks at.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Coroutine
from ipaddress import ip_address
from random import Random
from typing import Any, NamedTuple

import dns.message
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from datagram.pair import HERE, datagrams
from datagram.pair import Net as DatagramNet
from gossip_net import Net
from lab.stranger import RSA, field, honest, public_key, rsa_bomb
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import IncompleteReadError, MessageTooLarge
from libp2p.kad_dht.pb.kademlia_pb2 import Message as TableMessage
from libp2p.security.noise.exceptions import NoiseFailure
from membership_world import NETWORK, NOW, SKEW, World, membership, peer, presence
from names_tools import make_zone
from noise.connection import Keypair, NoiseConnection
from packet.builder import V4, V6, ip, tcp, udp, vnet
from packet.builder import record as framed
from packet.test_offload_slices import sliced
from stream.pair import HELLO_A, OPENING, Peer

from shards.counters import Counts
from shards.flow.prefixes import Prefixes
from shards.inbound import Inbound, Reassembly
from shards.session.bare import BareFrames, BareInbound
from shards.stream import negotiate, yamux
from supervisor.network.hosts import lines_untrusted
from vpnd import why
from vpnd.adapter import framing, identify, muxer, noise
from vpnd.api.reports import OwnAddresses
from vpnd.cli.capture import Wanted
from vpnd.cli.top import flow_untrusted
from vpnd.config.schema import Session as Settings
from vpnd.discovery import contract, localnet
from vpnd.discovery.contract import RegistryError
from vpnd.discovery.records import RecordRules, dht_key
from vpnd.errors import BadPacket, ProtocolViolation, RemoteProtocolError
from vpnd.membership import enrolment, introduction, messages, network, statements, token
from vpnd.membership.refusal import MembershipRefused
from vpnd.metrics import Drops
from vpnd.nat import messages as meeting
from vpnd.nat import portmap
from vpnd.packet import icmp
from vpnd.packet.offload import check
from vpnd.packet.offload.slices import SLICE, Joiner
from vpnd.packet.record import LENGTH, VNET_BYTES
from vpnd.page.process import Refused, check_host_untrusted, check_token_untrusted
from vpnd.peerid import public_key_untrusted


class Entry(NamedTuple):
    """`run`: what is done with the bytes. `seeds`: bytes that get far."""

    run: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]
    covers: tuple[str, ...]


class Memory:
    """A stream that has these bytes in it, and then its end; what is written is gone."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read(self, count: int | None = None) -> bytes:
        taken, self.data = self.data[:count], self.data[len(self.data) if count is None else count :]
        return taken

    async def write(self, data: bytes) -> None:
        return


def at_once(coroutine: Coroutine[Any, Any, object]) -> object:
    """What a coroutine comes to that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


def text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("latin-1"))


NET = Net("a")
NET.directories["a"].merge([membership("x").wire], NOW)


def gossip(data: bytes) -> None:
    """What is told there adds nothing: a signature cannot be guessed."""
    node = NET.gossip("a")
    node.connected("b", NOW, dialed=True)
    node.receive_untrusted("b", data, NOW)


def record(data: bytes) -> None:
    rules = RecordRules({peer("a"): -1}.get, SKEW, SKEW)
    rules.check_untrusted(dht_key(peer("a")), data, NOW)
    rules.best_untrusted([data, data])


ZONE = make_zone()
KEYS = create_new_key_pair()


def zone(data: bytes) -> None:
    for over_tcp in (False, True):
        answer = ZONE.answer_untrusted(data, tcp=over_tcp)
        if answer is not None:
            dns.message.from_wire(answer)


#: Of superpackets, as they lie in a datagram.
SLICES = [
    *sliced(framed(vnet(tcp(V4, bytes(3000)), gso_size=1000))),
    *sliced(framed(vnet(udp(V6, bytes(3000)), gso_size=500))),
    LENGTH.pack(SLICE) + vnet(tcp(V4, b"")),
]
#: Plaintext of one Noise message.
NOISE_BYTES = 1 << 14


class Unlimited:
    """Of what a peer may leave unfinished nothing is counted here; that has tests of its own."""

    def hold(self, count: int) -> None:
        return


def datagram(data: bytes) -> None:
    """A datagram of anybody, and the same bytes as the body of one that the peer has sealed."""
    sender, receiver = DatagramNet(Random(1)).ends
    receiver.association.deliver = lambda records: None
    receiver.take([data], HERE)
    body = (data + bytes(4))[: 1 << 16]
    sender.association._sealer.seal(sender.batch, body)
    sender.association._sealer.seal(sender.batch, body)
    receiver.take(datagrams(sender.batch), HERE, marked=len(data) % 2 == 0)


def slices(data: bytes) -> None:
    joiner = Joiner()
    with memoryview(data) as view:
        joiner.begin_untrusted(0, 0, view)
        joiner.append_untrusted(view)
    joiner.finish()


ANYBODY: Prefixes[bool] = Prefixes()
ANYBODY.add("0.0.0.0/0", True)
INBOUND = Inbound(lambda packet: None, ANYBODY, Counts())


def tun(data: bytes) -> None:
    reassembly = Reassembly(Unlimited(), Drops())  # type: ignore[arg-type]
    half = len(data) // 2
    for part in (data[:half], data[half:]):
        with memoryview(part) as view:
            INBOUND.deliver_untrusted(ANYBODY, reassembly, view, 64)


def quoted(data: bytes) -> None:
    """An ICMP error, of which IP's part has been looked at."""
    view = memoryview(data)
    check.inspect_untrusted(view, 0, len(view))
    icmp.quoted_untrusted(view[VNET_BYTES:])


def bare(data: bytes) -> None:
    inbound = BareInbound(INBOUND)
    frames = BareFrames(Unlimited(), Drops(), lambda: None)  # type: ignore[arg-type]
    half = len(data) // 2
    for part in (data[:half], data[half:]):
        with memoryview(part) as view:
            reached = 0
            while reached < len(view):
                reached += inbound.deliver_untrusted(ANYBODY, frames, view[reached:], 2)[0]


def session(data: bytes) -> None:
    Peer().say(*(data[at : at + NOISE_BYTES] for at in range(0, len(data), NOISE_BYTES)))


SHAKE = noise.MembersOnlyNoise(
    create_new_key_pair(), lambda peer_id: True, lambda peer_id: None, lambda peer_id: False
)


def handshake(data: bytes) -> None:
    """What a stranger sends from the first message of Noise on; it is ours that makes the third one readable."""
    at_once(SHAKE._shake_hands_untrusted(Memory(data), None))  # type: ignore[arg-type]


WORLD = World()
WORLD.enrol("b")
INTRODUCED = introduction.of_member(WORLD.directory, peer("b"))
assert INTRODUCED is not None
KINDS = (
    meeting.Hello,
    meeting.Welcome,
    meeting.Call,
    meeting.Gone,
    meeting.Meet,
    meeting.Met,
    meeting.Refused,
    meeting.Reach,
    meeting.Seen,
    meeting.Here,
)
PCP_ANSWER = (
    b"\x02\x81\x00\x00"
    + bytes(20)
    + bytes(12)
    + b"\x06\x00\x00\x00\x0f\xa1\x0f\xa1"
    + bytes(10)
    + b"\xff" * 6
)


def port_of(data: bytes) -> object:
    """What NAT-PMP grants for a port."""
    return portmap.pmp_answer_untrusted(data, 4001)


PEER = peer("a")
ADDRESS = "/ip4/192.0.2.1/tcp/4001"
TOKEN = token.Token(
    network=NETWORK.id[: token.HINT_BYTES], peer_id=PEER, addresses=(ADDRESS,), secret=bytes(16)
)
GOSSIP = (
    messages.Summary(1, NETWORK.id, bytes(16)),
    messages.Buckets(bytes(range(256)) * 8),
    messages.Entries(b"\x01\x02", bytes(32)),
    messages.Announce(bytes(16)),
    messages.Wants(bytes(8)),
    messages.Statements((membership("x").wire, b"junk")),
)
PACKETS = tuple(vnet(packet) for packet in (udp(V4, b"x"), tcp(V4, b"x"), udp(V6, b"x"), tcp(V6, b"")))
RECORDS = b"".join(struct.pack("!I", len(packet)) + packet for packet in PACKETS)
FRAMES = (
    yamux.window_update(1, 0, 1),
    yamux.data_frame(1, OPENING),
    yamux.ping(7, 1),
    yamux.window_update(1, 100),
    yamux.data_frame(1, RECORDS),
    yamux.go_away(0),
)

OPENED = b"".join(FRAMES[:2])
#: More frames than a peer may send at once.
BURST = Settings().control_burst + 1


def abi_string(data: bytes) -> bytes:
    padded = data + bytes(-len(data) % 32)
    returned = (32).to_bytes(32, "big") + len(data).to_bytes(32, "big") + padded
    return json.dumps({"jsonrpc": "2.0", "id": 1, "result": "0x" + returned.hex()}).encode()


def first_message() -> bytes:
    initiator = NoiseConnection.from_name(noise.NOISE_PROTOCOL)
    initiator.set_as_initiator()
    initiator.set_keypair_from_private_bytes(Keypair.STATIC, bytes([1]) * 32)
    initiator.start_handshake()
    message = bytes(initiator.write_message(b""))
    return struct.pack("!H", len(message)) + message


TABLE = TableMessage(key=b"k", closerPeers=[TableMessage.Peer(id=b"x", addrs=[b"y"])]).SerializeToString()
ENDS = (IncompleteReadError,)
REFUSED = (MembershipRefused,)
ENTRIES = {
    "peer id": Entry(
        text(public_key_untrusted), (ValueError,), (PEER.encode(),), ("vpnd.peerid.public_key_untrusted",)
    ),
    "token": Entry(
        text(token.parse_untrusted),
        REFUSED,
        (token.encode(TOKEN).encode(),),
        ("vpnd.membership.token.parse_untrusted",),
    ),
    "statement": Entry(
        statements.parse_untrusted,
        REFUSED,
        (membership("x").wire, presence("x").wire, WORLD.root.remove(peer("b"), NOW).wire),
        ("vpnd.membership.statements.parse_untrusted",),
    ),
    "network": Entry(
        network.parse_untrusted, REFUSED, (NETWORK.encode(),), ("vpnd.membership.network.parse_untrusted",)
    ),
    "gossip": Entry(
        gossip,
        REFUSED,
        tuple(map(messages.encode, GOSSIP)),
        ("vpnd.membership.gossip.receive_untrusted", "vpnd.membership.messages.parse_untrusted"),
    ),
    "request to be let in": Entry(
        enrolment.parse_request_untrusted,
        REFUSED,
        (
            enrolment.encode(enrolment.Renew(NETWORK.id)),
            enrolment.encode(enrolment.Join(bytes(enrolment.SECRET_BYTES), "b")),
        ),
        ("vpnd.membership.enrolment.parse_request_untrusted",),
    ),
    "answer to it": Entry(
        enrolment.parse_answer_untrusted,
        REFUSED,
        (enrolment.encode(enrolment.Refusal(reason="removed", text="no", statements=(b"x",))),),
        (
            "vpnd.membership.enrolment.parse_answer_untrusted",
            "vpnd.membership.enrolment.decode_answer_untrusted",
            "vpnd.membership.refusal.decode_untrusted",
        ),
    ),
    "introduction": Entry(
        introduction.parse_request_untrusted,
        REFUSED,
        (introduction.encode(INTRODUCED),),
        ("vpnd.membership.introduction.parse_request_untrusted",),
    ),
    "answer to an introduction": Entry(
        introduction.parse_answer_untrusted,
        REFUSED,
        (introduction.encode(introduction.Acquainted(INTRODUCED.statements)),),
        ("vpnd.membership.introduction.parse_answer_untrusted",),
    ),
    "record of the table": Entry(
        record,
        REFUSED,
        (presence("a").wire,),
        ("vpnd.discovery.records.check_untrusted", "vpnd.discovery.records.best_untrusted"),
    ),
    "answer of a contract": Entry(
        lambda data: contract.parse_answer_untrusted(data, 1),
        (RegistryError,),
        (abi_string(PEER.encode()), abi_string(b"")),
        (
            "vpnd.discovery.contract.parse_answer_untrusted",
            "vpnd.discovery.contract._string_untrusted",
            "vpnd.discovery.contract._peer_id_untrusted",
        ),
    ),
    "multicast DNS": Entry(
        localnet.parse_untrusted,
        (RemoteProtocolError,),
        (localnet.question(), localnet.answer(NETWORK.id, bytes(localnet.SALT_BYTES), PEER, 4001)),
        ("vpnd.discovery.localnet.parse_untrusted", "vpnd.discovery.localnet._hex_untrusted"),
    ),
    "DNS query": Entry(
        zone,
        (),
        (dns.message.make_query("a.home.vpn.", "ANY", use_edns=0, payload=4096).to_wire(),),
        ("vpnd.names.zone.answer_untrusted",),
    ),
    "meeting": Entry(
        lambda data: meeting.parse_untrusted(data, *KINDS),
        (RemoteProtocolError,),
        tuple(map(meeting.encode, (meeting.Hello("kept"), meeting.Meet(bytes(16), PEER)))),
        ("vpnd.nat.messages.parse_untrusted",),
    ),
    "port map by PCP": Entry(
        lambda data: portmap.pcp_answer_untrusted(data, bytes(12), 4001),
        (RemoteProtocolError,),
        (PCP_ANSWER, b"\x02\x81\x00\x02" + bytes(20)),
        ("vpnd.nat.portmap.pcp_answer_untrusted",),
    ),
    "announcement of a router": Entry(
        portmap.is_announcement_untrusted,
        (),
        (b"\x00\x80" + bytes(10), b"\x02\x80" + bytes(22)),
        ("vpnd.nat.portmap.is_announcement_untrusted",),
    ),
    "port map by NAT-PMP": Entry(
        lambda data: (portmap.pmp_address_untrusted if len(data) == 12 else port_of)(data),
        (RemoteProtocolError,),
        (b"\x00\x80" + bytes(10), b"\x00\x82" + bytes(6) + b"\x0f\xa1\x0f\xa1" + bytes(4)),
        (
            "vpnd.nat.portmap.pmp_address_untrusted",
            "vpnd.nat.portmap.pmp_answer_untrusted",
            "vpnd.nat.portmap._pmp_result_untrusted",
        ),
    ),
    "why": Entry(
        lambda data: [why.said_untrusted(data, kind) for kind in (why.Greeting, why.Question, why.Told)],
        (RemoteProtocolError,),
        (msgspec.json.encode(why.Told(steps=(why.Step(name="route"),), dropped={"too_big": 1})), b"{}"),
        ("vpnd.why.said_untrusted",),
    ),
    "packet of a flow": Entry(
        lambda data: flow_untrusted(memoryview(data)[:64], True),
        (),
        (tcp(V4, b"data"), udp(V6, b"data")),
        ("vpnd.cli.top.flow_untrusted",),
    ),
    "captured packet": Entry(
        lambda data: Wanted(ip_address(V4[0]), 80, 6).fits_untrusted(memoryview(data)),
        (),
        (tcp(V4, b"data"), udp(V6, b"data")),
        ("vpnd.cli.capture.fits_untrusted", "vpnd.cli.capture.head_untrusted"),
    ),
    "echo reply": Entry(
        lambda data: [icmp.reply_untrusted(version, data) for version in (6, 4)],
        (BadPacket,),
        (b"\x81" + bytes(7) + b"nonce", ip(V4, 1, bytes(8) + b"nonce")),
        ("vpnd.packet.icmp.reply_untrusted", "vpnd.packet.icmp._payload_untrusted"),
    ),
    "packet": Entry(
        lambda data: check.inspect_untrusted(memoryview(data), 0, len(data)),
        (BadPacket,),
        PACKETS,
        ("vpnd.packet.offload.check.inspect_untrusted",),
    ),
    "records of a stream": Entry(
        tun,
        (RemoteProtocolError,),
        (RECORDS,),
        (
            "shards.inbound.deliver_untrusted",
            "shards.inbound._complete_untrusted",
            "shards.inbound._of_router_untrusted",
        ),
    ),
    "ICMP error of a router": Entry(
        quoted,
        (BadPacket,),
        (
            bytes(VNET_BYTES) + ip(V4[::-1], 1, b"\x03\x04" + bytes(6) + udp(V4, b"x")),
            bytes(VNET_BYTES) + ip(V6[::-1], 58, b"\x02\x00" + bytes(6) + udp(V6, b"x")),
        ),
        ("vpnd.packet.icmp.quoted_untrusted",),
    ),
    "bare frames of a stream": Entry(
        bare,
        (),
        tuple(struct.pack(">I", len(packet) - VNET_BYTES) + packet[VNET_BYTES:] for packet in PACKETS),
        ("shards.session.bare.deliver_untrusted", "shards.session.bare.records_untrusted"),
    ),
    "hello": Entry(
        negotiate.decode_hello_untrusted,
        (RemoteProtocolError,),
        (negotiate.encode_hello(HELLO_A)[1:],),
        ("shards.stream.negotiate.decode_hello_untrusted",),
    ),
    "session": Entry(
        session,
        (RemoteProtocolError,),
        (b"".join(FRAMES), b"".join(FRAMES[:2]), OPENED + yamux.window_update(1, 0) * BURST),
        (
            "shards.stream.noise.open_untrusted",
            "shards.stream.session._parse_untrusted",
            "shards.stream.session._take_header_untrusted",
            "shards.stream.session._take_payload_untrusted",
            "shards.stream.table.take_header_untrusted",
            "shards.stream.table._take_stream_frame_untrusted",
            "shards.stream.table._take_syn_untrusted",
            "shards.stream.table._renew_credit_untrusted",
            "shards.stream.table.negotiate_untrusted",
            "shards.stream.negotiate.feed_untrusted",
            "shards.stream.negotiate._take_length_byte_untrusted",
            "shards.stream.negotiate._take_item_untrusted",
        ),
    ),
    "datagram": Entry(
        datagram,
        (RemoteProtocolError,),
        (
            SLICES[0],
            (0x02000000).to_bytes(4, "big") + bytes(24),
            (0x02000001).to_bytes(4, "big") + bytes(24),
            b"\0\0\0\x1e" + bytes(30),
        ),
        (
            "shards.datagram.association.receive_untrusted",
            "shards.datagram.association._take_slice_untrusted",
            "shards.datagram.association._take_probe_untrusted",
            "shards.datagram.association._deliver_untrusted",
            "shards.datagram.sealing.open_untrusted",
            "vpnd.packet.ecn.mark_records_untrusted",
            "vpnd.packet.ecn.mark_untrusted",
        ),
    ),
    "slices of a superpacket": Entry(
        slices,
        (BadPacket,),
        tuple(SLICES),
        (
            "vpnd.packet.offload.slices.begin_untrusted",
            "vpnd.packet.offload.slices.append_untrusted",
        ),
    ),
    "framed message": Entry(
        lambda data: at_once(framing.read_message_untrusted(Memory(data), 1 << 16)),
        (RemoteProtocolError, *ENDS),
        (b"\0\0\0\x03abc",),
        ("vpnd.adapter.framing.read_message_untrusted",),
    ),
    "negotiation": Entry(
        lambda data: at_once(muxer._read_delimited_untrusted(Memory(data))),
        (ParseError, *ENDS),
        (b"\x13/multistream/1.0.0\n",),
        ("vpnd.adapter.muxer._read_delimited_untrusted",),
    ),
    "message of the table": Entry(
        lambda data: at_once(identify._read_table_message_untrusted(Memory(data), 1 << 20)),
        (RemoteProtocolError, MessageTooLarge, *ENDS),
        (bytes([len(TABLE)]) + TABLE,),
        (
            "vpnd.adapter.identify._read_table_message_untrusted",
            "vpnd.adapter.identify.table_message_untrusted",
        ),
    ),
    "identity in a handshake": Entry(
        noise.identity_untrusted,
        (noise.BadHandshake,),
        (
            honest(Ed25519PrivateKey.from_private_bytes(bytes(32)))(bytes(32)),
            field(1, public_key(RSA, rsa_bomb(300))) + field(2, bytes(64)),
        ),
        ("vpnd.adapter.noise.identity_untrusted",),
    ),
    "handshake": Entry(
        handshake,
        (noise.BadHandshake, NoiseFailure, *ENDS),
        (first_message() + b"\0\x70" + bytes(112),),
        ("vpnd.adapter.noise._shake_hands_untrusted", "vpnd.adapter.noise._receive_untrusted"),
    ),
    "members for a hosts file": Entry(
        lambda data: lines_untrusted(
            data, OwnAddresses(network="home", label="a", addresses=(), subnets=("10.86.0.0/16",))
        ),
        (ProtocolViolation,),
        (b'[{"name":"nas","addresses":["10.86.0.2","fd00::1"]}]',),
        ("supervisor.network.hosts.lines_untrusted",),
    ),
    "host of a request": Entry(
        text(lambda host: check_host_untrusted(host, "127.0.0.1:9587")),
        (Refused,),
        (b"127.0.0.1:9587", b"[::1]:9587", b"localhost", b"evil.example"),
        ("vpnd.page.process.check_host_untrusted",),
    ),
    "token of a request": Entry(
        text(lambda header: check_token_untrusted(header, "token")),
        (Refused,),
        (b"Bearer token", b"Bearer tokem", b"Basic dG9rZW4="),
        ("vpnd.page.process.check_token_untrusted",),
    ),
}

#: Functions that hand what they read to those above, and whose own part is waiting, counting and answering; where it is
#: seen that nothing comes out of them.
SHELLS = {
    # a Protocol without a body
    "shards.session.surroundings.deliver_untrusted": "tests/shards/test_bare.py",
    "vpnd.adapter.framing.hear_untrusted": "tests/control/test_meeting.py",
    "vpnd.adapter.contract._post_untrusted": "tests/discovery/test_contract_http.py",
    "vpnd.adapter.dht._values_untrusted": "tests/control/test_dht.py",
    "vpnd.adapter.guests._receive_stranger_untrusted": "tests/control/test_guests.py",
    "vpnd.adapter.guests._serve_untrusted": "tests/control/test_guests.py",
    "vpnd.adapter.identify.agent_untrusted": "tests/control/test_foreign.py",
    "vpnd.adapter.mdns._heard_untrusted": "tests/discovery/test_localnet.py",
    "vpnd.adapter.muxer._select_untrusted": "tests/control/test_foreign.py",
    "vpnd.adapter.reach.serve_untrusted": "tests/control/test_reachability.py",
    "vpnd.adapter.rendezvous.serve_leg_untrusted": "tests/control/test_meeting.py",
    "vpnd.control.dns_service.answer_untrusted": "tests/names/test_server.py",
    "vpnd.control.dns_service._answer_untrusted": "tests/names/test_server.py",
    "vpnd.control.dns_service._converse_untrusted": "tests/names/test_server.py",
    "vpnd.control.dns_service._query_untrusted": "tests/names/test_server.py",
    "vpnd.control.enrolling.answer_untrusted": "tests/membership/test_authority.py",
    "vpnd.control.gossiping._read_untrusted": "tests/control/test_network.py",
    "vpnd.control.explaining._exchange_untrusted": "tests/netns/test_why.py",
    "vpnd.control.explaining.serve_untrusted": "tests/control/test_explaining.py",
    "vpnd.control.introducing.answer_untrusted": "tests/membership/test_introducing.py",
    "vpnd.control.introducing.answer_both_untrusted": "tests/membership/test_introducing.py",
    "vpnd.control.introducing._receive_untrusted": "tests/membership/test_introducing.py",
}
