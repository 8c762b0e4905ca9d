"""Removes the status socket, and what else outlives the supervisor, when that is killed.

Children, device, addresses and routes vanish by themselves with the supervisor's descriptors; a socket's
name in the file system and routing rules do not. A tiny shell waits for the end of a pipe whose other end only the
supervisor has; it comes with the supervisor's death, however it dies. The inode is compared, so that a new
daemon's socket is left alone.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

_SCRIPT = """
trap '' HUP INT TERM
read -r nothing
[ "$(stat -c %i -- "$1" 2>/dev/null)" = "$2" ] && { rm -f -- "$1"; eval "$3"; }
exit 0
"""


class Janitor:
    """Watches over one path. `close` ends it after a clean stop.

    `commands`: lines of shell, run after a death with the socket still there; one that fails is passed over.
    """

    def __init__(self, path: str, commands: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [
                *("/bin/sh", "-c", _SCRIPT, "vpnd-janitor"),
                *(path, str(os.stat(path).st_ino), "\n".join(commands)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def close(self) -> None:
        """Let it do its work and end; waits for it, which takes a millisecond or two."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
