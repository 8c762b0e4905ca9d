"""`vpnd completion`: what a shell completes, as a script that knows all commands and options and starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import typer

from vpnd.cli import manual
from vpnd.cli.command import Where, command
from vpnd.cli.manual import Entry, Option

#: Options whose value is a file.
FILES = manual.SHARED


class Shell(StrEnum):
    """Of the user."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def add_to(whole: typer.Typer) -> None:
    """Declare `vpnd completion`, of the commands that `whole` has when it is asked."""

    @command(whole)
    def completion(
        place: Where,
        shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", show_default=False)],
    ) -> None:
        """Print what makes a shell complete vpnd's commands and options.

        For this session: source <(vpnd completion bash). For all of them, put its output into
        /usr/share/bash-completion/completions/vpnd, /usr/share/zsh/vendor-completions/_vpnd or
        /usr/share/fish/vendor_completions.d/vpnd.fish.
        """
        typer.echo(script(shell, manual.entries(whole)), nl=False)


def script(shell: Shell, entries: list[Entry]) -> str:
    """What the shell reads."""
    return {Shell.BASH: _bash, Shell.ZSH: _zsh, Shell.FISH: _fish}[shell](entries)


def _all_options(entry: Entry, entries: list[Entry]) -> tuple[Option, ...]:
    return entry.options if entry is entries[0] else (*entry.options, *manual.shared(entries))


def _options(entry: Entry, entries: list[Entry]) -> Iterator[tuple[str, str]]:
    """Name and meaning of each."""
    for option in _all_options(entry, entries):
        for name in option.names:
            yield name, option.help


def _commands(entry: Entry, entries: list[Entry]) -> Iterator[tuple[str, str]]:
    """Name and meaning of each command below it."""
    summaries = {each.path: each.summary for each in entries}
    for name in entry.commands:
        yield name, summaries[f"{entry.path} {name}"]


def _paths(entries: list[Entry]) -> list[str]:
    return [entry.path for entry in entries[1:]]


def _bash(entries: list[Entry]) -> str:
    known = "|".join(f'"{path}"' for path in _paths(entries))
    cases = "\n".join(
        f'        "{entry.path}") words="'
        + " ".join([*entry.commands, *(name for name, _ in _options(entry, entries))])
        + '" ;;'
        for entry in entries
    )
    return f"""\
# bash completion of vpnd; made by `vpnd completion bash`
_vpnd() {{
    local at=vpnd words= word=${{COMP_WORDS[COMP_CWORD]}} i
    case "${{COMP_WORDS[COMP_CWORD-1]}}" in
        {"|".join(FILES)}) mapfile -t COMPREPLY < <(compgen -f -- "$word"); return ;;
    esac
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "$at ${{COMP_WORDS[i]}}" in
            {known}) at="$at ${{COMP_WORDS[i]}}" ;;
        esac
    done
    case "$at" in
{cases}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}}
complete -F _vpnd vpnd
"""


def _zsh(entries: list[Entry]) -> str:
    def quoted(rows: Iterator[tuple[str, str]]) -> str:
        return " ".join(_single(f"{name}:{meaning}") for name, meaning in rows)

    known = "|".join(f'"{path}"' for path in _paths(entries))
    cases = "\n".join(
        f'        "{entry.path}")\n'
        f"            commands_=({quoted(_commands(entry, entries))})\n"
        f"            options_=({quoted(_options(entry, entries))}) ;;"
        for entry in entries
    )
    return f"""\
#compdef vpnd
# zsh completion of vpnd; made by `vpnd completion zsh`
_vpnd() {{
    local at=vpnd i
    local -a commands_ options_
    if [[ "$words[CURRENT-1]" == ({"|".join(FILES)}) ]]; then _files; return; fi
    for ((i = 2; i < CURRENT; i++)); do
        case "$at $words[i]" in
            {known}) at="$at $words[i]" ;;
        esac
    done
    case "$at" in
{cases}
    esac
    if [[ "$words[CURRENT]" == -* ]] || (( ! $#commands_ )); then
        _describe -o option options_
    else
        _describe command commands_
    fi
}}
if [[ "$funcstack[1]" == _vpnd ]]; then _vpnd "$@"; else compdef _vpnd vpnd; fi
"""


def _fish(entries: list[Entry]) -> str:
    lines = [
        "# fish completion of vpnd; made by `vpnd completion fish`",
        "function __vpnd_at",
        "    set -l at vpnd",
        "    for word in (commandline -opc)[2..-1]",
        f'        contains -- "$at $word" {" ".join(map(_single, _paths(entries)))}; and set at "$at $word"',
        "    end",
        '    test "$at" = "$argv"',
        "end",
        "complete -c vpnd -f",
    ]
    for entry in entries:
        here = f"complete -c vpnd -n '__vpnd_at {entry.path}'"
        for name, meaning in _commands(entry, entries):
            lines.append(f"{here} -a {name} -d {_fish_single(meaning)}")
        for option in _all_options(entry, entries):
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
            )
            value = " -r -F" if option.names[0] in FILES else " -x" if option.value else ""
            lines.append(f"{here} {names}{value} -d {_fish_single(option.help)}")
    return "\n".join(lines) + "\n"


def _single(text: str) -> str:
    """In single quotes, for bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_single(text: str) -> str:
    """In single quotes, for fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
