"""The interpreters of children, each with one inherited descriptor, its channel.

One may be begun early: most of what a node takes to start is control's imports, and while they go on in another process
those of the command line and the supervisor take no time. So nothing is imported here that is not needed by then.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from vpnd.api import ends

#: Where the packages lie: the children import from the same place, whatever the working directory is.
PACKAGES = str(Path(__file__).resolve().parent.parent)
#: glibc would keep memory apart for each thread, of which only one runs at a time.
FRUGAL = {"MALLOC_ARENA_MAX": "1"}


class Process(Protocol):
    """A child of this process."""

    @property
    def pid(self) -> int: ...

    def wait(self) -> int:
        """Wait for its end: its exit code, or the negative number of the signal that killed it. Once."""


class Begun:
    """One that was not begun by this program: forked by the nursery, or begun before this process became another."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        """See Process."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Interpreter(NamedTuple):
    """One process, and our end of its channel."""

    process: Process
    channel: socket.socket


_early: dict[str, Interpreter] = {}


def begin_early(module: str) -> None:
    """Begin the first interpreter that `begin` is asked for. It is ended with this program when nobody wants it."""
    if module not in _early:
        _keep(module, _spawn(module))


def hand_over() -> dict[str, tuple[int, int]]:
    """What was begun early, for the program that this process becomes: pids and descriptors of channels."""
    for _, channel in _early.values():
        channel.set_inheritable(True)
    return {module: (early.process.pid, early.channel.fileno()) for module, early in _early.items()}


def take_over(given: Mapping[str, tuple[int, int]]) -> None:
    """What the program before this one has handed over was begun early."""
    for module, (pid, fd) in given.items():
        os.set_inheritable(fd, False)
        _keep(module, Interpreter(Begun(pid), socket.socket(fileno=fd)))


def begin(module: str) -> Interpreter:
    """An interpreter that runs the module and waits for its first message. Raises OSError."""
    early = _early.pop(module, None)
    return early if early is not None and _runs(early.process) else _spawn(module)


def _keep(module: str, early: Interpreter) -> None:
    _early[module] = early
    atexit.register(_end, module)


def _runs(process: Process) -> bool:
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody has waited for it
        return False
    if ended is not None:
        process.wait()
    return ended is None


def _end(module: str) -> None:
    early = _early.pop(module, None)
    if early is not None:
        early.channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(early.process.pid, signal.SIGKILL)
        early.process.wait()


def _spawn(module: str) -> Interpreter:
    ours, theirs = ends.pair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is for the supervisor, which then stops its children in order
            cwd="/",
            env={**FRUGAL, **os.environ, "PYTHONPATH": PACKAGES},
        )
    return Interpreter(process, ours)
