"""The commands to a running node: stop, status, reload, scale, page."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpnd.cli.command import JsonOption, Where, ask, command, end, json_of, option, read_status, show
from vpnd.config import paths
from vpnd.errors import ConfigError, NotRunningError, PrivilegeError
from vpnd.printable import many, printable

if TYPE_CHECKING:
    from vpnd.config.schema import Config
    from vpnd.status import Status

app = typer.Typer()


@command(app)
def stop(place: Where) -> None:
    """Stop the node; returns when it is gone. Of a node that was killed the kill switch is undone."""
    try:
        end(place.load("status", "process").config, "stop")
    except NotRunningError:
        if os.geteuid() != 0 or not _release(place):
            raise


def _release(place: Where) -> bool:
    """A daemon that was killed left its kill switch: take it away, and say so. False when there is none."""
    from supervisor.network import killswitch

    released = killswitch.release(place.load("network", "process").config)
    if released:
        typer.echo("no daemon was running; what kept traffic from leaving past the exit node is undone")
    return released


@command(app)
def status(
    place: Where,
    as_json: JsonOption = False,
    schema: bool = option(False, "--schema", "The JSON Schema of --json, without a node."),
    reference: bool = option(False, "--reference", "docs/status.md.", hidden=True),
    watch: float = option(
        0.0, "--watch", "Again every S seconds until Ctrl-C, with rates.", metavar="S", min=0.0
    ),
) -> None:
    """Show whether the node is healthy, its peers, shards and drops. Exit code 0: healthy, 9: degraded, 1: down."""
    from vpnd import status as fields
    from vpnd.cli import statusview

    if schema or reference:
        return typer.echo(json_of(fields.schema()) if schema else fields.reference(), nl=schema)
    settings = place.load("status").config
    answer = read_status(settings)
    if watch:
        answer = _watched(settings, answer, watch)
    else:
        show(answer, as_json, statusview.render)
    raise typer.Exit(fields.EXIT_CODES.get(answer.health, fields.EXIT_CODES[fields.DOWN]))


def _watched(settings: Config, before: Status, interval_s: float) -> Status:
    """Show one after the other until Ctrl-C; the last."""
    from vpnd.cli import statusview

    after = before
    try:
        while True:
            begun_s = time.monotonic()
            rates = statusview.rates(before, after)
            typer.echo("\n\n".join(filter(None, [f"{statusview.CLEAR}{statusview.render(after)}", rates])))
            before = after
            time.sleep(max(0.0, begun_s + interval_s - time.monotonic()))
            after = read_status(settings, interval_s / 2)  # never the same one twice: there would be no rates
    except KeyboardInterrupt:
        return after


@command(app)
def reload(place: Where, as_json: JsonOption = False) -> None:
    """Let the node read its configuration again, and say what is in force now and what needs a restart.

    The node reads the file, environment and flags it was started with. Exit code 2 when anything in them is wrong; it
    goes on as it was then. SIGHUP does the same, and the answer goes to the log.
    """
    show(ask(place.load("status").config, "reload"), as_json, _reloaded)


@command(app)
def scale(
    place: Where,
    shards: Annotated[int, typer.Argument(metavar="N", help="Number of shards, 1 to 64.")],
    as_json: JsonOption = False,
) -> None:
    """Change the number of shards while packets flow; returns when it is done. Holds until the node is restarted.

    Flows stay where they are; only those of shards that go have to move.
    """
    settings = place.load("status", "process").config
    process = settings.process
    # new shards get ready or are stopped again; those that go empty their queues
    work_s = process.ready_timeout + process.drain_timeout + process.stop_timeout
    show(ask(settings, "scale", work_s + settings.status.timeout, shards=shards), as_json, _scaled)


@command(app)
def page(place: Where) -> None:
    """Print the address of the page that shows the node live, with the token that opens it. Needs web.listen."""
    config = place.load("web").config
    if not config.web.listen:
        raise ConfigError(
            'web.listen is empty, so the node has no page; set it to "127.0.0.1:9587" and start the node again'
        )
    file = paths.page_token_file(config)
    try:
        token = file.read_text().strip()
    except FileNotFoundError:
        raise NotRunningError(f"{file}: is not there; a node makes it that starts with web.listen") from None
    except PermissionError:
        raise PrivilegeError(f"{file} is not open to this user; run with sudo") from None
    typer.echo(f"http://{config.web.listen}/#{token}")


def _reloaded(answer: dict[str, Any]) -> str:
    from vpnd.config import changes

    lines = [
        f"applied: {row['key']} = {changes.show(row['key'], row['new'])} (was {changes.show(row['key'], row['old'])})"
        for row in answer.get("applied", ())
    ]
    lines += [f"peer added: {peer['name']}" for peer in answer.get("peers_added", ())]
    lines += [f"peer removed: {peer['name']}" for peer in answer.get("peers_removed", ())]
    lines += [
        f"not applied: {row['key']} = {changes.show(row['key'], row['new'])} "
        f"(is {changes.show(row['key'], row['old'])}): {row['remedy']}"
        for row in answer.get("needs_restart", ())
    ]
    return "\n".join(map(printable, lines)) or "nothing has changed"


def _scaled(answer: dict[str, Any]) -> str:
    before, shards = answer.get("before", 0), answer.get("shards", 0)
    if before == shards:
        return f"{many(shards, 'shard')}, as before"
    moved = answer.get("flows_moved", 0)
    were = "was" if before == 1 else "were"
    return f"{many(shards, 'shard')}, there {were} {before}" + (
        f"; {many(moved, 'flow')} moved" if moved else ""
    )
