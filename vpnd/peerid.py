"""Peer ids: the text form of an ed25519 public key, as libp2p writes it.

A peer id is base58btc over the identity multihash of the protobuf-encoded public key
(https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md):

    offset  bytes  field
    0       1      multihash code, 0x00: identity, the key itself follows
    1       1      multihash length, 36
    2       2      protobuf field 1 (key type), varint 1: Ed25519
    4       2      protobuf field 2 (key data), 32 bytes
    6       32     the public key

Such an id starts with "12D3KooW". Ids of other key types hash the key; vpnd neither makes nor accepts them.
"""

from __future__ import annotations

import base58
import msgspec

PUBLIC_KEY_BYTES = 32
#: No ed25519 peer id is longer than 52 characters; decoding costs the square of the length.
MAX_TEXT = 64
#: The beginning of a public key of libp2p that is ed25519's: the protobuf part above.
KEY_PREFIX = bytes([0x08, 0x01, 0x12, PUBLIC_KEY_BYTES])
_PREFIX = bytes([0x00, len(KEY_PREFIX) + PUBLIC_KEY_BYTES]) + KEY_PREFIX


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who a node is, but for the private key. `public_key` has 32 raw bytes."""

    peer_id: str
    public_key: bytes


def from_public_key(public_key: bytes) -> str:
    """The peer id of a raw ed25519 public key."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise ValueError(f"an ed25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    return base58.b58encode(_PREFIX + public_key).decode()


def public_key_untrusted(peer_id: str) -> bytes:
    """The raw ed25519 public key in a peer id. Raises ValueError, whose text says what is wrong with it."""
    if not peer_id.isascii() or not peer_id.isalnum():
        raise ValueError("is not a peer id: it may hold letters and digits only")
    if len(peer_id) > MAX_TEXT:
        raise ValueError("is too long for a peer id")
    try:
        data = base58.b58decode(peer_id)
    except ValueError:
        raise ValueError("is not a peer id: base58 has no 0, O, I and l") from None
    if not data.startswith(_PREFIX) or len(data) != len(_PREFIX) + PUBLIC_KEY_BYTES:
        if peer_id.startswith("12D3KooW"):
            raise ValueError("is not a whole peer id: characters are missing or too many")
        raise ValueError("is not the peer id of an ed25519 key (those start with 12D3KooW)")
    return data[len(_PREFIX) :]
