"""libp2p peers of other makers, built from go/ and node/ beside this file, told by lines of JSON what to do."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from lab import LabError, Namespace

HERE = Path(__file__).resolve().parent
#: What is built stays, so that the second run needs neither network nor minutes.
BUILT = Path(sysconfig.get_path("data")) / "interop"
BUILD_S = 600
#: protobuf: field 1, type ed25519; field 2, 64 bytes: seed and public key
KEY_HEADER = b"\x08\x01\x12\x40"


class Unavailable(Exception):
    """A toolchain is not on this machine; the message says which."""


def _need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise Unavailable(f"{program} is not installed")
    return found


def _build(where: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=BUILD_S, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}")


@functools.cache
def go_programs() -> Path:
    """Where the programs of go/ are, by the names of their folders. Raises Unavailable without Go."""
    BUILT.mkdir(exist_ok=True)
    _build(HERE / "go", _need("go"), "build", "-o", f"{BUILT}/", "./...")
    return BUILT


def go_peer() -> tuple[str, ...]:
    """The command of go-libp2p's peer. Raises Unavailable."""
    return (str(go_programs() / "peer"),)


@functools.cache
def node_peer() -> tuple[str, ...]:
    """The command of js-libp2p's peer. Raises Unavailable without npm. The Node.js it needs comes with its packages:
    many systems have an older one."""
    where = BUILT / "node"
    where.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json", "peer.mjs"):
        shutil.copyfile(HERE / "node" / name, where / name)
    lock = where / "package-lock.json"
    stamp = where / "node_modules" / ".lock"
    if not stamp.exists() or stamp.read_bytes() != lock.read_bytes():
        _build(where, _need("npm"), "ci", "--no-audit", "--no-fund")
        shutil.copyfile(lock, stamp)
    return (str(where / "node_modules" / "node" / "bin" / "node"), str(where / "peer.mjs"))


PEERS: dict[str, Callable[[], tuple[str, ...]]] = {"go": go_peer, "js": node_peer}


def write_key(key: Ed25519PrivateKey, directory: Path) -> Path:
    """A file with the key as libp2p has it."""
    file = directory / "foreign.key"
    file.touch(mode=0o600)
    file.write_bytes(KEY_HEADER + key.private_bytes_raw() + key.public_key().public_bytes_raw())
    return file


class Foreign:
    """One running peer. `key`: its identity; `listen`: a multiaddr, or "none"; `namespace`: where, or here."""

    def __init__(
        self,
        command: tuple[str, ...],
        key: Ed25519PrivateKey,
        directory: Path,
        listen: str = "none",
        namespace: Namespace | None = None,
    ) -> None:
        file = write_key(key, directory)
        inside = ("ip", "netns", "exec", namespace.name) if namespace is not None else ()
        self._log = (directory / "foreign.log").open("ab")
        self._process = subprocess.Popen(
            [*inside, *command, str(file), listen],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.peer_id = str(self._answer()["peer_id"])

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """What comes of a command; `error` in it when it failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        """As `ask`. Raises LabError when it failed."""
        answer = self.ask(what, **arguments)
        if "error" in answer:
            raise LabError(f"{what}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LabError(f"the peer ended; see {self._log.name}")
        return dict(json.loads(line))
