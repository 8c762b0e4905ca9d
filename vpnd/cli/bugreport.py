"""`vpnd bugreport`: one file for whoever is to find out what is wrong. Without secrets, but with names and addresses.

Text, a section for each source. What looks like a token or a key is blotted out wherever it stands, and the whole is
compared with the node's key files before it is written.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from vpnd.cli.command import Where, command, json_of, read_status, write_new
from vpnd.cli.configuration import with_origins
from vpnd.cli.doctor import examined, rendered
from vpnd.config import load, paths
from vpnd.errors import ConfigError, VpndError
from vpnd.version import __version__

#: Of the log, the end.
LOG_BYTES = 1 << 18
#: A key file is small; nothing else is compared.
_KEY_BYTES = 1 << 14
_PROGRAM_S = 10.0
#: What in a state directory lets others be this node, join its network or open its page.
_KEY_FILES = ("*.pem", "*.key", "*.token", "invitations*")
#: Invitations, PEM, and of URLs names with passwords, and paths, where RPC services have their keys.
_SECRETS = (
    re.compile(r"\bvpnd1[0-9A-Za-z-]{20,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL),
    re.compile(r"(?<=://)[^\s/\"']+@"),
    re.compile(r"(?<=https://)[^\s/\"']+/[^\s\"']+"),
)
BLOT = "(left out)"
_PROGRAMS = (
    ("ip", "address"),
    ("ip", "rule"),
    ("ip", "route", "show", "table", "all"),
    ("ss", "-tin", "state", "established"),
    ("nft", "list", "ruleset"),
    ("uname", "-a"),
)

app = typer.Typer()


@command(app)
def bugreport(
    place: Where,
    file: Annotated[
        str,
        typer.Option(
            "--write", "-w", metavar="FILE", help="Where to [vpnd-bugreport-TIME.txt]; -: to the terminal."
        ),
    ] = "",
) -> None:
    """Write one file for a bug report: versions, doctor, status, configuration, log, routes and firewall.

    It holds no keys and no tokens, but names and addresses: read it before you give it away. Needs root for all of it.
    """
    loaded = place.load()
    text = compiled(place, loaded)
    if file == "-":
        typer.echo(text, nl=False)
        return
    path = Path(file or time.strftime("vpnd-bugreport-%Y%m%d-%H%M%S.txt"))
    try:
        write_new(path, text, 0o600)
    except OSError as error:
        raise ConfigError(f"--write {path}: {error.strerror}; name another file") from None
    typer.echo(f"{path}: read it before you give it away, it has names and addresses")


def compiled(place: Where, loaded: load.Loaded) -> str:
    """The whole text. Raises VpndError rather than telling a key."""
    config = loaded.config
    sources: tuple[tuple[str, Callable[[], str]], ...] = (
        ("version", lambda: f"vpnd {__version__}"),
        ("doctor", lambda: rendered(examined(place))),
        ("status", lambda: json_of(read_status(config))),
        ("configuration", lambda: json_of(with_origins(loaded))),
        ("log", lambda: _end_of(paths.log_file(config))),
        *((" ".join(words), lambda words=words: _said(words)) for words in _PROGRAMS),
    )
    text = "".join(f"==== {name}\n\n{_of(source)}\n\n" for name, source in sources)
    for secret in _SECRETS:
        text = secret.sub(BLOT, text)
    for path, form in _key_forms(Path(config.state_dir)):
        if form in text:
            raise VpndError(
                f"what is in {path} would be in the report, so there is none: this is a bug of vpnd"
            )
    return text


def _of(source: Callable[[], str]) -> str:
    try:
        return source()
    except VpndError as error:
        return f"not there: {error}"
    except OSError as error:
        return f"not there: {error.strerror}"


def _end_of(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
        return file.read().decode(errors="replace")


def _said(words: tuple[str, ...]) -> str:
    environment = {**os.environ, "PATH": paths.PROGRAMS, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_PROGRAM_S, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return f"has not ended within {_PROGRAM_S:g} s"
    return done.stdout + done.stderr


def _key_forms(state_dir: Path) -> Iterator[tuple[Path, str]]:
    """What each key file could be told as: its lines, its bytes in hex and in base64. PEM's first and last line are in
    every one."""
    for path in (found for pattern in _KEY_FILES for found in state_dir.rglob(pattern)):
        try:
            content = path.read_bytes() if path.stat().st_size <= _KEY_BYTES else b""
        except OSError:
            continue
        lines = [line.strip() for line in content.decode(errors="replace").split("\n")]
        for line in lines:
            if len(line) >= 16 and not line.startswith("-----"):
                yield path, line
        if content:
            yield path, content.hex()
            yield path, base64.b64encode(content).decode()
