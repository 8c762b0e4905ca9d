"""Log lines of all processes of a node: one line each on standard error, which the children inherit.

2026-01-31T12:00:00.123 info  shard 2: session 1f with b is up

A node never waits for who reads its output: what a full pipe does not take is dropped, and counted in the next line
that it takes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import sys

from vpnd.printable import printable


class _Format(logging.Formatter):
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line, whatever a peer has put into an error that is logged."""
        record.message = printable(record.message)
        return super().formatMessage(record)


class Output:
    """A standard stream that is never waited for. Owner: one process; any thread.

    Pipes and terminals are opened once more, for a mode set on the descriptor itself would be that of every program
    that shares it. Where that is not permitted it is asked first whether a line would do.
    """

    def __init__(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        self._fd, self._socket, self._ask = fd, None, False
        self._dropped = 0
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            try:
                self._fd = os.open(f"/proc/self/fd/{fd}", flags)
            except OSError:  # another user's, or its reader has gone
                self._ask = True

    def tell(self, line: str) -> None:
        """Write a line, or drop it. Raises OSError, BrokenPipeError when its reader has gone."""
        note = f"{self._dropped} lines were dropped here: nobody read them\n" if self._dropped else ""
        try:
            self._send(f"{note}{line}\n".encode(errors="backslashreplace"))
        except BlockingIOError:
            self._dropped += 1
        else:
            self._dropped = 0

    def _send(self, data: bytes) -> None:
        if self._socket is not None:
            self._socket.send(data, socket.MSG_DONTWAIT)
        elif self._ask and not _takes_a_line(self._fd):
            raise BlockingIOError
        else:
            os.write(self._fd, data)

    def write(self, text: str) -> None:
        """`tell`, for logging: of an output that is gone there is nobody to complain to."""
        with contextlib.suppress(OSError):
            self.tell(text.removesuffix("\n"))

    def flush(self) -> None:
        """Nothing is kept back."""


def _takes_a_line(fd: int) -> bool:
    """Whether a pipe has room for PIPE_BUF bytes."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def configure(level: str, process: str) -> logging.Handler:
    """Send this process's log to standard error, each line named after `process`. Returns the handler, for
    libraries whose loggers do not propagate."""
    handler = logging.StreamHandler(Output(sys.stderr.fileno()))
    handler.setFormatter(_Format(f"%(asctime)s %(levelname)-7s {process}: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)
    return handler


def set_level(level: str) -> None:
    """Another level from now on: debug, info, warning or error."""
    logging.getLogger().setLevel(level.upper())
