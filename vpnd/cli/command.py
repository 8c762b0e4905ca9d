"""How a command is declared, finds its node, asks it and prints the answer.

--config and --state-dir may stand before or after a command's name.
"""

from __future__ import annotations

import functools
import inspect
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar, cast

import typer

from vpnd.config import paths
from vpnd.config.load import Loaded, load_with_origins
from vpnd.config.schema import Config
from vpnd.errors import ConfigError, VpndError

if TYPE_CHECKING:
    from vpnd.status import Status

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

Value = TypeVar("Value")


def option(
    default: Value, name: str, help: str, metavar: str | None = None, *, short: str = "", **more: Any
) -> Value:
    """An option of a command: what the parameter that takes it has as its default. `more`: as of typer.Option."""
    names = (name, short) if short else (name,)
    return cast(Value, typer.Option(default, *names, metavar=metavar, help=help, **more))


JsonOption = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]
WhoArgument = Annotated[
    str, typer.Argument(metavar="WHO", help="A name, a virtual IP or a peer id.", show_default=False)
]


class Where(NamedTuple):
    """The two options that name a node, as given so far."""

    config_file: Path | None = None
    state_dir: Path | None = None

    def absolute(self) -> Where:
        """The same place from every working directory."""
        return Where(*(paths.absolute(path) if path is not None else None for path in self))

    def load(self, *only: str) -> Loaded:
        """The configuration. `only`: the tables that the command uses; others may still be wrong."""
        return load_with_origins(self.config_file, self.state_dir, {}, os.environ, only=only)


def remember(context: typer.Context, config: ConfigOption = None, state_dir: StateDirOption = None) -> None:
    """The options of this command, else those before its name."""
    before = context.obj or Where()
    context.obj = Where(config or before.config_file, state_dir or before.state_dir)


def group(help: str, options: Callable[..., None] = remember) -> typer.Typer:
    """Commands with a name in common. `options` takes what may stand before that of a command."""
    # Plain help and plain errors: the decorated ones load another library for longer than most commands run
    return typer.Typer(
        help=help,
        callback=options,
        context_settings={"help_option_names": ["-h", "--help"]},
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], None]:
    """Make a function a command of `app`. It is given its `Where`, then what its other parameters declare."""

    def add(function: Callable[..., None]) -> None:
        @functools.wraps(function)
        def run(context: typer.Context, config: Path | None, state_dir: Path | None, **given: Any) -> None:
            remember(context, config, state_dir)
            function(context.obj, **given)

        context, *shared = inspect.signature(remember, eval_str=True).parameters.values()
        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        run.__signature__ = inspect.Signature([context, *own, *shared])  # type: ignore[attr-defined]
        app.command(name)(run)

    return add


def write_new(file: Path, text: str, mode: int = 0o666) -> None:
    """Make a file with this text, all of it or none. Raises FileExistsError when it is there, else OSError."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(fd, "w", encoding="utf-8") as output:
            output.write(text)
    except BaseException:
        file.unlink()
        raise


def ask(settings: Config, command: str, within_s: float | None = None, **arguments: object) -> dict[str, Any]:
    """What the daemon answers. `within_s`: for how long to wait, where that is longer than status.timeout."""
    from vpnd import statusclient

    request = {"command": command, **arguments}
    return statusclient.ask(paths.status_socket(settings), request, settings.status.timeout, within_s)


def ask_control(place: Where, command: str, **arguments: object) -> Any:
    """What control answers; it may look somebody up or dial."""
    settings = place.load("status", "p2p", "discovery", "registry").config
    timeout_s = settings.status.timeout
    work_s = timeout_s + settings.p2p.dial_timeout + settings.discovery.dht_timeout
    if settings.registry.kind == "contract":
        work_s += settings.registry.timeout
    answer = ask(settings, command, work_s + timeout_s, patience_s=work_s, **arguments)
    if "answer" not in answer:
        raise VpndError(f"the daemon does not know the command {command}; is it of another version?")
    return answer["answer"]


def refuse_itself(status: Status, who: str) -> None:
    """Raises ConfigError when `who` means the node that is asked."""
    names = {status.node.name, status.node.peer_id, *status.node.addresses}
    if status.network is not None:
        names.add(status.network.label)
    if canonical(who) in names:
        raise ConfigError(f"{who} is this node itself")


def canonical(who: str) -> str:
    """An IP address in its usual spelling; anything else as it is."""
    try:
        return str(ipaddress.ip_address(who))
    except ValueError:
        return who


def read_status(settings: Config, max_age_s: float = 0.0) -> Status:
    """The status of the daemon, at most so old."""
    from vpnd import statusclient

    return statusclient.status(paths.status_socket(settings), settings.status.timeout, max_age_s)


def end(settings: Config, command: str, work_s: float = 0.0) -> dict[str, Any]:
    """Ask for something after which the daemon ends; what it answered, when it has. `work_s`: how long the command
    itself may take."""
    from vpnd import statusclient

    # shards end first, then control; each is killed after process.stop_timeout
    gone_within_s = 2 * settings.process.stop_timeout + settings.status.timeout
    patience_s = settings.status.timeout + work_s
    answer = statusclient.end(
        paths.status_socket(settings),
        {"command": command, "patience_s": patience_s} if work_s else {"command": command},
        patience_s + work_s,
        gone_within_s,
        settings.status.poll_interval,
    )
    said = answer.get("answer")
    return said if isinstance(said, dict) else {}


def show(answer: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print an answer: for other programs, or as `text` puts it for people."""
    typer.echo(json_of(answer) if as_json else text(answer))


def json_of(answer: object) -> str:
    """JSON in several lines."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(answer), indent=2).decode()
