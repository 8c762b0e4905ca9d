"""Memory that two processes share: rings and counter pages."""

from __future__ import annotations

import fcntl
import os


def create(title: str, size: int) -> int:
    """A descriptor of `size` zeroed bytes, to be passed to another process; nothing appears in any file system.

    Its size is sealed. Cut by the other side, the next access of this one would be a SIGBUS.
    """
    fd = os.memfd_create(title, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd
