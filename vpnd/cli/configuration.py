"""`vpnd config`: check, show, schema, reference, init."""

from __future__ import annotations

import os
from typing import Any

import typer

from vpnd.cli.command import Where, command, group, json_of, option, write_new
from vpnd.config import load, paths
from vpnd.config.fields import PEERS, tables
from vpnd.config.reference import as_toml, json_schema, template
from vpnd.config.reference import reference as reference_text
from vpnd.errors import ConfigError, PrivilegeError

app = group("Check, show and make configurations.")


@command(app)
def check(place: Where) -> None:
    """Say what is wrong with the configuration; exit code 2 when anything is."""
    loaded = place.load()
    file = loaded.places.config_file
    typer.echo(f"{file}: good" if file.exists() else f"{file}: no such file, the defaults are used; good")


@command(app)
def show(
    place: Where,
    as_json: bool = option(False, "--json", "With the origin of each value."),
) -> None:
    """Print every setting with the value in force."""
    loaded = place.load()
    typer.echo(json_of(with_origins(loaded)) if as_json else as_toml(loaded.config), nl=as_json)


def with_origins(loaded: load.Loaded) -> dict[str, Any]:
    """table -> key -> value and origin; durations are seconds, sizes bytes. Peers are a list of these."""
    shown: dict[str, Any] = {
        "state_dir": loaded.config.state_dir,
        "config_file": str(loaded.places.config_file),
    }
    for table, known in tables().items():
        held = getattr(loaded.config, table)
        if table == PEERS:
            entries = enumerate(held)
            shown[table] = [_entry(loaded, f"{table}[{n}]", peer, known) for n, peer in entries]
        else:
            shown[table] = _entry(loaded, table, held, known)
    return shown


def _entry(loaded: load.Loaded, path: str, held: object, keys: Any) -> dict[str, Any]:
    def origin(key: str) -> str:
        return loaded.origins.get(f"{path}.{key}", load.DEFAULT)

    return {key: {"value": getattr(held, key), "origin": origin(key)} for key in keys}


@command(app)
def schema(place: Where) -> None:
    """Print a JSON Schema of the configuration file."""
    typer.echo(json_of(json_schema()))


@command(app)
def reference(place: Where) -> None:
    """Print docs/configuration.md."""
    typer.echo(reference_text(), nl=False)


@command(app)
def init(place: Where) -> None:
    """Write a commented configuration that says nothing yet; never overwrites one."""
    file = paths.places(*place, os.environ).config_file
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_new(file, template())
    except FileExistsError:
        raise ConfigError(
            f"{file}: is there already and is not overwritten; edit it or move it away"
        ) from None
    except PermissionError:
        raise PrivilegeError(
            f"{file}: may not be written by this user; run with sudo, or give --config"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}); give another --config") from None
    typer.echo(f"{file}: written; edit it, then: vpnd config check")
