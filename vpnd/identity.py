"""Who a node is: an ed25519 key in a file of its own, and the peer id that follows from it.

The file is PKCS#8 in PEM, readable by its owner only. Nothing here logs, prints or puts into an error any
part of the private key.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vpnd import peerid, trust
from vpnd.errors import ConfigError, PrivilegeError
from vpnd.peerid import Identity

#: An ed25519 key in PEM has 119 bytes; a file larger than this is something else.
MAX_FILE_BYTES = 16384


def load_or_create(path: Path) -> Identity:
    """The identity in the absolute `path`; without such a file a new one is made, with the directories above it.

    Safe against another process doing the same: both end with the same identity. Raises ConfigError when the
    file cannot be used or others could change it (it is never overwritten), PrivilegeError when this user may not
    read or make it.
    """
    trust.check(path, "identity file")
    try:
        return _public(read_private(path))
    except FileNotFoundError:
        pass
    try:
        _create(path)
    except PermissionError:
        raise PrivilegeError(
            f"{path}: the identity may not be made by this user; run with sudo, or give --state-dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path}: the identity cannot be made ({error.strerror}); give another --state-dir"
        ) from None
    return _public(read_private(path))


def _public(key: Ed25519PrivateKey) -> Identity:
    raw = key.public_key().public_bytes_raw()
    return Identity(peer_id=peerid.from_public_key(raw), public_key=raw)


def read_private(source: int | Path) -> Ed25519PrivateKey:
    """The private key in a file, or behind a descriptor (read from its start; it stays the caller's).

    Raises ConfigError naming file and remedy; FileNotFoundError when there is no such file.
    """
    name = f"descriptor {source}" if isinstance(source, int) else str(source)
    try:
        fd = (
            os.dup(source)
            if isinstance(source, int)
            else os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        )
    except FileNotFoundError:
        raise
    except PermissionError:
        raise PrivilegeError(f"{name}: may not be read by this user; run with sudo") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); see p2p.identity_file") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{name}: is not a file; see p2p.identity_file")
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise ConfigError(f"{name}: is open to other users (mode {mode:04o}); close it: chmod 600 {name}")
        data = os.pread(fd, MAX_FILE_BYTES + 1, 0)
    finally:
        os.close(fd)
    key = from_pem(data) if len(data) <= MAX_FILE_BYTES else None
    if key is None:
        remedy = "put the right file back, or move it away for a new identity"
        raise ConfigError(f"{name}: is not an ed25519 private key in PEM without password; {remedy}")
    return key


def from_pem(data: bytes) -> Ed25519PrivateKey | None:
    """The private key in `data`; None where there is none, or one of another kind or with a password."""
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
        return None
    return key if isinstance(key, Ed25519PrivateKey) else None


def to_pem(key: Ed25519PrivateKey) -> bytes:
    """What `from_pem` reads: PKCS#8 without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _create(path: Path) -> None:
    """Make the file whole or not at all: written beside its place, then linked to it unless it is taken."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = to_pem(Ed25519PrivateKey.generate())
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)
        except FileExistsError:
            return  # another process was first: its key is the identity
    finally:
        os.unlink(beside)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
