"""A member that sends what is cheap to send and dear to take, as fast as its machine can.

    python -m lab.flooder KIND STATE_DIR ADDRESS SOURCE TARGET SECONDS

It runs in the namespace of a member that is stopped, with its key, and speaks to the node at ADDRESS: libp2p's
handshake, and then the session protocol by hand; SOURCE and TARGET are virtual addresses. What it prints is how many
sessions the node has ended.

It yields the CPU to everybody else: the attacker has its own machine elsewhere, and what is measured is what it does to
the node, not to those who share a CPU with it here.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from simulation.packets import LEAST_BYTES, number_of, record
from stream.pair import FLOODS, OPENING

from shards.stream import spec, yamux

from .node import P2P_PORT
from .stranger import NOISE, Plain, Refused, Secured, honest

SESSION = "/vpnd/yamux/1.0.0"
TINY = "tiny packets"
#: So much fits into one Noise message.
MESSAGE_BYTES = 65_000
OPEN = yamux.window_update(1, 0, spec.FLAG_SYN) + yamux.data_frame(1, OPENING)
LEAST_URGENT = 19


class Member(Secured):
    """A session with the node at `address` as the member of that state directory, with one stream open."""

    def __init__(self, state_dir: Path, sock: socket.socket) -> None:
        key = load_pem_private_key((state_dir / "identity.pem").read_bytes(), None)
        Plain(sock).select(NOISE)
        super().__init__(sock, honest(cast(Ed25519PrivateKey, key)), initiator=True)
        self.select(SESSION)
        self.send(OPEN)

    def ended(self) -> bool:
        """Whether the node has hung up; what it says is not listened to."""
        self.sock.setblocking(False)
        try:
            while data := self.sock.recv(1 << 16):
                del data
            return True
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        finally:
            self.sock.settimeout(5.0)

    def flood(self, frame: Callable[[int], bytes], until_s: float) -> bool:
        """Send frames, as many as fit into a message each time; whether the node hung up."""
        number, following = 1, frame(0)
        while time.monotonic() < until_s:
            if self.ended():
                return True
            frames = bytearray()
            while following and len(frames) + len(following) <= MESSAGE_BYTES:
                frames += following
                following = frame(number)
                number += 1
            try:
                self.send(bytes(frames))
            except OSError:
                return True
        return False


def frames_of(kind: str, source: str, target: str) -> Callable[[int], bytes]:
    """The n-th frame of a flood. Tiny packets come in one frame to a message, as from an honest node."""
    if kind != TINY:
        return FLOODS[kind]
    tiny = record(number_of(source), number_of(target), 9, 0, LEAST_BYTES)
    frame = yamux.data_frame(1, tiny * ((MESSAGE_BYTES - spec.HEADER_BYTES) // len(tiny)))
    return lambda number: frame


def main() -> None:
    kind, state_dir, address, source, target, seconds = sys.argv[1:]
    frame, until_s, ended = frames_of(kind, source, target), time.monotonic() + float(seconds), 0
    os.nice(LEAST_URGENT)
    while time.monotonic() < until_s:
        with socket.create_connection((address, P2P_PORT)) as sock:
            try:
                ended += Member(Path(state_dir), sock).flood(frame, until_s)
            except (TimeoutError, Refused, OSError):
                continue
    print(ended)


if __name__ == "__main__":
    main()
