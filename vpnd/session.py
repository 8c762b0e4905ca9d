"""An established session between two nodes: what is taken out of libp2p, handed to a shard, and gone on from there."""

from __future__ import annotations

import msgspec

from vpnd.nat.paths import Path

#: Ciphers of a session's Noise transport messages. Both have keys of 32 bytes.
CHACHAPOLY = "chachapoly"
AESGCM = "aesgcm"
KEY_BYTES = 32
#: What is spoken in a session's streams: vpnd's records behind a HELLO, or bare packets (shards/session/bare.py).
VPND = "vpnd"
SUBNET_NODE = "subnet-node"


class Established(msgspec.Struct, frozen=True, kw_only=True):
    """A session after Noise handshake and muxer negotiation; its TCP socket goes beside it.

    `initiator`: this node dialed, which decides the parity of stream ids. Keys of `KEY_BYTES`; nonces are the next ones
    to use. `leftover`: plaintext received behind the negotiation, to be parsed first. `path`: how it
    reaches the peer. `protocol`: VPND or SUBNET_NODE.
    """

    peer_id: str
    initiator: bool
    cipher: str
    send_key: bytes
    send_nonce: int
    receive_key: bytes
    receive_nonce: int
    leftover: bytes
    path: Path = Path()
    protocol: str = VPND

    def __repr__(self) -> str:  # keys never reach a log or a traceback
        return f"Established(peer_id={self.peer_id!r}, initiator={self.initiator}, cipher={self.cipher!r})"
