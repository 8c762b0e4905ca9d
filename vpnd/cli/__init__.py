"""The command line, and the one place where errors become messages and exit codes.

Commands raise; `main` prints `vpnd: error: …`, one line per problem, and ends with the error's `exit_code`.
What a command needs is imported inside it: `vpnd id` and `vpnd status` load neither libp2p nor the
supervisor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vpnd.errors import VpndError
from vpnd.printable import printable

#: Shells report a command that SIGINT ended so: 128 and the signal's number.
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` default to those of the process. Returns the exit code."""
    try:
        from vpnd.cli.app import run

        return run(list(sys.argv[1:] if arguments is None else arguments))
    except VpndError as error:
        for line in str(error).split("\n"):
            print(f"vpnd: error: {printable(line)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
