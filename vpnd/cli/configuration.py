"""`vpnd config`: check, show, schema, reference, init."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from vpnd.cli.options import ConfigOption, StateDirOption, Where, where
from vpnd.config import load, paths
from vpnd.config.fields import PEERS, tables
from vpnd.config.reference import as_toml, json_schema, template
from vpnd.config.reference import reference as reference_text
from vpnd.errors import ConfigError, PrivilegeError

app = typer.Typer(help="Check, show and make configurations.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def root(context: typer.Context, config: ConfigOption = None, state_dir: StateDirOption = None) -> None:
    """Check, show and make configurations."""
    context.obj = where(context, config, state_dir)


def _load(place: Where) -> load.Loaded:
    return load.load_with_origins(place.config_file, place.state_dir, {}, os.environ)


@app.command()
def check(context: typer.Context, config: ConfigOption = None, state_dir: StateDirOption = None) -> None:
    """Say what is wrong with the configuration; exit code 2 when anything is."""
    loaded = _load(where(context, config, state_dir))
    file = loaded.places.config_file
    typer.echo(f"{file}: good" if file.exists() else f"{file}: no such file, the defaults are used; good")


@app.command()
def show(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="With the origin of each value.")] = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Print every setting with the value in force."""
    loaded = _load(where(context, config, state_dir))
    if not as_json:
        typer.echo(as_toml(loaded.config), nl=False)
        return
    import orjson

    typer.echo(orjson.dumps(_with_origins(loaded), option=orjson.OPT_INDENT_2).decode())


def _with_origins(loaded: load.Loaded) -> dict[str, Any]:
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


@app.command()
def schema(config: ConfigOption = None, state_dir: StateDirOption = None) -> None:
    """Print a JSON Schema of the configuration file."""
    import orjson

    typer.echo(orjson.dumps(json_schema(), option=orjson.OPT_INDENT_2).decode())


@app.command()
def reference(config: ConfigOption = None, state_dir: StateDirOption = None) -> None:
    """Print docs/configuration.md."""
    typer.echo(reference_text(), nl=False)


@app.command()
def init(context: typer.Context, config: ConfigOption = None, state_dir: StateDirOption = None) -> None:
    """Write a commented configuration that says nothing yet; never overwrites one."""
    place = where(context, config, state_dir)
    file = paths.places(place.config_file, place.state_dir, os.environ).config_file
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(file, "x", encoding="utf-8") as stream:
            stream.write(template())
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
