"""What a node keeps of its network over a restart: files in one directory, each readable by its owner only.

    network.bin      the description of the network          also what says that there is one
    authority.key    the authority key, PKCS#8 in PEM        only on authorities
    directory.bin    statements                              head, then for each: u16 length, bytes; seal
    invitations.bin  invitations, with hashes of secrets     only on authorities; head, then msgpack
    state_format     the number of this format               missing: 1, which has no previous generations

A file is replaced whole (written beside, fsync, renamed, directory fsync): a kill or a power cut leaves the old or the
new. The one before it is kept as NAME.old (of the key there is but one), for disks that lose what they said they wrote:

    network.bin      the other copy is used
    directory.bin    everything that can be read of both is used: each statement proves itself, the rest comes by gossip
    invitations.bin  the one before is used; when that is damaged too, there are none
    authority.key    is an error that names the file

What was damaged is written anew at the next start (`heal`), so that there are two generations again.

The statements of a directory were verified when they came, and are not once more when they are read from a file whose
seal is good, for that is what made a node with 10,000 members wait. The seal, a zero length and a SHA-256 of all before
it, tells damage, and tells of a file that was verified by other rules. Against forgery it does nothing, and need not:
who can write into this directory (process.user, in a directory that is root's and 0700) can as well replace
network.bin, whose root key every statement is verified against, and sign what it likes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vpnd.config.paths import NETWORK_NAME
from vpnd.errors import ConfigError
from vpnd.identity import from_pem, to_pem
from vpnd.membership import network as network_format
from vpnd.membership.invitations import Invitation
from vpnd.membership.network import Network
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import MAX_STATEMENT

KEY = "authority.key"
DIRECTORY = "directory.bin"
INVITATIONS = "invitations.bin"
FORMAT = "state_format"
#: Added to the name of a file: what it was before.
OLD = ".old"
FORMAT_NUMBER = 2

_DIRECTORY_HEAD = b"vpnd directory 1\n"
#: Part of what is sealed. To be changed whenever `statements` refuses what it took before.
_RULES = b"verified by rules 1\n"
_INVITATIONS_HEAD = b"vpnd invitations 1\n"
_LENGTH_BYTES = 2

#: What reading a damaged file raises.
_DAMAGE = (MembershipRefused, msgspec.MsgspecError, ValueError)

Found = TypeVar("Found")


log = logging.getLogger(__name__)


#: What helps against the kernel's refusal to use a file.
_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room: the quota of process.user is used up",
    errno.EROFS: "make that file system writable (mount -o remount,rw), or give another --state-dir",
    errno.EACCES: "start the node again: it gives the directory to process.user",
    errno.EPERM: "is it immutable (lsattr)? chattr -i",
    errno.EIO: "the disk fails: see dmesg",
}


class StoreError(ConfigError):
    """A file of the network's state cannot be read or written; it is left as it is. The text names file and remedy."""


class Store:
    """The state of one network in the directory `path`, which is made (0700) when missing. Raises StoreError.

    Works through a descriptor of the directory, so the path need not be reachable. Owner: one process.
    """

    def __init__(self, path: Path, fd: int | None = None) -> None:
        """`fd`: of the directory, which is the store's from then on; `path` only stands in texts then."""
        self._path = path
        try:
            if fd is None:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._fd = fd
        except OSError as error:
            raise StoreError(f"{path}: cannot be used ({error.strerror}); give another --state-dir") from None
        self._writing = threading.Lock()
        self._damaged: set[str] = set()  # names of files that are not to become the generation before

    def upgrade(self) -> None:
        """Bring the files of an older version to this format. Raises StoreError for those of a newer one."""
        data = self._read(FORMAT)
        try:
            number = 1 if data is None else int(data)
        except ValueError:
            number = FORMAT_NUMBER  # damaged; whatever it said, this program wrote it
        if number > FORMAT_NUMBER:
            raise StoreError(
                f"{self._path}: was written by a newer vpnd (format {number}, this one knows {FORMAT_NUMBER}); start "
                "that one, or give another --state-dir"
            )
        network = self._read(NETWORK_NAME)
        if number == 1 and network is not None:
            self._replace(NETWORK_NAME + OLD, network)
            self._replace(FORMAT, str(FORMAT_NUMBER).encode())

    def close(self) -> None:
        """Close the descriptor; nothing is lost, for every save is complete when it returns."""
        os.close(self._fd)

    def load_network(self) -> Network | None:
        found, why = self._first_good(NETWORK_NAME, network_format.parse_untrusted)
        if found is None and why:
            raise self._lost(NETWORK_NAME, why)
        return found

    def save_network(self, network: Network) -> None:
        """From now on this node is in that network."""
        self._replace(FORMAT, str(FORMAT_NUMBER).encode())
        self._replace(NETWORK_NAME + OLD, network.encode())
        self._replace(NETWORK_NAME, network.encode())

    def load_key(self) -> Ed25519PrivateKey | None:
        data = self._read(KEY)
        if data is None:
            return None
        key = from_pem(data)
        if key is None:
            raise self._lost(KEY, "is damaged (it is not an ed25519 key in PEM without password)")
        return key

    def save_key(self, key: Ed25519PrivateKey) -> None:
        """Keep an authority key. One that is there is never overwritten: raises StoreError."""
        if self._read(KEY) is not None:
            raise StoreError(f"{self._path / KEY}: there is an authority key already; move it away first")
        self._replace(KEY, to_pem(key))

    def load_statements(self) -> tuple[list[bytes], bool]:
        """The statements of the directory (`Directory.restore`), and whether all are as they were when this program
        verified and saved them."""
        data, before = self._read(DIRECTORY), self._read(DIRECTORY + OLD)
        if data is None and before is None:
            return [], True
        found, sealed = _statements(data or b"")
        if sealed:
            return found, True
        self._damaged.add(DIRECTORY)
        return list(dict.fromkeys([*found, *_statements(before or b"")[0]])), False

    def save_statements(self, wires: Iterable[bytes]) -> None:
        """Keep the statements `Directory.statements` gives, verified all of them, instead of those before."""
        records = (len(wire).to_bytes(_LENGTH_BYTES) + wire for wire in wires)
        data = b"".join((_DIRECTORY_HEAD, *records))
        self._write(DIRECTORY, data + _seal(data))

    def load_invitations(self) -> tuple[Invitation, ...]:
        found, why = self._first_good(INVITATIONS, _invitations)
        if found is None and why:
            log.error("%s: %s; tokens given out are void, members are not", self._path / INVITATIONS, why)
        return found or ()

    def save_invitations(self, invitations: tuple[Invitation, ...]) -> None:
        self._write(INVITATIONS, _INVITATIONS_HEAD + msgspec.msgpack.encode(invitations))

    def heal(
        self,
        network: Network,
        invitations: tuple[Invitation, ...],
        statements: Callable[[], Iterable[bytes]],
    ) -> None:
        """Have two good generations of everything again: what was damaged when it was loaded is written anew, from what
        was used instead, and the one before it where it is damaged or gone. What cannot be written now is logged."""
        try:
            if NETWORK_NAME in self._damaged or self._read(NETWORK_NAME) is None:
                self._replace(NETWORK_NAME, network.encode())
            if INVITATIONS in self._damaged:
                self.save_invitations(invitations)
            if DIRECTORY in self._damaged:
                self.save_statements(statements())
            for name in _PARSERS:
                data = self._read(name)
                if data is not None and _good(name, self._read(name + OLD)) is None:
                    self._replace(name + OLD, data)
        except StoreError as error:
            log.warning("of what was damaged there is one good copy only: %s", error)

    def forget_authority(self) -> None:
        """What an authority has of another network than this one goes: its key and its invitations."""
        self._unlink(INVITATIONS, INVITATIONS + OLD, KEY)

    def forget(self) -> None:
        """Leave the network: everything of it goes, the authority key too. What says that there is one goes last."""
        files = (INVITATIONS, DIRECTORY, KEY, NETWORK_NAME)
        self._unlink(*(name + OLD for name in files), FORMAT, *files)

    def _unlink(self, *names: str) -> None:
        for name in names:
            try:
                os.unlink(name, dir_fd=self._fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self._refused(name, "removed", error) from None
        os.fsync(self._fd)

    def _read(self, name: str) -> bytes | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._fd)
            with os.fdopen(fd, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refused(name, "read", error) from None

    def _first_good(self, name: str, parse: Callable[[bytes], Found]) -> tuple[Found | None, str]:
        """What is in a file, or else in the generation before it; and why nothing, when there is one but none is
        good."""
        why = ""
        for candidate in (name, name + OLD):
            data = self._read(candidate)
            if data is None:
                continue
            try:
                found = parse(data)
            except _DAMAGE as error:
                self._damaged.add(candidate)
                why = why or f"is damaged ({error})"
                continue
            if why:
                log.warning("%s: %s; the one before it is used", self._path / name, why)
            return found, ""
        return None, why

    def _write(self, name: str, data: bytes) -> None:
        """Replace a file; the one there was is kept, unless it is damaged."""
        with self._writing:
            self._replace(name, data, keep=name not in self._damaged)
            self._damaged.discard(name)

    def _keep_before(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name + OLD, dir_fd=self._fd)
        # a file system without links has no generation before
        with contextlib.suppress(OSError):
            os.link(name, name + OLD, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def _replace(self, name: str, data: bytes, *, keep: bool = False) -> None:
        beside = f".{name}.{secrets.token_hex(8)}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(beside, flags, 0o600, dir_fd=self._fd)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if keep:
                    self._keep_before(name)
                os.rename(beside, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except BaseException:
                os.unlink(beside, dir_fd=self._fd)
                raise
            os.fsync(self._fd)
        except OSError as error:
            raise self._refused(name, "written", error) from None

    def _refused(self, name: str, what: str, error: OSError) -> StoreError:
        remedy = _REMEDIES.get(error.errno or 0, f"ls -l {self._path} shows what is in the way; move it away")
        return StoreError(f"{self._path / name}: cannot be {what} ({error.strerror}); {remedy}")

    def _lost(self, name: str, why: str) -> StoreError:
        remedy = (
            "put a good copy back; without one only `vpnd leave` is left, and of the only authority this ends"
        )
        return StoreError(f"{self._path / name}: {why}; {remedy} the network")


def _statements(data: bytes) -> tuple[list[bytes], bool]:
    """Those that are whole, and whether that is all that was saved."""
    if not data.startswith(_DIRECTORY_HEAD):
        return [], False
    found: list[bytes] = []
    place = len(_DIRECTORY_HEAD)
    while place < len(data):
        start = place + _LENGTH_BYTES
        length = int.from_bytes(data[place:start])
        if length == 0:
            return found, data[place:] == _seal(data[:place])
        place = start + length
        if place > len(data) or length > MAX_STATEMENT:
            return found, False
        found.append(data[start:place])
    return found, False


def _invitations(data: bytes) -> tuple[Invitation, ...]:
    if not data.startswith(_INVITATIONS_HEAD):
        raise ValueError("it does not begin as it should")
    return msgspec.msgpack.decode(data[len(_INVITATIONS_HEAD) :], type=tuple[Invitation, ...])


def _sealed(data: bytes) -> list[bytes]:
    found, whole = _statements(data)
    if not whole:
        raise ValueError("its seal is broken")
    return found


#: How those of which there are two generations are read; each raises one of _DAMAGE.
_PARSERS: dict[str, Callable[[bytes], object]] = {
    NETWORK_NAME: network_format.parse_untrusted,
    INVITATIONS: _invitations,
    DIRECTORY: _sealed,
}


def _good(name: str, data: bytes | None) -> bytes | None:
    """What a file or its generation before has in it; None when it is damaged or gone."""
    try:
        _PARSERS[name](data or b"")
    except _DAMAGE:
        return None
    return data


def _seal(data: bytes) -> bytes:
    return bytes(_LENGTH_BYTES) + hashlib.sha256(_RULES + data).digest()
