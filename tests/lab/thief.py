"""Who has stolen an authority's key: names authorities by the hundred, and lets a node of its own in as somebody else.

    python -m lab.thief STATE_DIR ADDRESS PEER_ID NETWORK_ID NAME VIRTUAL_IP

It runs in the namespace, and with the state directory, of an authority that is stopped, tells the node at ADDRESS, and
prints the peer id of the node it let in.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair

from vpnd import peerid
from vpnd.adapter.noise import signing_key
from vpnd.membership.statements import Grant, Membership, sign

from .liar import tell

#: More than any bound on what a directory takes of one authority.
GRANTS = 400
HOUR_MS = 3_600_000


def theft(key: Ed25519PrivateKey, network: bytes, name: str, address: str, own: str) -> list[list[bytes]]:
    """All dated back as far as it goes."""
    now_ms = int(time.time() * 1000)
    signer = key.public_key().public_bytes_raw()
    keys = [os.urandom(32) for _ in range(GRANTS)]
    publics = [Ed25519PrivateKey.from_private_bytes(one).public_key().public_bytes_raw() for one in keys]
    grants = [Grant(network, signer, one, peerid.from_public_key(one), 0, now_ms) for one in publics]
    member = Membership(
        network=network,
        signer=signer,
        peer_id=own,
        name=name,
        addresses=(address,),
        routes=(),
        groups=(),
        enrolled_ms=0,
        issued_ms=now_ms,
        expires_ms=now_ms + HOUR_MS,
    )
    return [[sign(key, one).wire for one in grants], [sign(key, member).wire]]


def main() -> None:
    state_dir, address, peer_id, network, name, virtual_ip = sys.argv[1:]
    own = peerid.from_public_key(Ed25519PrivateKey.generate().public_key().public_bytes_raw())

    def say(keys: KeyPair) -> list[list[bytes]]:
        return theft(signing_key(keys), bytes.fromhex(network), name, virtual_ip, own)

    trio.run(tell, Path(state_dir), address, peer_id, say)
    print(own)


if __name__ == "__main__":
    main()
