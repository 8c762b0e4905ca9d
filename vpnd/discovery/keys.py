"""Names under which a node is found in a distributed hash table."""

from __future__ import annotations

import hashlib

#: libp2p's table drops look-ups of longer keys without a word, so a peer id (52 bytes) cannot be part of one.
MAX_KEY_BYTES = 50
PREFIX = "/vpn/m/"
DIGEST_CHARACTERS = 32


def dht_key(peer_id: str) -> str:
    """The key of a node's record: a namespace and half of a SHA-256 in hex, 39 bytes."""
    return PREFIX + hashlib.sha256(peer_id.encode()).hexdigest()[:DIGEST_CHARACTERS]
