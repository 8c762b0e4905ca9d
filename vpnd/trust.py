"""Whose files root obeys: a path that anybody else could change is refused before anything behind it is used.

Who can write to the state directory, to a directory above it or to the configuration file decides what the daemon does
with root's rights. So for root each directory on the way, each symbolic link followed and the file itself must be
root's and closed to writing by others; a sticky directory (/tmp) above is fine: only owners rename or remove entries.
Other users get no such protection from vpnd: it acts with their own rights.
"""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

from vpnd.errors import ConfigError

#: Symbolic links followed on the way, as many as the kernel follows.
MOST_LINKS = 40
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check(path: Path, what: str) -> None:
    """Raise ConfigError, beginning with `what`, if the absolute `path` is not root's alone; only root asks.

    What does not exist yet is fine: its directory, checked like this, is where it will be made.
    """
    if os.geteuid() != 0:
        return
    breach = _breach(path)
    if breach is not None:
        raise ConfigError(
            f"{what} {path}: {breach}, who could make root do anything; "
            "give it to root (chown root, chmod go-w), or name another"
        )


def open_file(path: Path, flags: int) -> int:
    """Open a file in a directory that was checked, made 0600. Raises OSError, ELOOP for a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


def _breach(path: Path) -> str | None:
    """Who else could change what is at `path`, in words; None for nobody."""
    waiting = list(reversed(path.parts[1:]))
    here = Path("/")
    links = 0
    while True:
        try:
            found = os.lstat(here)
        except OSError:  # not there, or not to be seen: whoever opens it says so
            return None
        if found.st_uid != 0:
            return f"{here} belongs to {_name(found.st_uid)}"
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > MOST_LINKS:
                return f"{here} is a link that leads nowhere"
            target = Path(os.readlink(here))
            waiting.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            here = Path("/") if target.is_absolute() else here.parent
            continue
        sticky_on_the_way = bool(waiting) and bool(found.st_mode & stat.S_ISVTX)
        if _open_to_others(found) and not sticky_on_the_way:
            return f"{here} may be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
        if not waiting:
            return None
        part = waiting.pop()
        here = here.parent if part == ".." else here / part


def _open_to_others(found: os.stat_result) -> bool:
    """A group of root's own is no other."""
    writable = found.st_mode & _WRITABLE_BY_OTHERS
    return bool(writable & stat.S_IWOTH) or bool(writable and found.st_gid != 0)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
