"""Log lines of all processes of a node: one line each on standard error, which the children inherit.

    plain     2026-01-31T12:00:00.123 info    shard 2: session 1f with b is up
    logfmt    time=2026-01-31T12:00:00.123 level=info process="shard 2" message="session 1f with b is up"
    json      {"time":"2026-01-31T12:00:00.123","level":"info","process":"shard 2","message":"session 1f with b is up"}

Where standard error is systemd's journal, which keeps the time and has levels of its own, a line has no time and begins
with its level as sd-daemon(3) has it: <6>.

A node never waits for who reads its output: what a full pipe does not take is dropped, and counted in the next line
that it takes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import socket
import stat
import sys
from collections.abc import Callable

from vpnd.config.live import Live
from vpnd.config.schema import Log
from vpnd.printable import many, printable

_WORD = re.compile(r"[A-Za-z0-9_./:@+-]+")
#: Of syslog(3), from the most severe down.
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


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


class _Fields(logging.Formatter):
    """Names and values: one line for each event, be there an exception in it or not."""

    default_time_format, default_msec_format = _Format.default_time_format, _Format.default_msec_format

    def __init__(self, process: str, *, as_json: bool) -> None:
        super().__init__()
        self._process, self._as_json = process, as_json

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if self._as_json:
            return json.dumps(fields, separators=(",", ":"))
        return " ".join(f"{name}={_word(value)}" for name, value in fields.items())


def _word(value: str) -> str:
    """A value as logfmt has it: quoted where it is more than a word."""
    return value if _WORD.fullmatch(value) else json.dumps(value)


class _Journal(logging.Formatter):
    """For systemd's journal: each line, those of an exception too, begins with its priority."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        priority = next(each for level, each in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in self._inner.format(record).split("\n"))


def is_journal(fd: int) -> bool:
    """Whether that is systemd's journal: JOURNAL_STREAM has its device and inode (systemd.exec(5))."""
    found = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


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
        note = f"{many(self._dropped, 'line')} dropped here: nobody read them\n" if self._dropped else ""
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


def configure(settings: Log, process: str) -> logging.Handler:
    """Send this process's log to standard error, each line named after `process`. Returns the handler, for
    libraries whose loggers do not propagate."""
    fd = sys.stderr.fileno()
    handler = logging.StreamHandler(Output(fd))
    handler.setFormatter(_formatter(settings.format, process, journal=is_journal(fd)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(settings.level)
    return handler


def _formatter(form: str, process: str, *, journal: bool) -> logging.Formatter:
    made: logging.Formatter
    if form == "plain":
        made = _Format(f"{'' if journal else '%(asctime)s %(levelname)-7s '}{process}: %(message)s")
    else:
        made = _Fields(process, as_json=form == "json")
    return _Journal(made) if journal else made


def set_level(level: str) -> None:
    """Another level from now on: debug, info, warning or error. Libraries' own insides are told at none of them."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(max(number, logging.WARNING))
    for package in OWN_PACKAGES:
        logging.getLogger(package).setLevel(number)


#: Whose loggers follow the level; the last one is of a module that is run.
OWN_PACKAGES = ("vpnd", "shards", "supervisor", "__main__")

#: Kinds and peers of which it is known when a line was written last; beyond, peers of one kind are told together.
MOST_REMEMBERED = 1024


class Seldom:
    """Of one kind, and of one member, at most one line is written in log.refusal_interval; the next one says how many
    were left out.

    `now_s` is a clock. Owner: the loop that logs; not thread-safe.
    """

    def __init__(self, log: logging.Logger, live: Live, now_s: Callable[[], float]) -> None:
        self._log, self._live, self._now_s = log, live, now_s
        #: by kind and member: when a line was written last, and those left out since
        self._last: dict[tuple[str, str], tuple[float, int]] = {}

    def warn(self, kind: str, text: str, member: str = "") -> None:
        """A warning. `member`: who causes it, where that is a member, of whom there are only so many."""
        self.log(logging.WARNING, kind, text, member)

    def log(self, level: int, kind: str, text: str, member: str = "") -> None:
        now_s, interval_s = self._now_s(), self._live.config.log.refusal_interval
        if (kind, member) not in self._last and len(self._last) >= MOST_REMEMBERED:
            self._last = {key: was for key, was in self._last.items() if now_s < was[0] + interval_s}
            if len(self._last) >= MOST_REMEMBERED:
                member = ""
        last_s, left_out = self._last.get((kind, member), (now_s - interval_s, 0))
        if now_s < last_s + interval_s:
            self._last[kind, member] = last_s, left_out + 1
            return
        self._last[kind, member] = now_s, 0
        self._log.log(level, "%s%s", text, f" (and {left_out} more like it)" if left_out else "")
