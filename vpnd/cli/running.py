"""The commands to a running node: stop, status, reload, scale. They talk to its status socket."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vpnd.cli.options import ConfigOption, StateDirOption, load_tables, where
from vpnd.config import paths
from vpnd.errors import NotRunningError
from vpnd.printable import printable

JsonOption = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]


def add_to(app: typer.Typer) -> None:
    """Make them commands of `app`, in the order of the help."""
    for command in (stop, status, reload, scale):
        app.command()(command)


def stop(context: typer.Context, config: ConfigOption = None, state_dir: StateDirOption = None) -> None:
    """Stop the node; returns when it is gone. Of a node that was killed the kill switch is undone."""
    settings = load_tables(where(context, config, state_dir), "status", "process").config
    from vpnd import statusclient

    # shards end first, then control; each is killed after process.stop_timeout
    gone_within_s = 2 * settings.process.stop_timeout + settings.status.timeout
    socket_path = paths.status_socket(settings)
    try:
        statusclient.stop(socket_path, settings.status.timeout, gone_within_s, settings.status.poll_interval)
    except NotRunningError:
        if os.geteuid() != 0 or not _release(context, config, state_dir):
            raise


def _release(context: typer.Context, config: Path | None, state_dir: Path | None) -> bool:
    """A daemon that was killed left its kill switch: take it away, and say so. False when there is none."""
    from supervisor.network import killswitch

    released = killswitch.release(load_tables(where(context, config, state_dir), "network", "process").config)
    if released:
        typer.echo("no daemon was running; what kept traffic from leaving past the exit node is undone")
    return released


def status(
    context: typer.Context,
    as_json: JsonOption = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="The JSON Schema of --json, without a node.")
    ] = False,
    reference: Annotated[bool, typer.Option("--reference", help="docs/status.md.", hidden=True)] = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Show whether the node is healthy, its peers, shards and drops. Exit code 0: healthy, 9: degraded, 1: down."""
    if schema or reference:
        from vpnd import status as fields

        return echo_json(fields.schema()) if schema else typer.echo(fields.reference(), nl=False)
    settings = load_tables(where(context, config, state_dir), "status").config
    from vpnd import statusclient
    from vpnd.status import DOWN, EXIT_CODES

    answer = statusclient.status(paths.status_socket(settings), settings.status.timeout)
    if as_json:
        echo_json(answer)
    else:
        from vpnd.cli import statusview

        typer.echo(statusview.render(answer))
    raise typer.Exit(EXIT_CODES.get(answer.health, EXIT_CODES[DOWN]))


def reload(
    context: typer.Context,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Let the node read its configuration again, and say what is in force now and what needs a restart.

    The node reads the file, environment and flags it was started with. Exit code 2 when anything in them is wrong; it
    goes on as it was then. SIGHUP does the same, and the answer goes to the log.
    """
    settings = load_tables(where(context, config, state_dir), "status").config
    from vpnd import statusclient

    answer = statusclient.ask(paths.status_socket(settings), {"command": "reload"}, settings.status.timeout)
    if as_json:
        echo_json(answer)
    else:
        typer.echo(_reloaded(answer))


def scale(
    context: typer.Context,
    shards: Annotated[int, typer.Argument(metavar="N", help="Number of shards, 1 to 64.")],
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Change the number of shards while packets flow; returns when it is done. Holds until the node is restarted.

    Flows stay where they are; only those of shards that go have to move.
    """
    settings = load_tables(where(context, config, state_dir), "status", "process").config
    from vpnd import statusclient

    process, timeout_s = settings.process, settings.status.timeout
    # new shards get ready or are stopped again; those that go empty their queues
    patience_s = process.ready_timeout + process.drain_timeout + process.stop_timeout + timeout_s
    request = {"command": "scale", "shards": shards}
    answer = statusclient.ask(paths.status_socket(settings), request, timeout_s, patience_s)
    if as_json:
        echo_json(answer)
    else:
        typer.echo(_scaled(answer))


def echo_json(answer: object) -> None:
    """`answer`, for other programs."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())


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
    before, shards = answer.get("before"), answer.get("shards")
    if before == shards:
        return f"{shards} shards, as before"
    moved = answer.get("flows_moved")
    return f"{shards} shards, there were {before}" + (f"; {moved} flows moved" if moved else "")
