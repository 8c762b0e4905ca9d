"""The two ends of a channel, made before anybody speaks over it: so nothing of what is said is imported here."""

from __future__ import annotations

import contextlib
import socket

#: Longest datagram; PeerKnown and status are the largest, far below. Also asked for as SO_SNDBUF.
MAX_MESSAGE_BYTES = 1 << 20

#: asm-generic/socket.h; Python has no name for it.
SO_SNDBUFFORCE = 32


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, non-blocking, close-on-exec, with room for the largest message."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE_BYTES)
        # Most machines allow less than that (net.core.wmem_max), but not to the supervisor.
        with contextlib.suppress(PermissionError):
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * MAX_MESSAGE_BYTES)
    return ends
