"""The interpreters of children, each with one inherited descriptor, its channel.

One may be begun early: most of what a node takes to start is control's imports, and while they go on in another process
the supervisor's own take no time. So nothing is imported here that is not needed by then.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from vpnd.api import channel

#: Where the packages lie: the children import from the same place, whatever the working directory is.
PACKAGES = str(Path(__file__).resolve().parent.parent)


class Interpreter(NamedTuple):
    """One process, and our end of its channel."""

    process: subprocess.Popen[bytes]
    channel: socket.socket


_early: dict[str, Interpreter] = {}


def begin_early(module: str) -> None:
    """Begin the first interpreter that `begin` is asked for. It is ended with this process when nobody wants it."""
    if module not in _early:
        _early[module] = _spawn(module)
        atexit.register(_end, module)


def begin(module: str) -> Interpreter:
    """An interpreter that runs the module and waits for its first message. Raises OSError."""
    early = _early.pop(module, None)
    return early if early is not None and early.process.poll() is None else _spawn(module)


def _end(module: str) -> None:
    early = _early.pop(module, None)
    if early is not None:
        early.channel.close()
        early.process.kill()
        early.process.wait()


def _spawn(module: str) -> Interpreter:
    ours, theirs = channel.pair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is for the supervisor, which then stops its children in order
            cwd="/",
            env={**os.environ, "PYTHONPATH": PACKAGES},
        )
    return Interpreter(process, ours)
