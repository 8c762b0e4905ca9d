"""Options that commands share. --config and --state-dir may stand before or after a command's name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from vpnd.config.load import Loaded, load_with_origins

# readable=False: whether they can be read is said by what reads them, with a remedy
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        readable=False,
        metavar="FILE",
        help="Configuration file [VPND_CONFIG; STATE_DIR/vpnd.toml].",
    ),
]
StateDirOption = Annotated[
    Path | None,
    typer.Option(
        "--state-dir", readable=False, metavar="DIR", help="State directory [VPND_STATE_DIR; /var/lib/vpnd]."
    ),
]


class Where(NamedTuple):
    """The two options as given so far."""

    config_file: Path | None = None
    state_dir: Path | None = None

    def absolute(self) -> Where:
        """The same place from every working directory."""
        return Where(*(path.absolute() if path is not None else None for path in self))


def where(context: typer.Context, config_file: Path | None, state_dir: Path | None) -> Where:
    """The options of this command, else those before its name."""
    before = context.obj if isinstance(context.obj, Where) else Where()
    return Where(config_file or before.config_file, state_dir or before.state_dir)


def load_tables(place: Where, *only: str) -> Loaded:
    """The configuration for a command that uses no more than these tables; others may still be wrong."""
    return load_with_origins(place.config_file, place.state_dir, {}, os.environ, only=only)
