"""The node's private key, from an open descriptor into libp2p's hands."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.crypto.ed25519 import Ed25519PrivateKey as Libp2pPrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.peer.id import ID

from vpnd.identity import read_private

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
