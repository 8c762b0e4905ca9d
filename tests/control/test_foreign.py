"""libp2p nodes that are not vpnd: what is said of them, what they are told, and what they may cost."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import pytest
import trio
from control_nodes import Node, running
from lab.stranger import NOISE, Plain, Refused
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.security.noise.transport import Transport as StockNoise
from libp2p.utils.varint import read_length_prefixed_protobuf
from multiaddr import Multiaddr

from vpnd.adapter.dial import DialError, NotAdmitted
from vpnd.adapter.identify import (
    AGENT,
    MAX_ADDRESSES,
    MAX_CLOSER_PEERS,
    MAX_PROTOCOLS,
    cut_identify,
    table_message_untrusted,
)
from vpnd.config.schema import Peer
from vpnd.endpoint import Endpoint
from vpnd.errors import RemoteProtocolError

IDENTIFY = "/ipfs/id/1.0.0"


@contextlib.asynccontextmanager
async def stock_node() -> AsyncIterator[tuple[str, str]]:
    """An ordinary libp2p node in this process; its address and peer id."""
    keys = create_new_key_pair()
    host = new_host(
        key_pair=keys, sec_opt={NOISE: StockNoise(keys, noise_privkey=create_x25519().private_key)}
    )
    async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        await host.get_network().auto_connector.stop()
        yield str(host.get_transport_addrs()[0]).partition("/p2p")[0], str(host.get_id())
        await host.close()


def test_an_ordinary_node_is_named_as_what_it_is() -> None:
    async def main() -> None:
        node = Node()
        async with running(node), stock_node() as (address, peer_id):
            with pytest.raises(DialError, match=rf"speaks libp2p, but is not vpnd \({AGENT}") as caught:
                await node.host.dial(address, peer_id)
            assert not isinstance(caught.value, NotAdmitted)

    trio.run(main)


@contextlib.contextmanager
def answering(serve: Callable[[Plain], object]) -> Iterator[str]:
    """A listener that has one conversation; its multiaddr."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(Refused):
                serve(Plain(sock))

        thread = threading.Thread(target=run)
        thread.start()
        yield f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}"
        thread.join()


def test_a_node_that_speaks_tls_alone_is_told_from_one_that_is_not_there() -> None:
    node = Node()

    async def main() -> None:
        async with running(node):
            with (
                answering(lambda plain: plain.serve("/tls/1.0.0")) as address,
                pytest.raises(DialError, match="speaks libp2p, but not Noise"),
            ):
                await node.host.dial(address, node.peer_id)
            with answering(lambda plain: plain.hear()) as address, pytest.raises(DialError) as caught:
                await node.host.dial(address, node.peer_id)
            assert "not Noise" not in str(caught.value)

    trio.run(main)


@pytest.mark.parametrize("who", ["a stranger", "a member that is removed meanwhile"])
def test_no_stream_goes_to_who_is_no_member(who: str) -> None:
    async def main() -> None:
        node, other = Node(members=set()), Node()
        opened = []

        async def handler(stream: object) -> None:
            opened.append(stream)

        async with running(node, other):
            other.host.serve("/test/1", handler, 5.0)
            if who == "a stranger":
                with pytest.raises(DialError, match="not known as a member"):
                    await node.host.open_stream((other.address,), other.peer_id, "/test/1")
                assert not node.host.connections()
            else:
                node.members = {other.peer_id}
                await node.host.open_stream((other.address,), other.peer_id, "/test/1")
                node.members = set()
                # on the connection that this node dialed, a stream of the other side's
                with pytest.raises(DialError):
                    await other.host.open_stream((), node.peer_id, IDENTIFY)
                assert node.counts["refused_unknown_peer"]

    trio.run(main)


def test_a_node_says_that_it_is_vpnd_and_what_it_speaks() -> None:
    async def main() -> None:
        member, node = Node(), Node()
        async with running(member, node):
            stream = await member.host.open_stream((node.address,), node.peer_id, IDENTIFY)
            said = Identify.FromString(await read_length_prefixed_protobuf(stream))
            assert said.agent_version == AGENT
            assert set(said.protocols) == {
                protocol for protocol in node.host.libp2p.get_mux().handlers if protocol is not None
            }

    trio.run(main)


def test_what_a_member_says_of_itself_is_cut_to_what_is_needed() -> None:
    address = Multiaddr("/ip4/192.0.2.1/tcp/1").to_bytes()
    said = Identify(
        public_key=b"x" * 999,
        signedPeerRecord=b"y" * 999,
        observed_addr=address * 100,
        listen_addrs=[address * 100, *[address] * 100],
        protocols=["p" * 1000, *["/test/1"] * 1000],
    )
    cut_identify(said)
    assert not said.HasField("public_key") and not said.HasField("signedPeerRecord")
    assert not said.HasField("observed_addr")
    assert list(said.listen_addrs) == [address] * MAX_ADDRESSES
    assert list(said.protocols) == ["/test/1"] * MAX_PROTOCOLS


def test_a_message_of_the_table_is_cut_to_what_is_needed() -> None:
    address = Multiaddr("/ip4/192.0.2.1/tcp/1").to_bytes()
    peer = Message.Peer(id=b"id", addrs=[address * 100, *[address] * 50], signedRecord=b"x")
    sent = Message(
        type=Message.MessageType.FIND_NODE,
        key=b"key",
        senderRecord=b"x",
        closerPeers=[peer] * 99,
        providerPeers=[peer],
    )
    kept = Message.FromString(table_message_untrusted(sent.SerializeToString()))
    assert (kept.type, kept.key) == (sent.type, sent.key)
    assert not kept.HasField("senderRecord") and not kept.providerPeers
    assert len(kept.closerPeers) == MAX_CLOSER_PEERS
    assert all(list(one.addrs) == [address] * MAX_ADDRESSES for one in kept.closerPeers)
    with pytest.raises(RemoteProtocolError):
        table_message_untrusted(b"\xff" * 9)


@pytest.mark.parametrize(
    ("ip", "listening", "named", "dialed"),
    [
        ("192.0.2.1", "0.0.0.0", False, True),
        ("127.0.0.1", "0.0.0.0", False, False),
        ("127.0.0.1", "0.0.0.0", True, True),
        ("127.0.0.1", "127.0.0.1", False, True),
        ("169.254.169.254", "0.0.0.0", False, False),
        ("169.254.169.254", "127.0.0.1", False, False),
        ("::1", "0.0.0.0", False, False),
        ("fe80::1", "0.0.0.0", False, False),
    ],
)
def test_what_others_say_leads_to_no_service_of_this_machine(
    ip: str, listening: str, named: bool, dialed: bool
) -> None:
    async def main() -> None:
        node = Node(listen=f"/ip4/{listening}/tcp/0")
        if named:
            peer = Peer(
                name="p", peer_id=node.peer_id, virtual_ip="10.86.0.2", addresses=(f"/ip4/{ip}/tcp/9",)
            )
            node.live.take(msgspec.structs.replace(node.live.config, peers=(peer,)))
        async with running(node):
            assert node.host._permits(Endpoint(ipaddress.ip_address(ip), 1)) == dialed
            if not dialed:
                address = Endpoint(ipaddress.ip_address(ip), 1).multiaddr()
                with pytest.raises(DialError, match="an address of this machine alone"):
                    await node.host.dial(address, node.peer_id)

    trio.run(main)
