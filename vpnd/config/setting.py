"""How a setting is declared: in one line of its table in `schema`, default first.

    mtu: int = number(1400, 576, 9000, "bytes", "Largest IP packet on the TUN device.", essential=True, restart=True)

The reference, the template, the checks of a value, its environment variable and what a reload does with it are all made
from that line.
"""

from __future__ import annotations

from typing import Any, TypedDict, TypeVar, Unpack, cast

import msgspec

Text = TypeVar("Text", str, tuple[str, ...])

#: What the user does to get a setting into force that a running node cannot take over.
START_AGAIN = "stop the node and start it again"
#: The default of a key that must be given.
REQUIRED: Any = msgspec.NODEFAULT


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is declared of one key.

    `unit` is the kind of value: duration (seconds), size (bytes), ratio, switch, choice, one of the text kinds of
    `values`, or what a number counts. `least` and `most` are limits of numbers. `essential`: in the template and the
    first chapter of the reference; the others are for tuning. `restart`: how a change gets into force; empty: a reload
    takes it over.
    """

    default: Any
    unit: str
    meaning: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    essential: bool = False
    restart: str = ""


class Flags(TypedDict, total=False):
    """See `Setting`. `restart` True: by `START_AGAIN`."""

    essential: bool
    restart: bool | str


def _setting(default: Any, unit: str, meaning: str, flags: Flags, **more: Any) -> Any:
    """The annotation of the key says what the Struct holds; `TableMeta` puts the default there."""
    essential, restart = flags.get("essential", False), flags.get("restart", "")
    remedy = START_AGAIN if restart is True else restart or ""
    return Setting(default=default, unit=unit, meaning=meaning, essential=essential, restart=remedy, **more)


def duration(default: float, least: float, most: float, meaning: str, **flags: Unpack[Flags]) -> float:
    """A time in seconds; written "250ms", "30s", "5m" or "1h" in TOML."""
    return cast(float, _setting(default, "duration", meaning, flags, least=least, most=most))


def size(default: int, least: int, most: int, meaning: str, **flags: Unpack[Flags]) -> int:
    """A number of bytes; TOML may say it as an integer or with KiB, MiB, GiB."""
    return cast(int, _setting(default, "size", meaning, flags, least=least, most=most))


def number(default: int, least: int, most: int, unit: str, meaning: str, **flags: Unpack[Flags]) -> int:
    """An integer that counts `unit`."""
    return cast(int, _setting(default, unit, meaning, flags, least=least, most=most))


def share(default: float, least: float, most: float, meaning: str, **flags: Unpack[Flags]) -> float:
    """A plain ratio."""
    return cast(float, _setting(default, "ratio", meaning, flags, least=least, most=most))


def text(default: Text, kind: str, meaning: str, **flags: Unpack[Flags]) -> Text:
    """A string, or a list of them; `kind` names its check in `values`."""
    return cast(Text, _setting(default, kind, meaning, flags))


def choice(default: str, choices: tuple[str, ...], meaning: str, **flags: Unpack[Flags]) -> str:
    """One of a few words."""
    return cast(str, _setting(default, "choice", meaning, flags, choices=choices))


def switch(default: bool, meaning: str, **flags: Unpack[Flags]) -> bool:
    """true or false."""
    return cast(bool, _setting(default, "switch", meaning, flags))


class TableMeta(msgspec.StructMeta):
    """Makes a Struct of a table's lines: its defaults are those of the settings, which are kept in `settings`.

    `restart=True` on the class: all its settings are taken at the start.
    """

    settings: dict[str, Setting]

    def __new__(
        cls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        restart: bool = False,
        **rest: Any,
    ) -> TableMeta:
        settings = {key: value for key, value in namespace.items() if isinstance(value, Setting)}
        for key, setting in settings.items():
            if setting.default is REQUIRED:
                del namespace[key]
            else:
                namespace[key] = setting.default
            if restart:
                settings[key] = msgspec.structs.replace(setting, restart=START_AGAIN)
        table = super().__new__(cls, name, bases, namespace, **rest)
        table.settings = settings
        return table


class Table(msgspec.Struct, metaclass=TableMeta, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every table: frozen, and an unknown key is an error."""
