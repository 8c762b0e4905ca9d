"""The commands of a network: invite, members, remove, leave, authority, and peers, resolve.

The daemon carries them out (supervisor/requests.py); here are their words. Wherever one member is meant, a name, a
virtual IP or a peer id will do. What other programs may want to read stands alone on standard output, the rest beside
it on standard error.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vpnd.cli.command import (
    JsonOption,
    Where,
    WhoArgument,
    ask,
    ask_control,
    command,
    end,
    group,
    option,
    read_status,
    show,
)
from vpnd.config import paths, values
from vpnd.config.schema import Config
from vpnd.errors import ConfigError, NotRunningError, PrivilegeError, RefusedError
from vpnd.printable import many, printable, wrapped

app = typer.Typer()
authority = group("The nodes that may let others in and remove them.")
app.add_typer(authority, name="authority")


@command(app)
def invite(
    place: Where,
    name: str | None = option(None, "--name", "What the new member is called.", "NAME"),
    uses: int = option(1, "--uses", "How many may join with it.", "N", min=1),
    expires: str | None = option(
        None, "--expires", "How long it is good for [membership.invite_lifetime].", "TIME"
    ),
    ip: str | None = option(None, "--ip", "The virtual IP of the new member.", "ADDRESS"),
    routes: list[str] | None = option(
        None, "--route", "A network behind it that it may announce; repeatable.", "CIDR"
    ),
    groups: list[str] | None = option(None, "--group", "A group it is in; repeatable.", "GROUP"),
    as_json: JsonOption = False,
) -> None:
    """Print a token that lets another machine join the network: vpnd start --join TOKEN.

    Only an authority can. Whoever has the token can join until it is used up or expired, so send it as you would a
    password. The token is alone on standard output.
    """
    answer = ask_control(
        place,
        "invite",
        name=name,
        uses=uses,
        expires_s=_seconds(expires),
        ip=ip,
        routes=",".join(routes) if routes else None,
        groups=",".join(groups) if groups else None,
    )
    show(answer, as_json, lambda answer: answer["token"])
    if not as_json:
        from vpnd.cli import memberview
        from vpnd.cli.statusview import duration

        times = "once" if answer["uses"] == 1 else f"{answer['uses']} times"
        within = duration(answer["expires_s"])
        use = f"It can be used {times}, within {within}; on the other machine: vpnd start --join TOKEN"
        for line in (use, memberview.ways(answer)):
            typer.echo(wrapped(line), err=True)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = values.parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"--expires {text}: {error}") from None
    if seconds <= 0:
        raise ConfigError(f"--expires {text}: must be longer than that; write --expires 1h, for example")
    return seconds


@command(app)
def members(
    place: Where,
    everybody: bool = option(False, "--all", "Also those that were removed, have left or expired, and why."),
    as_json: JsonOption = False,
) -> None:
    """Show who is in the network."""
    from vpnd.cli import memberview

    show(ask_control(place, "members", all=everybody or None), as_json, memberview.members)


@command(app)
def remove(
    place: Where,
    who: WhoArgument,
    as_json: JsonOption = False,
) -> None:
    """Remove a member: every node refuses it within seconds, and it stays out. Only an authority can."""
    from vpnd.cli import memberview

    show(ask_control(place, "remove", who=who), as_json, memberview.removed)


@command(app)
def join(
    place: Where,
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="-: read it from standard input.", show_default=False)
    ],
) -> None:
    """Join the network of a token with the node that runs here, or start one that does.

    A network nobody else is in, as a first `vpnd start` makes it, is left for it; one that others are in never.
    """
    from vpnd.cli import launch

    word = launch.read_token(token, "TOKEN")
    settings = place.load("status", "process", "membership", "p2p").config
    work_s = settings.membership.join_timeout + settings.status.timeout
    try:
        answer = ask(settings, "join", work_s + settings.status.timeout, patience_s=work_s, token=word)
    except NotRunningError as error:
        raise NotRunningError(
            f"no daemon runs here: sudo vpnd start --detach --join TOKEN ({error})"
        ) from None
    joined = answer.get("answer") or {}
    name = str(joined.get("network") or "")
    launch.wait_moved(settings, str(joined.get("network_id") or ""))
    typer.echo(printable(f"joined the network {name}"))


@command(app)
def leave(
    place: Where,
    force: bool = option(False, "--force", "Also as the only authority of a network that has other members."),
) -> None:
    """Leave the network: forget it, and stop the node. To come back it needs a new token.

    An authority that can be reached ends the membership, and its name and addresses are free. Without one the others
    keep this node in their lists until an authority removes it or its membership expires.
    """
    settings = place.load("status", "process", "p2p").config
    from vpnd.status import NetworkPart

    try:
        status = read_status(settings)
    except NotRunningError:
        name = _leave_offline(settings, force)
        typer.echo(f"the network {name} is forgotten; no node was running")
        return
    network = status.network or NetworkPart()
    if network.authority and network.authorities == 1 and not force:
        others = network.members - 1
        if others > 0:
            raise RefusedError(
                f"this node is the only authority of network {network.name}: without it nobody can join the other "
                f"{many(others, 'member')} any more, be removed or renewed. Name another one first (vpnd authority "
                "add NAME), or say vpnd leave --force"
            )
    # an authority is told, for which there is p2p.dial_timeout
    answer = end(settings, "leave", settings.p2p.dial_timeout)
    typer.echo(f"left the network {network.name}; the node has stopped")
    if network.members > 1 and not answer.get("told"):
        stays = "the name and addresses of this node stay taken until one removes it (vpnd remove) or its membership"
        typer.echo(wrapped(f"No authority could be told: {stays} expires."), err=True)


@command(app)
def invitations(
    place: Where,
    cancel: str | None = option(None, "--cancel", "Take one back: nobody can join by its token.", "ID"),
    as_json: JsonOption = False,
) -> None:
    """Show the invitations this authority has given out, or take one back."""
    from vpnd.cli import memberview

    show(ask_control(place, "invitations", cancel=cancel), as_json, memberview.invitations)


def _leave_offline(settings: Config, force: bool) -> str:
    """Leave without a daemon, which the network's own files may keep from starting. Returns the network's name, "" when
    that cannot be read.

    `force`: also when this node is an authority, of which nobody can say here whether it is the only one. Raises
    NotRunningError when there is no network, AlreadyRunningError when a daemon has the directory after all.
    """
    from supervisor import statedir
    from vpnd.membership.store import KEY, Store, StoreError

    directory = paths.network_dir(settings)
    if os.geteuid() != 0:
        raise PrivilegeError("leaving a network needs root: run it with sudo")
    if not (directory / paths.NETWORK_NAME).exists():
        raise NotRunningError(f"no daemon answers, and {settings.state_dir} holds no network to leave")
    lock = statedir.lock(settings)
    try:
        if (directory / KEY).exists() and not force:
            raise RefusedError(
                f"this node holds an authority key ({directory / KEY}), which leaving destroys. Without another "
                "authority the network is closed then; say vpnd leave --force, or start the node and ask it"
            )
        store = Store(directory)
        try:
            network = store.load_network()
        except StoreError:  # a damaged network can be left all the same
            network = None
        store.forget()
        store.close()
    finally:
        os.close(lock)
    return network.name if network is not None else ""


@command(authority, "add")
def authority_add(place: Where, who: WhoArgument) -> None:
    """Let a member, too, invite, renew and remove others, so that one lost machine does not close the network."""
    answer = ask_control(place, "authority-add", who=who)
    from vpnd.cli import memberview

    typer.echo(memberview.appointed(answer, who))


@command(authority, "revoke")
def authority_revoke(
    place: Where,
    who: WhoArgument,
    stolen: bool = option(
        False, "--stolen", "Its key was stolen: all it ever signed is void, and it is removed."
    ),
    keep: list[str] | None = option(
        None, "--keep", "With --stolen: a member only it vouches for that is good; repeatable.", "WHO"
    ),
    keep_all: bool = option(False, "--keep-all", "With --stolen: all members there are now are good."),
    as_json: JsonOption = False,
) -> None:
    """Take that back from a member; whom it let in stays.

    Whoever has a stolen key can date back what it signs. With --stolen nothing of it holds, from the beginning; the
    memberships that other authorities vouch for are signed again, and it says who is out, or in again.
    """
    if (keep or keep_all) and not stolen:
        raise ConfigError("--keep and --keep-all are for --stolen; otherwise everybody stays")
    answer = ask_control(
        place,
        "authority-revoke",
        who=who,
        stolen=stolen or None,
        keep=",".join(keep) if keep else None,
        keep_all=keep_all or None,
    )
    from vpnd.cli import memberview

    show(answer, as_json, lambda answer: memberview.revoked(answer, who))


@command(authority, "list")
def authority_list(
    place: Where,
    as_json: JsonOption = False,
) -> None:
    """Show the authorities, the first one on top."""
    from vpnd.cli import memberview

    show(ask_control(place, "authority-list"), as_json, memberview.authorities)


@command(app)
def peers(
    place: Where,
    as_json: JsonOption = False,
) -> None:
    """Show the other nodes: addresses, state, round trip, and where each is known from."""
    from vpnd.cli import memberview

    status = read_status(place.load("status").config)
    show(status.peers if as_json else status, as_json, memberview.peers)


@command(app)
def resolve(
    place: Where,
    what: Annotated[str, typer.Argument(metavar="IP|NAME", help="A virtual IP, a name or a peer id.")],
    as_json: JsonOption = False,
) -> None:
    """Look up a member, and show each step: where it was looked, how old the answer is, what it was.

    Exit code 1 when nobody was found.
    """
    from vpnd.cli import memberview

    answer = ask_control(place, "resolve", what=what)
    show(answer, as_json, memberview.resolved)
    raise typer.Exit(0 if answer.get("peer_id") else 1)
