"""The commands start, id and version, and all others, which are in the modules that are put together here."""

from __future__ import annotations

import os
import socket

import typer

from vpnd.cli import (
    bugreport,
    capture,
    completion,
    configuration,
    doctor,
    explaining,
    manual,
    membership,
    netcheck,
    pinging,
    reading,
    running,
    service,
    top,
)
from vpnd.cli.command import ConfigOption, StateDirOption, Where, command, group, option, remember
from vpnd.config import load
from vpnd.errors import PrivilegeError
from vpnd.version import __version__


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vpnd {__version__}")
        raise typer.Exit


def _options(
    context: typer.Context,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    version: bool = option(False, "--version", "Print the version.", callback=_tell_version, is_eager=True),
) -> None:
    remember(context, config, state_dir)


app = group("A peer-to-peer mesh VPN.", _options)


def run(arguments: list[str]) -> int:
    """Run the command in `arguments`. Raises VpndError; wrong usage is told here and is exit code 2."""
    try:
        typer.main.get_command(app)(arguments, prog_name="vpnd")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@command(app)
def start(
    place: Where,
    shards: int | None = option(None, "--shards", "Number of shards.", "N"),
    interface: str | None = option(None, "--interface", "TUN device.", "NAME"),
    log_level: str | None = option(None, "--log-level", "debug, info, warning or error.", "LEVEL"),
    detach: bool = option(False, "--detach", "Return when the node is ready."),
    join: str = option(
        "", "--join", "Join the network of this token; -: read it from standard input.", "TOKEN"
    ),
) -> None:
    """Run a node until it is stopped; needs root.

    Without [[peers]] in its configuration a node is in a network: the one it was in before, else the one --join lets it
    into, else a new one, into which it may let others with `vpnd invite`.
    """
    if os.geteuid() != 0:
        # said before anything is read: the default state directory is closed to others anyway
        raise PrivilegeError(
            "starting a node makes a TUN device and routes, which needs root; run: sudo vpnd start"
        )
    place = place.absolute()
    overrides: dict[str, str | int | None] = {
        "worker.shards": shards,
        "network.interface": interface,
        "log.level": log_level,
    }
    loaded = load.load_with_origins(place.config_file, place.state_dir, overrides, os.environ)
    from vpnd.cli import daemon, launch
    from vpnd.mode import decide, identity_of

    token = launch.read_token(join, "--join") if join else ""

    launch.make_state_dir(loaded.config)
    identity = identity_of(loaded.config)
    in_network = decide(loaded.config, joining=bool(token)).in_network
    host_name = socket.gethostname().partition(".")[0]
    config = load.complete(loaded.config, identity.peer_id, host_name, loaded.origins, in_network=in_network)
    if not detach:
        daemon.become(place, overrides, token, identity)
    launch.detached(config, loaded.places, overrides, token)


@command(app, "id")
def show_id(place: Where) -> None:
    """Print the peer id of this node; makes its identity when there is none."""
    settings = place.load("p2p").config
    from vpnd.mode import identity_of

    typer.echo(identity_of(settings).peer_id)


@command(app)
def version(place: Where) -> None:
    """Print the version."""
    _tell_version(True)


for module in (
    running,
    membership,
    pinging,
    netcheck,
    explaining,
    doctor,
    reading,
    capture,
    bugreport,
    top,
):
    app.add_typer(module.app)
app.add_typer(configuration.app, name="config")
app.add_typer(service.app, name="service")
for describing in (completion, manual):
    describing.add_to(app)
