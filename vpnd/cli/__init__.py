"""The command line, and the one place where errors become messages and exit codes.

Commands raise; `main` prints `vpnd: error: …`, one line per problem, and ends with the error's `exit_code`.
What a command needs is imported inside it: `vpnd id` and `vpnd status` load neither libp2p nor the
supervisor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence

from vpnd.errors import VpndError
from vpnd.printable import printable

#: Shells report a command that SIGINT ended so: 128 and the signal's number.
INTERRUPTED = 130
#: What a disk without room for this user says.
_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None, run: Callable[[list[str]], int] | None = None) -> int:
    """Run one command; `arguments` default to those of the process. Returns the exit code. `run`: in the place of all
    commands."""
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        if run is not None:
            return run(words)
        if arguments is None and _starts(words) and os.geteuid() == 0:
            from supervisor import interpreter

            interpreter.begin_early("vpnd.control")
        from vpnd.cli import app

        return app.run(words)
    except VpndError as error:
        for line in str(error).split("\n"):
            print(f"vpnd: error: {printable(line)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in _FULL:
            raise
        what = error.filename or "standard output"
        text = f"{what}: cannot be written ({error.strerror}); make room there, or write to another disk"
        print(f"vpnd: error: {printable(text)}", file=sys.stderr)
        _drop_output()
        return VpndError.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _starts(words: Sequence[str]) -> bool:
    """Whether the command is `vpnd start`, in the foreground and with no mistake that is seen at once."""
    rest = iter(words)
    for word in rest:
        if word in ("--config", "--state-dir"):
            next(rest, None)
        elif not word.startswith("-"):
            return word == "start" and not {"--detach", "--help", "-h"}.intersection(rest)
    return False


def _drop_output() -> None:
    """Let go what standard output still holds, which the interpreter would try to write once more as it ends."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
