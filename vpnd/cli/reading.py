"""`vpnd logs`: the log of the node, where it is kept: the file of one started with --detach, or the journal."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from vpnd import statusclient
from vpnd.cli.command import Where, ask, command, option
from vpnd.cli.service import NAME
from vpnd.config import paths
from vpnd.config.schema import Config
from vpnd.errors import MachineError, NotRunningError, VpndError
from vpnd.printable import printable

#: Read at once.
_BYTES = 1 << 16

app = typer.Typer()


@command(app)
def logs(
    place: Where,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, help="The last so many.")] = 50,
    level: str = option(
        "", "--level", "First let all processes log from debug, info, warning or error on.", "LEVEL"
    ),
) -> None:
    """Print the last lines of the node's log.

    --level holds until the node is started again, or reads its configuration again (`vpnd reload`).

    Of a service these are in the journal (journalctl -u vpnd), of a node started with --detach in vpnd.log of the state
    directory. Of a node in the foreground they are where that was started.
    """
    settings = place.load("status").config
    if level:
        before = ask(settings, "log-level", level=level)["before"]
        typer.echo(f"vpnd: the node logs from {level} on; before: {before}", err=True)
    file = paths.log_file(settings)
    writing, journal = _written_by(settings)
    if journal or not (file.exists() or writing):
        _journal(follow, lines)
    if writing and not (file.exists() and os.path.samefile(writing, file)):
        note = "the node that runs writes its log where it was started, not with --detach"
        if not file.exists():
            raise MachineError(note)
        typer.echo(f"vpnd: {note}: what follows is of one before it", err=True)
    try:
        position = _show(file, lines)
        if follow:
            _follow(file, position, settings.status.poll_interval)
    except PermissionError:
        raise MachineError(f"{file} is not open to this user; run it as root: sudo vpnd logs") from None
    except KeyboardInterrupt:
        pass  # the end of following


def _written_by(settings: Config) -> tuple[str, bool]:
    """What the node that runs writes its log to, as a path, and whether that is the journal; empty if unknown."""
    try:
        pid = statusclient.status(paths.status_socket(settings), settings.status.timeout).supervisor.pid
        file = f"/proc/{pid}/fd/2"
        kind = os.stat(file).st_mode
    except (VpndError, OSError):
        return "", False
    return file, stat.S_ISSOCK(kind)


def _journal(follow: bool, lines: int) -> None:
    """Become journalctl. Raises NotRunningError where there is none."""
    program = shutil.which("journalctl")
    if program is None:
        raise NotRunningError("there is no vpnd.log in the state directory, and no journal; see --state-dir")
    os.execv(program, [program, "-u", NAME, "-n", str(lines), *(["-f"] if follow else ["--no-pager"])])


def _show(file: Path, lines: int) -> int:
    """The last lines, in one pass from the end backwards; up to where in the file."""
    with open(file, "rb") as log:
        end = position = log.seek(0, os.SEEK_END)
        found = 0
        while position and found <= lines:
            position = max(0, position - _BYTES)
            log.seek(position)
            found += log.read(min(_BYTES, end - position)).count(b"\n")
        log.seek(position)
        for line in log.read(end - position).splitlines()[-lines:] if lines else ():
            typer.echo(printable(line.decode(errors="replace")))
        return end


def _follow(file: Path, position: int, pause_s: float) -> None:
    """What comes behind `position`. A file that is shorter than before was begun anew."""
    rest = b""
    with open(file, "rb") as log:
        log.seek(position)
        while True:
            if os.fstat(log.fileno()).st_size < log.tell():
                log.seek(0)
            *whole, rest = (rest + log.read(_BYTES)).split(b"\n")
            for line in whole:
                typer.echo(printable(line.decode(errors="replace")))
            if not whole:
                sys.stdout.flush()
                time.sleep(pause_s)
