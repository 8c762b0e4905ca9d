"""The commands of a network: invite, members, remove, leave, authority, and peers, resolve.

The daemon carries them out (supervisor/requests.py); here are their words. Wherever one member is meant, a name, a
virtual IP or a peer id will do. What other programs may want to read stands alone on standard output, the rest beside
it on standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from vpnd.cli.options import ConfigOption, StateDirOption, Where, load_tables, where
from vpnd.cli.running import JsonOption, echo_json
from vpnd.config import paths, values
from vpnd.errors import ConfigError, NotRunningError, RefusedError, VpndError

WhoArgument = Annotated[
    str, typer.Argument(metavar="WHO", help="A name, a virtual IP or a peer id.", show_default=False)
]

authority = typer.Typer(
    help="The nodes that may let others in and remove them.", no_args_is_help=True, rich_markup_mode=None
)


def add_to(app: typer.Typer) -> None:
    """Make them commands of `app`, in the order of the help."""
    for command in _COMMANDS:
        app.command()(command)
    app.add_typer(authority, name="authority")


@authority.callback()
def authority_root(
    context: typer.Context, config: ConfigOption = None, state_dir: StateDirOption = None
) -> None:
    """The nodes that may let others in and remove them."""
    context.obj = where(context, config, state_dir)


def invite(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="What the new member is called.")
    ] = None,
    uses: Annotated[int, typer.Option("--uses", metavar="N", min=1, help="How many may join with it.")] = 1,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires", metavar="TIME", help="How long it is good for [membership.invite_lifetime]."
        ),
    ] = None,
    ip: Annotated[
        str | None, typer.Option("--ip", metavar="ADDRESS", help="The virtual IP of the new member.")
    ] = None,
    routes: Annotated[
        list[str] | None,
        typer.Option("--route", metavar="CIDR", help="A network behind it that it may announce; repeatable."),
    ] = None,
    groups: Annotated[
        list[str] | None, typer.Option("--group", metavar="GROUP", help="A group it is in; repeatable.")
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Print a token that lets another machine join the network: vpnd start --join TOKEN.

    Only an authority can. Whoever has the token can join until it is used up or expired, so send it as you would a
    password. The token is alone on standard output.
    """
    answer = ask(
        where(context, config, state_dir),
        "invite",
        name=name,
        uses=uses,
        expires_s=_seconds(expires),
        ip=ip,
        routes=",".join(routes) if routes else None,
        groups=",".join(groups) if groups else None,
    )
    if as_json:
        echo_json(answer)
        return
    typer.echo(answer["token"])
    many = "once" if answer.get("uses", uses) == 1 else f"{answer.get('uses', uses)} times"
    from vpnd.cli.statusview import duration

    within = duration(answer.get("expires_s"))
    typer.echo(
        f"It can be used {many}, within {within}; on the other machine: vpnd start --join TOKEN", err=True
    )


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = values.parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"--expires {text}: {error}") from None
    if seconds <= 0:
        raise ConfigError(f"--expires {text}: must be longer than that")
    return seconds


def members(
    context: typer.Context,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Show who is in the network."""
    rows = ask(where(context, config, state_dir), "members")
    if as_json:
        echo_json(rows)
        return
    from vpnd.cli import memberview

    typer.echo(memberview.members(rows))


def remove(
    context: typer.Context,
    who: WhoArgument,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Remove a member: every node refuses it within seconds, and it stays out. Only an authority can."""
    answer = ask(where(context, config, state_dir), "remove", who=who)
    if as_json:
        echo_json(answer)
        return
    from vpnd.cli import memberview

    typer.echo(memberview.removed(answer))


def leave(
    context: typer.Context,
    force: Annotated[
        bool, typer.Option("--force", help="Also as the only authority of a network that has other members.")
    ] = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Leave the network: forget it, and stop the node. To come back it needs a new token.

    The others keep this node in their lists until an authority removes it or its membership expires.
    """
    place = where(context, config, state_dir)
    settings = load_tables(place, "status", "process").config
    from vpnd import statusclient
    from vpnd.status import NetworkPart

    try:
        status = statusclient.status(paths.status_socket(settings), settings.status.timeout)
    except NotRunningError:
        from vpnd.cli import offline

        name = offline.leave(settings, force=force)
        typer.echo(f"the network {name} is forgotten; no node was running")
        return
    network = status.network or NetworkPart()
    if network.authority and network.authorities == 1 and not force:
        others = network.members - 1
        if others > 0:
            raise RefusedError(
                f"this node is the only authority of network {network.name}: without it nobody can join the "
                f"other {others} any more, be removed or renewed. Name another one first (vpnd authority add NAME), "
                "or say vpnd leave --force"
            )
    timeout_s = settings.status.timeout
    gone_within_s = 2 * settings.process.stop_timeout + timeout_s
    request = {"command": "leave"}
    poll_s = settings.status.poll_interval
    statusclient.end(paths.status_socket(settings), request, timeout_s, gone_within_s, poll_s)
    typer.echo(f"left the network {network.name}; the node has stopped")


@authority.command("add")
def authority_add(
    context: typer.Context, who: WhoArgument, config: ConfigOption = None, state_dir: StateDirOption = None
) -> None:
    """Let a member, too, invite, renew and remove others, so that one lost machine does not close the network."""
    answer = ask(where(context, config, state_dir), "authority-add", who=who)
    typer.echo(f"{_named(answer, who)} is an authority now{_told(answer)}")


@authority.command("revoke")
def authority_revoke(
    context: typer.Context,
    who: WhoArgument,
    stolen: Annotated[
        bool,
        typer.Option("--stolen", help="Its key was stolen: all it ever signed is void, and it is removed."),
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="WHO",
            help="With --stolen: a member only it vouches for that is good; repeatable.",
        ),
    ] = None,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="With --stolen: all members there are now are good.")
    ] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Take that back from a member; whom it let in stays.

    Whoever has a stolen key can date back what it signs. With --stolen nothing of it holds, from the beginning; the
    memberships that other authorities vouch for are signed again, and it says who is out, or in again.
    """
    if (keep or keep_all) and not stolen:
        raise ConfigError("--keep and --keep-all are for --stolen; otherwise everybody stays")
    answer = ask(
        where(context, config, state_dir),
        "authority-revoke",
        who=who,
        stolen=stolen or None,
        keep=",".join(keep) if keep else None,
        keep_all=keep_all or None,
    )
    if as_json:
        echo_json(answer)
        return
    typer.echo(f"{_named(answer, who)} is no authority any more{_told(answer)}")
    if stolen:
        from vpnd.cli import memberview

        typer.echo(memberview.theft(answer))


@authority.command("list")
def authority_list(
    context: typer.Context,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Show the authorities, the first one on top."""
    rows = ask(where(context, config, state_dir), "authority-list")
    if as_json:
        echo_json(rows)
        return
    from vpnd.cli import memberview

    typer.echo(memberview.authorities(rows))


def peers(
    context: typer.Context,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Show the other nodes: addresses, state, round trip, and where each is known from."""
    settings = load_tables(where(context, config, state_dir), "status").config
    from vpnd import statusclient

    status = statusclient.status(paths.status_socket(settings), settings.status.timeout)
    if as_json:
        echo_json(status.peers)
        return
    from vpnd.cli import memberview

    typer.echo(memberview.peers(status))


def resolve(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="IP|NAME", help="A virtual IP, a name or a peer id.")],
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
) -> None:
    """Look up a member, and show each step: where it was looked, how old the answer is, what it was.

    Exit code 1 when nobody was found.
    """
    answer = ask(where(context, config, state_dir), "resolve", what=what)
    if as_json:
        echo_json(answer)
    else:
        from vpnd.cli import memberview

        typer.echo(memberview.resolved(answer))
    raise typer.Exit(0 if answer.get("peer_id") else 1)


_COMMANDS: tuple[Callable[..., None], ...] = (invite, members, remove, leave, peers, resolve)


def ask(place: Where, command: str, **arguments: object) -> Any:
    """What the daemon answers. Waits for as long as a command may (status.timeout), and a look-up or dial in it."""
    settings = load_tables(place, "status", "p2p", "discovery", "registry").config
    from vpnd import statusclient

    timeout_s = settings.status.timeout
    work_s = timeout_s + settings.p2p.dial_timeout + settings.discovery.dht_timeout
    if settings.registry.kind == "contract":
        work_s += settings.registry.timeout
    request = {"command": command, "patience_s": work_s, **arguments}
    answer = statusclient.ask(paths.status_socket(settings), request, timeout_s, work_s + timeout_s)
    if "answer" not in answer:
        raise VpndError(f"the daemon does not know the command {command}; is it of another version?")
    return answer["answer"]


def _told(answer: object) -> str:
    """Who knows of it: nobody else does while no other node is connected."""
    told = answer.get("told") if isinstance(answer, dict) else None
    return "; no other node is connected, they hear of it when one is" if told == 0 else ""


def _named(answer: object, who: str) -> str:
    """What the member is called, whatever it was called on the command line."""
    from vpnd.printable import printable

    name = answer.get("name") if isinstance(answer, dict) else None
    return printable(str(name or who))
