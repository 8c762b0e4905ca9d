"""One who speaks libp2p's handshake by hand, over a socket, with whatever in it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from noise.connection import Keypair, NoiseConnection

MULTISTREAM = "/multistream/1.0.0"
NOISE = "/noise"
#: What a libp2p key of another kind begins with; see the PublicKey message of libp2p's peer ids.
RSA, ED25519 = 0, 1
_SIGNED = b"noise-libp2p-static-key:"
_LENGTH = struct.Struct("!H")


class Refused(Exception):
    """The other side hung up, or said no."""


class Plain:
    """A connection that multistream-select is spoken on."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, count: int) -> bytes:
        """Exactly so many bytes. Raises Refused at the end of the connection."""
        data = b""
        while len(data) < count:
            try:
                more = self.sock.recv(count - len(data))
            except ConnectionError:
                more = b""
            if not more:
                raise Refused("closed")
            data += more
        return data

    def say(self, *lines: str) -> None:
        """Messages of multistream-select, none longer than 126 bytes, in one write."""
        self.send(b"".join(bytes([len(line) + 1]) + line.encode() + b"\n" for line in lines))

    def hear(self) -> str:
        """One message of multistream-select."""
        return self.receive(self.receive(1)[0])[:-1].decode()

    def select(self, *protocols: str) -> str:
        """As a dialer: the first of them that the other side agrees to. Raises Refused."""
        self.say(MULTISTREAM)
        assert self.hear() == MULTISTREAM
        for protocol in protocols:
            self.say(protocol)
            if self.hear() == protocol:
                return protocol
        raise Refused("na")

    def serve(self, *protocols: str) -> str:
        """As a listener: what the other side chose of these. Raises Refused."""
        assert self.hear() == MULTISTREAM
        self.say(MULTISTREAM)
        while (wanted := self.hear()) not in protocols:
            self.say("na")
        self.say(wanted)
        return wanted


#: The identity part of a Noise handshake, from the static key of its sender.
Payload = Callable[[bytes], bytes]


class Secured(Plain):
    """The same inside of Noise. The handshake is the constructor's; `wire` sends a handshake message as it is."""

    def __init__(self, sock: socket.socket, payload: Payload, *, initiator: bool) -> None:
        super().__init__(sock)
        static = os.urandom(32)
        noise = NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256")
        (noise.set_as_initiator if initiator else noise.set_as_responder)()
        noise.set_keypair_from_private_bytes(Keypair.STATIC, static)
        noise.start_handshake()
        ours = payload(noise.noise_protocol.keypairs["s"].public_bytes)
        self._noise, self._plain = noise, b""
        if initiator:
            self._wire(noise.write_message(b""))
            noise.read_message(self._message())
            self._wire(noise.write_message(ours))
        else:
            noise.read_message(self._message())
            self._wire(noise.write_message(ours))
            noise.read_message(self._message())

    def _wire(self, message: bytes) -> None:
        self.sock.sendall(_LENGTH.pack(len(message)) + message)

    def _message(self) -> bytes:
        return super().receive(_LENGTH.unpack(super().receive(_LENGTH.size))[0])

    def send(self, data: bytes) -> None:
        self._wire(self._noise.encrypt(data))

    def receive(self, count: int) -> bytes:
        while len(self._plain) < count:
            self._plain += self._noise.decrypt(self._message())
        taken, self._plain = self._plain[:count], self._plain[count:]
        return taken


def field(number: int, data: bytes) -> bytes:
    """A field of bytes of a protobuf message."""
    length = len(data)
    varint = b""
    while length > 0x7F:
        varint += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + data


def public_key(kind: int, data: bytes) -> bytes:
    """A key as libp2p has it."""
    return bytes([0x08, kind]) + field(2, data)


def honest(key: Ed25519PrivateKey) -> Payload:
    """The payload of whoever holds `key`."""

    def payload(static: bytes) -> bytes:
        identity = public_key(ED25519, key.public_key().public_bytes_raw())
        return field(1, identity) + field(2, key.sign(_SIGNED + static))

    return payload


def with_key(kind: int, data: bytes) -> Payload:
    """A payload with any key, and a signature that is none."""
    return lambda static: field(1, public_key(kind, data)) + field(2, bytes(64))


def der_number(value: bytes) -> bytes:
    """An INTEGER of DER, long form."""
    return b"\x02\x82" + len(value).to_bytes(2, "big") + value


def rsa_bomb(length: int) -> bytes:
    """An RSA key (PKCS #1) with a modulus of so many bytes: what decodes it first looks whether it is a good number."""
    modulus = b"\x00" + b"\xff" * (length - 1) + b"\x01"
    body = der_number(modulus) + b"\x02\x03\x01\x00\x01"
    return b"\x30\x82" + len(body).to_bytes(2, "big") + body
