"""A member that sends what is cheap to send and dear to take, as fast as its machine can.

    python -m lab.flooder KIND,… STATE_DIR ADDRESS SOURCE TARGET SECONDS

It runs in the namespace of a member that is stopped, with its key, and speaks to the node at ADDRESS: libp2p's
handshake, and then the session protocol by hand; SOURCE and TARGET are virtual addresses. It floods SECONDS with each
kind. What it prints is how many sessions the node has ended meanwhile; of RECONNECTING, how many it has begun.

It yields the CPU to everybody else: the attacker has its own machine elsewhere, and what is measured is what it does to
the node, not to those who share a CPU with it here.
"""

from __future__ import annotations

import functools
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from packet.builder import V4, tcp, vnet
from packet.builder import record as framed
from packet.test_offload_slices import sliced
from simulation.packets import LEAST_BYTES, number_of, record
from stream.pair import FLOODS, HELLO_A, OPENING, PROTOCOL_ITEM

from shards.datagram import spec as wire
from shards.datagram.sealing import Batch, Sealer
from shards.stream import spec, yamux
from shards.stream.negotiate import (
    MULTISTREAM_ITEM,
    NOWHERE,
    SUBNET_NODE,
    Beside,
    decode_hello_untrusted,
    encode_hello,
)
from vpnd.packet.record import LENGTH, PACKET_OFFSET
from vpnd.session import CHACHAPOLY

from .node import P2P_PORT
from .stranger import NOISE, Plain, Refused, Secured, honest

SESSION = "/vpnd/yamux/1.0.0"
TINY = "tiny packets"
#: By datagrams that are the member's own, sealed as they are to be.
TINY_DATAGRAMS, PROBES, SLICES = "datagrams of tiny packets", "probes", "beginnings of superpackets"
DATAGRAMS = (TINY_DATAGRAMS, PROBES, SLICES)
#: By a node of the system that vpnd is rebuilt from.
BARE = "tiny packets of a subnet node"
#: Sessions that end as soon as they have begun.
RECONNECTING = "sessions that begin and end"
#: So much fits into one Noise message.
MESSAGE_BYTES = 65_000
OPEN = yamux.window_update(1, 0, spec.FLAG_SYN) + yamux.data_frame(1, OPENING)
#: As a subnet node opens a stream, behind libp2p's own muxer.
BARE_SESSION = "/yamux/1.0.0"
BARE_OPEN = yamux.window_update(1, 0, spec.FLAG_SYN) + yamux.data_frame(
    1, MULTISTREAM_ITEM + SUBNET_NODE.item
)
LEAST_URGENT = 19
#: A member whose session is silent may be taken for dead.
SIGN_OF_LIFE_S = 0.3
UDP_SEGMENT = 103
LONGER_S = 5.0


class Member(Secured):
    """A session with the node at `address` as the member of that state directory, with one stream open."""

    def __init__(
        self, state_dir: Path, sock: socket.socket, session: str = SESSION, opening: bytes = OPEN
    ) -> None:
        key = load_pem_private_key((state_dir / "identity.pem").read_bytes(), None)
        Plain(sock).select(NOISE)
        super().__init__(sock, honest(cast(Ed25519PrivateKey, key)), initiator=True)
        self.select(session)
        self.send(opening)

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


class Datagrams:
    """What goes beside a session of that member."""

    def __init__(self, state_dir: Path, sock: socket.socket) -> None:
        hello = encode_hello(HELLO_A, Beside(receiver=1, port=P2P_PORT))
        opening = MULTISTREAM_ITEM + PROTOCOL_ITEM + hello
        self.member = Member(
            state_dir, sock, opening=yamux.window_update(1, 0, spec.FLAG_SYN) + yamux.data_frame(1, opening)
        )
        theirs = self._told()
        key = self.member._noise.noise_protocol.cipher_state_encrypt.k
        self.sealer, self.batch = Sealer(CHACHAPOLY, key, theirs.receiver), Batch(1 << 18)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((sock.getpeername()[0], theirs.port))

    def _told(self) -> Beside:
        """What the node's HELLO says of datagrams."""
        said, member, before = b"", self.member, len(MULTISTREAM_ITEM + PROTOCOL_ITEM)
        while len(said) <= before or len(said) < before + 1 + said[before]:
            _, kind, _, _, length = spec.HEADER.unpack(member.receive(spec.HEADER_BYTES))
            said += member.receive(length) if kind == spec.TYPE_DATA else b""
        _, theirs = decode_hello_untrusted(said[before + 1 : before + 1 + said[before]])
        assert theirs != NOWHERE
        return theirs

    def flood(self, seal: Callable[[Sealer, Batch], None], until_s: float) -> bool:
        """Seal and send; whether the node has ended the session."""
        heard_s = number = 0
        while (now_s := time.monotonic()) < until_s:
            if now_s > heard_s + SIGN_OF_LIFE_S:
                if self.member.ended():
                    return True
                heard_s, number = now_s, number + 1
                self.member.send(yamux.ping(number, spec.FLAG_SYN))
            batch = self.batch
            seal(self.sealer, batch)
            batch.end_run()
            for begin, end, size, _ in batch.runs:
                ancillary = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", size))
                self._socket.sendmsg((batch.view[begin:end],), (ancillary,))
            batch.clear()
        return False


def sealing(kind: str, source: str, target: str) -> Callable[[Sealer, Batch], None]:
    """What makes a batch of such datagrams."""
    tiny = record(number_of(source), number_of(target), 9, 0, LEAST_BYTES)
    body = tiny * ((wire.BASE_BYTES - wire.OVERHEAD_BYTES) // len(tiny))
    if kind == PROBES:
        body = wire.PROBE.pack(wire.PROBE_WORD, 7, 0, 0, 0)
    elif kind == SLICES:
        body = sliced(framed(vnet(tcp(V4, bytes(3000)), gso_size=1000)))[0]

    def seal(sealer: Sealer, batch: Batch) -> None:
        for _ in range(2 * wire.MAX_BATCH):
            sealer.seal(batch, body)

    return seal


def frames_of(kind: str, source: str, target: str) -> Callable[[int], bytes]:
    """The n-th frame of a flood. Tiny packets come in one frame to a message, as from an honest node."""
    if kind not in (TINY, BARE):
        return FLOODS[kind]
    tiny = record(number_of(source), number_of(target), 9, 0, LEAST_BYTES)
    if kind == BARE:
        tiny = LENGTH.pack(LEAST_BYTES) + tiny[PACKET_OFFSET:]
    frame = yamux.data_frame(1, tiny * ((MESSAGE_BYTES - spec.HEADER_BYTES) // len(tiny)))
    return lambda number: frame


def begun(
    kind: str, state_dir: Path, sock: socket.socket, source: str, target: str
) -> Callable[[float], bool]:
    """A session of which that is to come: what goes on with it until a time, and says whether it counts."""
    if kind == RECONNECTING:
        Member(state_dir, sock)
        return lambda until_s: True
    if kind in DATAGRAMS:
        return functools.partial(Datagrams(state_dir, sock).flood, sealing(kind, source, target))
    words = (BARE_SESSION, BARE_OPEN) if kind == BARE else (SESSION, OPEN)
    return functools.partial(Member(state_dir, sock, *words).flood, frames_of(kind, source, target))


def counted(kind: str, state_dir: Path, address: str, source: str, target: str, seconds: float) -> int:
    """Flood so long, from when the first session has begun; with what is to end one until it has, on a machine that
    leaves this program little time."""
    until_s, count = math.inf, 0
    while time.monotonic() < until_s + (LONGER_S if kind in FLOODS and not count else 0.0):
        with socket.create_connection((address, P2P_PORT)) as sock:
            try:
                flooding = begun(kind, state_dir, sock, source, target)
                until_s = min(until_s, time.monotonic() + seconds)
                count += flooding(until_s + (LONGER_S if kind in FLOODS and not count else 0.0))
            except (TimeoutError, Refused, OSError):
                continue
    return count


def main() -> None:
    kinds, state_dir, address, source, target, seconds = sys.argv[1:]
    os.nice(LEAST_URGENT)
    for kind in kinds.split(","):
        print(counted(kind, Path(state_dir), address, source, target, float(seconds)))


if __name__ == "__main__":
    main()
