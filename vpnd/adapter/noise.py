"""Noise XX as libp2p speaks it (https://github.com/libp2p/specs/tree/master/noise), for ed25519 keys and members alone.

py-libp2p's own handshake decodes whatever key the other side shows, before anybody has asked whose it is; an RSA key of
64 KB holds up everything in control for ten seconds. Here a message is looked at by its size, and a key by its form,
before anything decodes it, on both sides. Also `ed25519_only`, for keys that come another way.

    dialer                    listener              payload: NoiseHandshakePayload, of which these two fields are read
    e                      →                            identity_key   08 01 12 20, then 32 bytes: an ed25519 public key
                           ←  e, ee, s, es, payload     identity_sig   64 bytes: over the static key s
    s, se, payload         →
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.crypto import serialization
from libp2p.crypto.ed25519 import Ed25519PrivateKey as Libp2pPrivateKey
from libp2p.crypto.ed25519 import Ed25519PublicKey as Libp2pPublicKey
from libp2p.crypto.keys import KeyPair, KeyType
from libp2p.crypto.rsa import RSAPublicKey
from libp2p.crypto.secp256k1 import Secp256k1PublicKey
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519
from libp2p.io.utils import read_exactly
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.pb.noise_pb2 import NoiseHandshakePayload
from libp2p.security.secure_session import SecureSession
from noise.connection import Keypair, NoiseConnection
from noise.exceptions import NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError

from vpnd import peerid
from vpnd.adapter.arrivals import Arrival, Progress
from vpnd.identity import read_private

NOISE_PROTOCOL = b"Noise_XX_25519_ChaChaPoly_SHA256"
SIGNATURE_BYTES = 64
SIGNED_PREFIX = b"noise-libp2p-static-key:"
LENGTH = struct.Struct("!H")
#: Ours: an honest message has some 200 bytes, one that also names muxers or certificates twice that.
MAX_MESSAGE_BYTES = 1024
#: What the library raises for bytes that do not fit.
_BROKEN = (NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError, InvalidTag, ValueError)


class UnknownPeer(HandshakeFailure):
    """The other side proved who it is, and it is not a member."""


class TooOften(HandshakeFailure):
    """The other side is a member, and comes more often than it may."""


class BadHandshake(HandshakeFailure):
    """What came is no Noise handshake of a node with an ed25519 key."""


class Identity(NamedTuple):
    """Who the other side says it is: its ed25519 key, and the signature that has to show it."""

    key: bytes
    signature: bytes


class MembersOnlyNoise(ISecureTransport):
    """Ends an inbound handshake as soon as it shows a peer id that may not come in.

    XX reveals the dialer in its last message, so this is the earliest moment; no muxer has been spoken of yet
    and nothing has been allocated for the peer.
    """

    def __init__(
        self,
        keys: KeyPair,
        lets_in: Callable[[str], bool],
        refused: Callable[[str], None],
        too_often: Callable[[str], bool],
    ) -> None:
        """`refused` is told the peer id of everybody turned away; `too_often` of everybody else, and says whether that
        one comes too often."""
        self._keys = keys
        self._own = ID.from_pubkey(keys.public_key)
        self._static = create_x25519().private_key.to_bytes()
        self._lets_in = lets_in
        self._refused = refused
        self._too_often = too_often

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """See ISecureTransport. Raises UnknownPeer, TooOften, the connection closed; BadHandshake."""
        _came_to(conn, Progress.AGREED)
        session = await self._shake_hands_untrusted(conn, None)
        peer_id = str(session.get_remote_peer())
        if not self._lets_in(peer_id):
            self._refused(peer_id)
            await session.close()
            raise UnknownPeer(f"{peer_id} is not a member")
        if self._too_often(peer_id):
            await session.close()
            raise TooOften(f"{peer_id} comes too often")
        _came_to(conn, Progress.PROVEN)
        return session

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """See ISecureTransport. Raises PeerIDMismatchesPubkey, BadHandshake."""
        return await self._shake_hands_untrusted(conn, peer_id)

    async def _shake_hands_untrusted(self, conn: IRawConnection, wanted: ID | None) -> SecureSession:
        """The handshake, as the dialer when `wanted` says with whom. Raises BadHandshake, PeerIDMismatchesPubkey, and
        what libp2p raises at the end of a connection."""
        noise = NoiseConnection.from_name(NOISE_PROTOCOL)
        if wanted is not None:
            noise.set_as_initiator()
        else:
            noise.set_as_responder()
        noise.set_keypair_from_private_bytes(Keypair.STATIC, self._static)
        noise.start_handshake()
        state = noise.noise_protocol.handshake_state  # the library forgets it with the last message
        if wanted is not None:
            await _send(conn, noise, b"")
            identity = identity_untrusted(await _receive_untrusted(conn, noise))
        else:
            await _receive_untrusted(conn, noise)
            await _send(conn, noise, self._payload(state.s.public_bytes))
            identity = identity_untrusted(await _receive_untrusted(conn, noise))
        try:
            Ed25519PublicKey.from_public_bytes(identity.key).verify(
                identity.signature, SIGNED_PREFIX + state.rs.public_bytes
            )
        except (InvalidSignature, ValueError) as error:
            raise BadHandshake("the other side does not hold the key it shows") from error
        peer_id = ID.from_string(peerid.from_public_key(identity.key))
        if wanted is not None:
            if peer_id != wanted:
                raise PeerIDMismatchesPubkey(f"{peer_id} answers instead of {wanted}")
            await _send(conn, noise, self._payload(state.s.public_bytes))
        return SecureSession(
            local_peer=self._own,
            local_private_key=self._keys.private_key,
            remote_peer=peer_id,
            remote_permanent_pubkey=Libp2pPublicKey.from_bytes(identity.key),
            is_initiator=wanted is not None,
            conn=NoiseTransportReadWriter(conn, noise),
        )

    def _payload(self, static: bytes) -> bytes:
        signature = self._keys.private_key.sign(SIGNED_PREFIX + static)
        return NoiseHandshakePayload(
            identity_key=self._keys.public_key.serialize(), identity_sig=signature
        ).SerializeToString()


def _came_to(conn: IRawConnection, progress: Progress) -> None:
    if isinstance(conn, Arrival):
        conn.progress = progress


async def _send(conn: IRawConnection, noise: NoiseConnection, payload: bytes) -> None:
    """The next message. Raises BadHandshake for a key of the other side's that nothing can be agreed with."""
    try:
        message = bytes(noise.write_message(payload))
    except _BROKEN as error:
        raise BadHandshake(f"a broken key: {error or type(error).__name__}") from error
    await conn.write(LENGTH.pack(len(message)) + message)


async def _receive_untrusted(conn: Any, noise: NoiseConnection) -> bytes:
    """The payload of the next message. Raises BadHandshake, and what libp2p raises at the end of a connection."""
    length = LENGTH.unpack(await read_exactly(conn, LENGTH.size))[0]
    if length > MAX_MESSAGE_BYTES:
        raise BadHandshake(f"a message of {length} bytes, where at most {MAX_MESSAGE_BYTES} may come")
    message = await read_exactly(conn, length) if length else b""
    try:
        return bytes(noise.read_message(message))
    except _BROKEN as error:
        raise BadHandshake(f"a broken message: {error or type(error).__name__}") from error


def identity_untrusted(payload: bytes) -> Identity:
    """What a handshake's payload says of its sender. Raises BadHandshake."""
    try:
        message = NoiseHandshakePayload.FromString(payload)
    except DecodeError as error:
        raise BadHandshake(f"the payload is no message: {error}") from error
    key, signature = message.identity_key, message.identity_sig
    if not key.startswith(peerid.KEY_PREFIX) or len(key) != len(peerid.KEY_PREFIX) + peerid.PUBLIC_KEY_BYTES:
        raise BadHandshake("its key is not an ed25519 key, and members have no other kind")
    if len(signature) != SIGNATURE_BYTES:
        raise BadHandshake(f"a signature of {len(signature)} bytes")
    return Identity(key[len(peerid.KEY_PREFIX) :], signature)


def ed25519_only() -> None:
    """For all hosts of the process: wherever libp2p meets a public key of another kind, it raises."""
    for kind, cls in ((KeyType.RSA, RSAPublicKey), (KeyType.Secp256k1, Secp256k1PublicKey)):
        cls.from_bytes = _refuse_key  # type: ignore[method-assign]
        serialization.key_type_to_public_key_deserializer[kind.value] = _refuse_key


def _refuse_key(data: bytes) -> NoReturn:
    raise ValueError(f"a public key of {len(data)} bytes that is not ed25519's")


#: RFC 8032 section 5.1.5.
SEED_BYTES = 32


def read_key_pair(fd: int) -> KeyPair:
    """The key in the identity file, read from its beginning. `fd` stays the caller's. Raises ConfigError."""
    private = Libp2pPrivateKey.from_bytes(read_private(fd).private_bytes_raw())
    return KeyPair(private, private.get_public_key())


def signing_key(keys: KeyPair) -> Ed25519PrivateKey:
    """The private key of a key pair, to sign statements with."""
    return Ed25519PrivateKey.from_private_bytes(keys.private_key.to_bytes()[:SEED_BYTES])


def peer_id_of(keys: KeyPair) -> str:
    """The peer id that belongs to a key pair, base58."""
    return str(ID.from_pubkey(keys.public_key))
