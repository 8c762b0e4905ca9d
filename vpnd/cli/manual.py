"""What the commands are, read from their declarations: docs/commands.md, the manual page, and what shells complete.

Nothing of it is written by hand but what no declaration says, the exit codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

import typer

from vpnd.cli.command import Where, command, option
from vpnd.version import __version__

EXIT_CODES = {
    0: "Done; for `vpnd status`: healthy.",
    1: "Failed; for `vpnd status`: down, no packets can flow.",
    2: "Wrong usage or configuration.",
    3: "No daemon answers.",
    4: "It needs root.",
    5: "Another daemon has the state directory, interface or port.",
    6: "The kernel refused something.",
    7: "A process of the node did not get ready or did not end.",
    8: "The network refused.",
    9: "`vpnd status`: degraded, some of it does not work.",
}
#: Options of every command.
SHARED = ("--config", "--state-dir")


class Option(NamedTuple):
    """`value`: what it is given, in capitals; empty for a switch."""

    names: tuple[str, ...]
    value: str
    help: str


class Entry(NamedTuple):
    """A command or a group of them. `path`: its words, "vpnd authority add"; `options` without those of every
    command."""

    path: str
    arguments: tuple[str, ...]
    options: tuple[Option, ...]
    help: str
    commands: tuple[str, ...]

    @property
    def usage(self) -> str:
        """How it is called."""
        words = [self.path, *(["COMMAND"] if self.commands else []), *self.arguments]
        return " ".join([*words, *(["[OPTIONS]"] if self.options else [])])

    @property
    def summary(self) -> str:
        """The first sentence of its help."""
        return self.help.partition("\n")[0].partition(". ")[0].rstrip(".")


def entries(whole: typer.Typer) -> list[Entry]:
    """All commands, as they are declared; the first is `vpnd` itself, with the options of every command."""
    first, *others = _entries(typer.main.get_command(whole), "vpnd")
    return [first, *(entry._replace(options=_own(entry.options)) for entry in others)]


def _own(options: tuple[Option, ...]) -> tuple[Option, ...]:
    return tuple(option for option in options if option.names[0] not in SHARED)


def shared(entries: list[Entry]) -> tuple[Option, ...]:
    """The options of every command."""
    return tuple(option for option in entries[0].options if option.names[0] in SHARED)


def _entries(node: Any, path: str) -> Iterator[Entry]:
    below = {name: each for name, each in getattr(node, "commands", {}).items() if not each.hidden}
    yield Entry(
        path=path,
        arguments=tuple(_argument(each) for each in node.params if each.param_type_name == "argument"),
        options=tuple(_options(node)),
        help=(node.help or "").strip(),
        commands=tuple(below),
    )
    for name, each in below.items():
        yield from _entries(each, f"{path} {name}")


def _argument(parameter: Any) -> str:
    return parameter.metavar if parameter.required else f"[{parameter.metavar}]"


def _options(node: Any) -> Iterator[Option]:
    for each in node.params:
        if each.param_type_name == "option" and not each.hidden:
            value = "" if each.is_flag else each.metavar or "VALUE"
            yield Option(tuple(each.opts), value, each.help or "")


# --- as a page


class Form(StrEnum):
    """Of the manual."""

    MAN = "man"
    MARKDOWN = "markdown"


def add_to(whole: typer.Typer) -> None:
    """Declare `vpnd manual`, of the commands that `whole` has when it is asked."""

    @command(whole)
    def manual(
        place: Where,
        form: Form = option(Form.MARKDOWN, "--as", "man: for man(1).", "man|markdown"),
    ) -> None:
        """Print what every command and option means: docs/commands.md, or a manual page.

        To read it here: vpnd manual --as man | man -l -
        """
        page = man_page if form is Form.MAN else markdown
        typer.echo(page(entries(whole)), nl=False)


def markdown(entries: list[Entry]) -> str:
    """docs/commands.md."""
    first, *others = entries
    parts = [
        "# Commands",
        "<!-- Made by `vpnd manual` from the commands themselves; change them there. -->",
        f"{first.help} These stand before the name of any command, and all but --version behind it:",
        _table(first.options),
    ]
    for entry in others:
        parts += [f"## {entry.path}", f"    {entry.usage}", entry.help]
        if entry.options:
            parts.append(_table(entry.options))
    rows = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    parts += ["## Exit codes", "\n".join(["| code | meaning |", "|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def _table(options: tuple[Option, ...]) -> str:
    rows = [f"| `{_shown(option)}` | {option.help.replace('|', chr(92) + '|')} |" for option in options]
    return "\n".join(["| option | meaning |", "|---|---|", *rows])


def _shown(option: Option) -> str:
    return f"{', '.join(option.names)} {option.value}".strip()


def man_page(entries: list[Entry]) -> str:
    """vpnd(1), in the man macros of roff."""
    first, *others = entries
    lines = [
        f'.TH VPND 1 "" "vpnd {__version__}" "User Commands"',
        ".SH NAME",
        "vpnd \\- a peer-to-peer mesh VPN",
        ".SH SYNOPSIS",
        ".B vpnd",
        "[OPTIONS] COMMAND [ARGUMENTS]",
        ".SH DESCRIPTION",
        *_roff(
            "One vpnd runs on each machine. Programs talk to the addresses of the other machines inside the VPN; vpnd "
            "carries their packets, encrypted, straight to the machine that owns the address. There is no server: "
            "machines join a network with a token from one that is in it."
        ),
        ".SH OPTIONS",
        *_roff("These stand before the name of a command, and all but --version behind it."),
        *_roff_options(first.options),
        ".SH COMMANDS",
    ]
    for entry in others:
        lines += [f".SS {_escaped(entry.usage)}", *_roff(entry.help), *_roff_options(entry.options)]
    lines.append(".SH EXIT STATUS")
    for code, meaning in EXIT_CODES.items():
        lines += [".TP", str(code), *_roff(meaning)]
    lines += [
        ".SH FILES",
        ".TP",
        "/var/lib/vpnd",
        "The state directory: identity, network, status socket, and vpnd.toml, the configuration.",
        ".SH ENVIRONMENT",
        ".TP",
        "VPND_STATE_DIR, VPND_CONFIG",
        "The state directory and the configuration file, where no option names them.",
        ".TP",
        "VPND_TABLE_KEY",
        "Any setting, for example VPND_NETWORK_MTU=1280.",
    ]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> list[str]:
    return [line if line else ".PP" for line in map(_escaped, text.split("\n"))]


def _roff_options(options: tuple[Option, ...]) -> list[str]:
    return [
        line
        for option in options
        for line in (".TP", f"\\fB{_escaped(_shown(option))}\\fR", *_roff(option.help))
    ]


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
