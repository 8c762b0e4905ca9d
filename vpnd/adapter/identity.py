"""The node's private key, from an open descriptor into libp2p's hands."""

from __future__ import annotations

import os

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from libp2p.crypto.ed25519 import Ed25519PrivateKey as Libp2pPrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.peer.id import ID

from vpnd.errors import ConfigError

#: A PKCS #8 PEM of an Ed25519 key has 119 bytes; what is larger is some other file.
MAX_PEM_BYTES = 4096
#: RFC 8032 section 5.1.5.
SEED_BYTES = 32


def read_key_pair(fd: int) -> KeyPair:
    """The Ed25519 key of a PKCS #8 PEM file, read from its beginning. `fd` stays the caller's.

    Raises ConfigError; the text never holds a part of the file.
    """
    try:
        pem = os.pread(fd, MAX_PEM_BYTES, 0)
        key = load_pem_private_key(pem, password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the identity file cannot be read: {type(error).__name__}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("the identity file holds no Ed25519 key")
    private = Libp2pPrivateKey.from_bytes(key.private_bytes_raw())
    return KeyPair(private, private.get_public_key())


def signing_key(keys: KeyPair) -> Ed25519PrivateKey:
    """The private key of a key pair, to sign statements with."""
    return Ed25519PrivateKey.from_private_bytes(keys.private_key.to_bytes()[:SEED_BYTES])


def peer_id_of(keys: KeyPair) -> str:
    """The peer id that belongs to a key pair, base58."""
    return str(ID.from_pubkey(keys.public_key))
