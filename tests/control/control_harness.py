"""Real control processes, driven by a test that plays supervisor and shards."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from vpnd import peerid
from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.api.ends import pair
from vpnd.config.schema import P2P, Config, Peer, Process, Retry
from vpnd.config.schema import Session as SessionTable
from vpnd.metrics import CONTROL_COUNTERS, create_page

REPOSITORY = Path(__file__).parents[2]
#: Nothing here takes long; a wait that does has failed.
PATIENCE_S = 60.0
#: Ciphers of Noise and how they write their nonce (https://noiseprotocol.org/noise.html, 12.3 and 12.4).
CIPHERS: dict[str, tuple[Any, str]] = {
    "chachapoly": (ChaCha20Poly1305, "<4xQ"),
    "aesgcm": (AESGCM, ">4xQ"),
}

M = TypeVar("M", bound=messages.Message)


class Identity:
    """A node's key, as the supervisor would have it in a file."""

    def __init__(self) -> None:
        key = Ed25519PrivateKey.generate()
        self.pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.peer_id = peerid.from_public_key(key.public_key().public_bytes_raw())

    @classmethod
    def pair(cls) -> tuple[Identity, Identity]:
        """Two, the one with the smaller peer id (which dials first) in front."""
        a, b = sorted((cls(), cls()), key=lambda identity: identity.peer_id)
        return a, b

    def fd(self) -> int:
        fd = os.memfd_create("identity", os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)
        os.write(fd, self.pem)
        return fd


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def peer(name: str, identity: Identity, number: int, *ports: int) -> Peer:
    addresses = tuple(f"/ip4/127.0.0.1/tcp/{port}" for port in ports)
    return Peer(name=name, peer_id=identity.peer_id, virtual_ip=f"10.86.0.{number}", addresses=addresses)


def config(listen: int | str, *peers: Peer, cipher: str = "auto", **p2p: Any) -> Config:
    address = f"/ip4/127.0.0.1/tcp/{listen}" if isinstance(listen, int) else listen
    return Config(
        p2p=P2P(listen=(address,), **{"dial_stagger": 0.2, "dial_timeout": 1.0} | p2p),
        retry=Retry(initial_interval=0.05, max_interval=0.3),
        peers=peers,
        session=SessionTable(cipher=cipher),
        process=Process(user="nobody"),
    )


def receive(channel: Channel, kind: type[M], patience_s: float = PATIENCE_S) -> tuple[M, list[int]]:
    """The next message, which must be of that kind."""
    received = receive_any(channel, patience_s)
    assert isinstance(received[0], kind), received[0]
    return received


def receive_any(channel: Channel, patience_s: float = PATIENCE_S) -> tuple[Any, list[int]]:
    deadline = time.monotonic() + patience_s
    while (received := channel.receive()) is None:
        left = deadline - time.monotonic()
        assert left > 0, "nothing came"
        select.select([channel.fileno()], [], [], left)
    return received


class Session:
    """The shard's end of a handed-over session: enough of Noise to prove the keys and the socket."""

    def __init__(self, message: messages.SessionHandover, fd: int) -> None:
        self.id, self.state = message.session_id, message.session
        self.peer_id, self.initiator = self.state.peer_id, self.state.initiator
        self.socket = socket.socket(fileno=fd)
        self.socket.settimeout(PATIENCE_S)
        kind, self._nonce = CIPHERS[self.state.cipher]
        self._send, self._receive = kind(self.state.send_key), kind(self.state.receive_key)
        self._send_nonce, self._receive_nonce = self.state.send_nonce, self.state.receive_nonce

    def send(self, data: bytes) -> None:
        sealed = self._send.encrypt(struct.pack(self._nonce, self._send_nonce), data, None)
        self._send_nonce += 1
        self.socket.sendall(struct.pack(">H", len(sealed)) + sealed)

    def receive(self) -> bytes:
        size = struct.unpack(">H", self._exactly(2))[0]
        opened = self._receive.decrypt(
            struct.pack(self._nonce, self._receive_nonce), self._exactly(size), None
        )
        self._receive_nonce += 1
        return opened

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self.socket.recv(size - len(data)) or self._ended()
        return data

    def _ended(self) -> bytes:
        raise EOFError

    def close(self) -> None:
        self.socket.close()


class FakeShard:
    """One shard, as far as control can tell."""

    def __init__(self, index: int, *, silent: bool = False) -> None:
        """`silent`: never says what it holds."""
        self.index = index
        self.peers: list[messages.PeerKnown] = []
        self.circuits: dict[str, str] = {}
        #: peers that were said to have made a session, which another shard got
        self.doubted: list[str] = []
        self._silent = silent
        self.attach()

    def attach(self, held: tuple[tuple[int, str, bool], ...] = ()) -> None:
        """A (new) channel to control, as after a control restart."""
        ours, self.theirs = pair()
        self.channel = Channel(ours, "shard", "control")
        if not self._silent:
            self.channel.send(messages.SessionsHeld(sessions=held))

    def greet(self) -> None:
        """Take in the peers."""
        while True:
            message, _ = self._next()
            if isinstance(message, messages.PeersComplete):
                return
            if isinstance(message, messages.PeerCircuit):
                assert message.peer_id in [known.peer_id for known in self.peers]
                self.circuits[message.peer_id] = message.state
                continue
            assert isinstance(message, messages.PeerKnown)
            self.peers.append(message)

    def circuit(self) -> str:
        """The next thing told must be the state of a circuit."""
        message, _ = self._next()
        assert isinstance(message, messages.PeerCircuit), message
        return message.state

    def _next(self, patience_s: float = PATIENCE_S) -> tuple[messages.Message, list[int]]:
        while True:
            message, descriptors = receive_any(self.channel, patience_s)
            if not isinstance(message, messages.SessionsDoubted):
                return message, descriptors
            self.doubted.append(message.peer_id)

    def want(self, peer_id: str, sessions: int = 1, *, urgent: bool = True) -> None:
        self.channel.send(messages.SessionWanted(peer_id=peer_id, sessions=sessions, urgent=urgent))

    def session(self, patience_s: float = PATIENCE_S, *, up: bool = True) -> Session:
        """The next session, and what is told of circuits before it."""
        while True:
            message, descriptors = self._next(patience_s)
            if isinstance(message, messages.SessionHandover):
                break
            assert isinstance(message, messages.PeerCircuit), message
            self.circuits[message.peer_id] = message.state
        session = Session(message, descriptors[0])
        if up:
            self.channel.send(messages.SessionUp(session_id=session.id, peer_id=session.peer_id))
        return session

    def down(self, session: Session, reason: str = "closed") -> None:
        session.close()
        self.channel.send(messages.SessionDown(session_id=session.id, peer_id=session.peer_id, reason=reason))

    def quiet(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        until_s = time.monotonic() + seconds
        while select.select([self.channel.fileno()], [], [], max(0.0, until_s - time.monotonic()))[0]:
            message, _ = receive_any(self.channel)
            if not isinstance(message, messages.SessionsDoubted):
                return False
            self.doubted.append(message.peer_id)
        return True


class ControlProcess:
    """`python -m vpnd.control`, with the test as its supervisor. As a context manager it cleans up."""

    def __init__(
        self,
        identity: Identity,
        configuration: Config,
        *,
        python: str = sys.executable,
        root: Path = REPOSITORY,
        network: int | None = None,
        name: str = "test",
        token: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`network`: descriptor of the directory of the node's network, which stays the caller's. `environment`: beside
        that of the test."""
        self.identity = identity
        self.page, page_fd = create_page(CONTROL_COUNTERS, "control")
        ours, theirs = pair()
        self.channel = Channel(ours, "supervisor", "control")
        self.process = subprocess.Popen(
            [python, "-m", "vpnd.control", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=root,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )
        theirs.close()
        identity_fd = identity.fd()
        start = messages.ControlStart(
            config=configuration,
            node_name=name,
            peer_id=identity.peer_id,
            virtual_ip="10.86.0.1" if network is None else "",
            token=token,
        )
        descriptors = (identity_fd, page_fd) if network is None else (identity_fd, page_fd, network)
        self.channel.send(start, descriptors)
        os.close(identity_fd)
        os.close(page_fd)
        self._serial = 0

    def ready(self, patience_s: float = PATIENCE_S) -> messages.Ready:
        return receive(self.channel, messages.Ready, patience_s)[0]

    def failed(self) -> messages.Failed:
        return receive(self.channel, messages.Failed)[0]

    def add_shard(self, shard: FakeShard) -> None:
        self.channel.send(messages.ShardArrived(index=shard.index), (shard.theirs.fileno(),))
        shard.theirs.close()
        shard.greet()

    def status(self) -> messages.ControlStatus:
        self._serial += 1
        self.channel.send(messages.StatusRequest(serial=self._serial))
        status = receive(self.channel, messages.ControlStatus)[0]
        assert status.serial == self._serial
        return status

    def state(self) -> str:
        return self.status().peers[0].state

    def counter(self, name: str) -> int:
        return self.page.read()[name]

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        with contextlib.suppress(ChannelClosed):
            self.channel.send(messages.Stop())
        return self.process.wait(PATIENCE_S)

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def __enter__(self) -> ControlProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if error is not None:
            print(self.stderr(), file=sys.stderr)
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.channel.close()


def eventually(condition: Any, patience_s: float = PATIENCE_S) -> None:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
