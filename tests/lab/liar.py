"""A member that lies: with a real member's key it tells another member statements that do not hold.

    python -m lab.liar STATE_DIR ADDRESS PEER_ID NETWORK_ID ADDRESS_WANTED

It runs in the namespace, and with the state directory, of a member that is stopped, and ends with 0 when all was said.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair

from vpnd.adapter.framing import write_message
from vpnd.adapter.host import Host
from vpnd.adapter.noise import peer_id_of, read_key_pair, signing_key
from vpnd.config.live import Live
from vpnd.config.schema import P2P, Config
from vpnd.control.gossiping import GOSSIP
from vpnd.logs import Seldom
from vpnd.membership.messages import statement_pages
from vpnd.membership.statements import HEADER_BYTES, Membership, Presence, sign

#: How long the other has to read one message before the next, which it may hang up at, comes.
BETWEEN_S = 0.5
HOUR_MS = 3_600_000


def lies(key: Ed25519PrivateKey, peer_id: str, network: bytes, wanted: str) -> list[bytes]:
    """Statements in the order they are told: an old presence after a new one, a membership this node gave itself, and
    one that says it was signed by the authority; the last is what no honest member sends."""
    now_ms = int(time.time() * 1000)
    presence = Presence(network, peer_id, ("/ip4/192.0.2.1/tcp/4001",), now_ms)
    older = Presence(network, peer_id, ("/ip4/192.0.2.2/tcp/4001",), now_ms - 1)
    own = sign(
        key,
        Membership(
            network=network,
            signer=key.public_key().public_bytes_raw(),
            peer_id=peer_id,
            name="liar",
            addresses=(wanted,),
            routes=("0.0.0.0/0",),
            groups=(),
            enrolled_ms=now_ms - HOUR_MS,
            issued_ms=now_ms,
            expires_ms=now_ms + HOUR_MS,
        ),
    ).wire
    flipped = own[: HEADER_BYTES - 1] + bytes([own[HEADER_BYTES - 1] ^ 1]) + own[HEADER_BYTES:]
    return [sign(key, presence).wire, sign(key, older).wire, own, flipped]


async def tell(
    state_dir: Path,
    address: str,
    peer_id: str,
    say: Callable[[KeyPair], Iterable[list[bytes]]],
    pause_s: float = BETWEEN_S,
) -> None:
    """Tell statements over one stream, several at once, and pause after each time."""
    fd = os.open(state_dir / "identity.pem", os.O_RDONLY)
    keys = read_key_pair(fd)
    os.close(fd)
    live = Live(Config(p2p=P2P(listen=("/ip4/127.0.0.1/tcp/0",))))
    host = Host(
        keys,
        live,
        is_member=lambda _: True,
        member_addresses=tuple,
        count=lambda _: None,
        connections=lambda _: None,
        seldom=Seldom(logging.getLogger("liar"), live, trio.current_time),
    )
    async with host.running():
        stream = await host.open_stream((address,), peer_id, GOSSIP)
        for wires in say(keys):
            for page in statement_pages(wires):
                await write_message(stream, page)
            await trio.sleep(pause_s)


def main() -> None:
    state_dir, address, peer_id, network, wanted = sys.argv[1:]

    def say(keys: KeyPair) -> Iterable[list[bytes]]:
        return ([lie] for lie in lies(signing_key(keys), peer_id_of(keys), bytes.fromhex(network), wanted))

    trio.run(tell, Path(state_dir), address, peer_id, say)


if __name__ == "__main__":
    main()
