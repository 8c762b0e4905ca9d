"""What vpnd uses of py-libp2p beyond its documented interface, and the check that it is still there.

Called once at start-up: a libp2p that changed shape must stop the node with a clear sentence, not leak
connections or hand over wrong keys later.

Whatever libp2p would import only when first needed is imported here, too. After control has given up root it may not be
able to read its own files (an environment under a directory of root's), so an import at that moment fails. What is lazy
was found by comparing sys.modules before and after dialing, accepting, refusing, identify and ping; a test runs control
where imports are impossible.
"""

from __future__ import annotations

import importlib
import inspect

from libp2p.host.basic_host import BasicHost
from libp2p.kad_dht.kad_dht import KadDHT
from libp2p.kad_dht.routing_table import RoutingTable
from libp2p.kad_dht.value_store import ValueStore
from libp2p.network.swarm import Swarm
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr
from noise.connection import Keypair, NoiseConnection

from vpnd.adapter import release
from vpnd.adapter.noise import NOISE_PROTOCOL
from vpnd.errors import ChildError
from vpnd.session import KEY_BYTES

#: The releases whose source was read and tested. Another one needs that first.
SUPPORTED_RELEASES = "0.8."

#: Function -> parameters it must have, in that order.
SIGNATURES = (
    (Swarm._do_handle_inbound_connection, ("self", "read_write_closer", "maddr", "failure_event")),
    (Swarm.upgrade_inbound_raw_conn, ("self", "raw_conn", "maddr")),
    (Swarm.set_stream_handler, ("self", "stream_handler")),
    (Swarm.get_connections, ("self", "peer_id")),
    (TransportUpgrader.upgrade_security, ("self", "raw_conn", "is_initiator", "peer_id")),
    (Swarm.upgrade_outbound_raw_conn, ("self", "raw_conn", "peer_id")),
    (MuxerMultistream.new_conn, ("self", "conn", "peer_id")),
    (
        MultiselectClient.select_one_of,
        ("self", "protocols", "communicator", "negotiate_timeout"),
    ),
    (MultiselectClient.try_select, ("self", "communicator", "protocol")),
    (TCP.dial, ("self", "maddr")),
    (TCP.create_listener, ("self", "handler_function")),
    (BasicHost.get_mux, ("self",)),
    (KadDHT.get_value, ("self", "key")),
    (KadDHT.put_value, ("self", "key", "value")),
    (ValueStore.put_record, ("self", "key", "record")),
    (RoutingTable.add_peer, ("self", "peer_obj", "skip_server_mode_check")),
)
#: Class -> names its constructor or methods must set or read.
ATTRIBUTES = (
    (Swarm, ("_inbound_limiter", "common_stream_handler", "auto_connector", "upgrader")),
    (SecureSession, ("buf", "low_watermark", "high_watermark", "conn")),
    (NoiseTransportReadWriter, ("read_writer", "noise_state")),
    (Yamux, ("event_closed", "peer_id", "secured_conn", "streams", "stream_buffers", "event_shutting_down")),
    (Yamux, ("_read_data_body", "_cleanup_on_error")),
    (KadDHT, ("provider_store", "value_store", "routing_table", "local_peer_id", "host", "handle_stream")),
    (ValueStore, ("store", "host")),
)


def check_libp2p() -> None:
    """Raises ChildError, naming what is different, when this is not the libp2p vpnd was built against."""
    found = release("libp2p")
    if not found.startswith(SUPPORTED_RELEASES):
        remedy = "install what requirements.lock names (in a clone scripts/vpnd does)"
        raise ChildError(f"libp2p {found} is installed, vpnd needs {SUPPORTED_RELEASES}x; {remedy}")
    for function, expected in SIGNATURES:
        parameters = tuple(inspect.signature(function).parameters)
        if parameters[: len(expected)] != expected:
            raise ChildError(
                f"libp2p {found}: {function.__qualname__} takes {parameters}, expected {expected}"
            )
    for cls, names in ATTRIBUTES:
        known = _names_used_by(cls)
        missing = [name for name in names if name not in known]
        if missing:
            raise ChildError(f"libp2p {found}: {cls.__qualname__} has no {', '.join(missing)}")
    _check_noise_keys(found)


def _names_used_by(cls: type) -> set[str]:
    """Attributes declared by a class, and every attribute its own or inherited functions touch."""
    names = set(dir(cls))
    for base in cls.__mro__:
        names.update(inspect.get_annotations(base))
        for member in vars(base).values():
            if inspect.isfunction(member):
                names.update(member.__code__.co_names)
    return names


def _check_noise_keys(found: str) -> None:
    """One handshake in memory: the cipher states must hold each other's keys, and count messages."""
    ends: list[NoiseConnection] = []
    for set_role in (NoiseConnection.set_as_initiator, NoiseConnection.set_as_responder):
        end = NoiseConnection.from_name(NOISE_PROTOCOL)
        set_role(end)
        end.set_keypair_from_private_bytes(Keypair.STATIC, bytes([len(ends) + 1]) * KEY_BYTES)
        end.start_handshake()
        ends.append(end)
    a, b = ends
    b.read_message(a.write_message())
    a.read_message(b.write_message())
    b.read_message(a.write_message())
    b.decrypt(a.encrypt(b"one message"))
    try:
        sending, receiving = a.noise_protocol.cipher_state_encrypt, b.noise_protocol.cipher_state_decrypt
        right = (
            bytes(sending.k) == bytes(receiving.k)
            and len(sending.k) == KEY_BYTES
            and sending.n == receiving.n == 1
        )
    except (AttributeError, TypeError) as error:
        raise ChildError(f"libp2p {found}: the Noise cipher state looks different: {error}") from error
    if not right:
        raise ChildError(f"libp2p {found}: the Noise cipher states do not hold each other's keys")


#: Module, who imports it late.
LAZY = (
    "encodings.idna",  # socket.getaddrinfo, with the first host name
    "encodings.ascii",  # reading /proc/net/tcp
    "_strptime",  # times in records of the table
    "libp2p.network.connection.swarm_connection",  # the swarm, with the first connection
    "libp2p.utils.connection_shutdown",  # that one, when a connection ends
)
#: One multiaddr of each protocol vpnd meets: codecs are loaded with the first address that needs them.
SAMPLES = (
    "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN",
    "/ip6/::1/tcp/1",
    "/dns/localhost/tcp/1",
    "/dns4/localhost/tcp/1",
    "/dns6/localhost/tcp/1",
)


def preload() -> None:
    """Import what is lazy; costs milliseconds beside what importing libp2p has cost already."""
    for name in LAZY:
        importlib.import_module(name)
    for text in SAMPLES:
        address = Multiaddr(text)
        str(Multiaddr(address.to_bytes()))
        list(address.items())
