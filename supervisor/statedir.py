"""The parts of the state directory that belong to the running daemon: its lock, and the network's directory.

The state directory is root's alone. In it `network/` belongs to process.user and is given to control as a descriptor,
so control can use what it could not reach by its path.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from pathlib import Path

from vpnd import privileges, trust
from vpnd.config import paths
from vpnd.config.schema import Config
from vpnd.errors import AlreadyRunningError, MachineError

#: Of the network's directory: process.user's, and root's group may read it.
NETWORK_MODE = 0o750


def lock(config: Config) -> int:
    """Lock the state directory, made when missing: a descriptor, and the lock goes with it, however we end.

    Raises AlreadyRunningError while another daemon has it, ConfigError when others than root could change what is in
    it, MachineError when it cannot be used.
    """
    path = paths.lock_file(config)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        trust.check(path.parent, "state directory")
        fd = trust.open_file(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}; choose another --state-dir") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyRunningError(
            f"a vpnd is running in {path.parent}: stop it with `vpnd stop`, or choose another --state-dir"
        ) from None
    return fd


def open_network(config: Config) -> int:
    """A descriptor of the network's directory, made when missing; it and what is in it are process.user's then, and
    root's group may look into it: no right of root's is needed to get past its mode.

    Raises PrivilegeError for a user that does not exist, MachineError when the directory cannot be used.
    """
    path = paths.network_dir(config)
    user = privileges.entry_of(config.process.user)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        as_wanted = (found.st_gid, stat.S_IMODE(found.st_mode)) == (0, NETWORK_MODE)
        if stat.S_ISDIR(found.st_mode) and not as_wanted:
            os.chown(path, 0, 0, follow_symlinks=False)  # only its owner sets a mode
            os.chmod(path, NETWORK_MODE)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        if found.st_uid != user.pw_uid:
            _hand_over(fd, found.st_uid, user.pw_uid, user.pw_gid)
        os.fchown(fd, user.pw_uid, 0)
    except OSError as error:
        os.close(fd)
        raise _unusable(path, error) from error
    return fd


def _hand_over(fd: int, former: int, uid: int, gid: int) -> None:
    """Another process.user than before: it gets the files that were the former user's. Nothing else, for that user
    could have linked another's file into the directory."""
    for name in os.listdir(fd):
        try:
            file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except OSError:  # gone
            continue
        try:  # by the descriptor, for the former user may put another file under the name at any time
            found = os.fstat(file)
            if stat.S_ISREG(found.st_mode) and found.st_uid == former and found.st_nlink == 1:
                os.chown(f"/proc/self/fd/{file}", uid, gid)
        finally:
            os.close(file)


def _unusable(path: Path, error: OSError) -> MachineError:
    return MachineError(f"{path}: {error.strerror}; move it away, or choose another --state-dir")


def page_token(config: Config) -> str:
    """What browsers must show to see the page: made once, so that bookmarks stay good. Raises MachineError."""
    path = paths.page_token_file(config)
    try:
        with os.fdopen(trust.open_file(path, os.O_RDWR | os.O_CREAT), "r+") as file:
            token = file.read(256).strip()
            if not token:
                token = secrets.token_urlsafe(24)
                file.write(f"{token}\n")
            return token
    except (OSError, ValueError) as error:
        raise MachineError(f"{path}: {error}; move it away and start again") from error
