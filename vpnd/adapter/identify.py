"""identify, and the messages of the members' table: what members may say in them before py-libp2p takes it apart.

py-libp2p decodes every address and every signed record in a message of a megabyte (identify) or four (kad), in Python
and in one turn of the loop. `bound_messages` has them cut down first, to what an honest node says. It also has this
node say who it is: vpnd, and which. `agent_untrusted` asks a node that is not vpnd what it is.
"""

from __future__ import annotations

import functools
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.exceptions import ParseError
from libp2p.host import basic_host
from libp2p.identity.identify import identify
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.identity.identify_push import identify_push
from libp2p.identity.update import update_peerstore_from_identify
from libp2p.kad_dht import kad_dht, peer_routing, provider_store, value_store
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.utils.varint import read_length_prefixed_protobuf, read_varint_prefixed_bytes_limited

from vpnd.errors import RemoteProtocolError
from vpnd.printable import printable
from vpnd.version import __version__

AGENT = f"vpnd/{__version__}"
#: As go-libp2p has it, for a message of identify with a signed record.
MAX_IDENTIFY_BYTES = 8192
#: Twenty nodes with their addresses, and a record.
MAX_TABLE_BYTES = 32768
MAX_PROTOCOLS, MAX_PROTOCOL_CHARACTERS = 64, 256
MAX_ADDRESSES, MAX_ADDRESS_BYTES = 16, 64
MAX_CLOSER_PEERS, MAX_PEER_ID_BYTES = 20, 64
MAX_AGENT_CHARACTERS = 64


def bound_messages() -> None:
    """For all hosts of the process."""
    identify.AGENT_VERSION = AGENT
    read = functools.partial(read_length_prefixed_protobuf, max_length=MAX_IDENTIFY_BYTES)
    for module in (basic_host, identify_push):
        module.read_length_prefixed_protobuf = read  # type: ignore[attr-defined]
        module.update_peerstore_from_identify = _update  # type: ignore[attr-defined]
    for table in (kad_dht, peer_routing, provider_store, value_store):
        table.read_varint_prefixed_bytes_limited = _read_table_message_untrusted  # type: ignore[attr-defined]


async def _update(peerstore: Any, peer_id: ID, message: Identify) -> None:
    cut_identify(message)
    await update_peerstore_from_identify(peerstore, peer_id, message)


def cut_identify(message: Identify) -> None:
    """Take out of a message what nobody here needs, or what is more than anybody needs. The key is known from the
    handshake, and addresses of members come signed by them, in statements."""
    message.ClearField("public_key")
    message.ClearField("signedPeerRecord")
    if len(message.observed_addr) > MAX_ADDRESS_BYTES:
        message.ClearField("observed_addr")
    protocols = [each for each in message.protocols if len(each) <= MAX_PROTOCOL_CHARACTERS]
    message.protocols[:] = protocols[:MAX_PROTOCOLS]
    message.listen_addrs[:] = _short(message.listen_addrs)


async def _read_table_message_untrusted(stream: Any, limit: int) -> bytes:
    """In the place of the library's: a message of at most MAX_TABLE_BYTES, cut. Raises RemoteProtocolError,
    MessageTooLarge, and what libp2p raises at the end of a stream."""
    try:
        wire = await read_varint_prefixed_bytes_limited(stream, min(limit, MAX_TABLE_BYTES))
    except (ParseError, ValueError) as error:
        raise RemoteProtocolError(f"no length of a message: {error}") from error
    return table_message_untrusted(wire)


def table_message_untrusted(wire: bytes) -> bytes:
    """A message of the table without what nobody here needs: signed records, providers, more nodes or addresses than
    there may be. Raises RemoteProtocolError."""
    try:
        message = Message.FromString(wire)
    except DecodeError as error:
        raise RemoteProtocolError(f"not a message of the table: {error}") from error
    message.ClearField("senderRecord")
    message.ClearField("providerPeers")
    peers = [peer for peer in message.closerPeers if len(peer.id) <= MAX_PEER_ID_BYTES][:MAX_CLOSER_PEERS]
    for peer in peers:
        peer.ClearField("signedRecord")
        peer.addrs[:] = _short(peer.addrs)
    kept = Message()
    kept.closerPeers.extend(peers)
    message.ClearField("closerPeers")
    message.closerPeers.extend(kept.closerPeers)
    return message.SerializeToString()


def _short(addresses: Any) -> list[bytes]:
    return [each for each in addresses if len(each) <= MAX_ADDRESS_BYTES][:MAX_ADDRESSES]


async def agent_untrusted(session: Any, peer_id: ID, timeout_s: float) -> str:
    """What a node calls itself, on a secured connection for which both sides chose Yamux; empty when it does not say so
    within `timeout_s`. The connection is of no use for anything else then. Raises nothing."""
    agent = ""
    try:
        with trio.move_on_after(timeout_s):
            muxed = Yamux(session, peer_id, is_initiator=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(muxed.start)
                await muxed.event_started.wait()
                stream = await muxed.open_stream()
                communicator = MultiselectCommunicator(stream)
                await MultiselectClient().select_one_of([identify.ID], communicator)
                wire = await read_length_prefixed_protobuf(
                    stream,  # type: ignore[arg-type]
                    max_length=MAX_IDENTIFY_BYTES,
                )
                agent = printable(Identify.FromString(wire).agent_version[:MAX_AGENT_CHARACTERS])
                nursery.cancel_scope.cancel()
    except Exception:  # of libp2p, in great variety: it has not said
        return agent
    return agent
