"""A member that says all the time that it is somewhere else: at a machine that has nothing to do with it.

    python -m lab.mover STATE_DIR ADDRESS PEER_ID NETWORK_ID VICTIM SECONDS PAUSE

It runs in the namespace, and with the state directory, of a member that is stopped, and tells the node at ADDRESS. Each
presence names other ports of VICTIM, an IPv4 address, and of that node's own loopback and link-local addresses.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import trio
from libp2p.crypto.keys import KeyPair

from vpnd.adapter.noise import peer_id_of, signing_key
from vpnd.membership.statements import Presence, sign

from .liar import tell

#: Ports that somebody could have a service on.
PORTS = range(2000, 60_000)


def main() -> None:
    state_dir, address, peer_id, network, victim, seconds, pause = sys.argv[1:]

    def say(keys: KeyPair) -> Iterator[list[bytes]]:
        end_s = time.monotonic() + float(seconds)
        for port in itertools.cycle(PORTS):
            if time.monotonic() > end_s:
                return
            where = tuple(f"/ip4/{ip}/tcp/{port}" for ip in (victim, "127.0.0.1", "169.254.7.7"))
            presence = Presence(bytes.fromhex(network), peer_id_of(keys), where, int(time.time() * 1000))
            yield [sign(signing_key(keys), presence).wire]

    trio.run(tell, Path(state_dir), address, peer_id, say, float(pause))


if __name__ == "__main__":
    main()
