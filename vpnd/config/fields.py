"""The settings as data: every key of every table, read off the Structs of `schema`.

`load`, `reference` and `changes` walk this instead of naming settings a second time.
"""

from __future__ import annotations

import functools
import typing

import msgspec

from vpnd.config import schema
from vpnd.config.setting import REQUIRED, Setting, Table

#: The one table of which there may be many: [[peers]].
PEERS = "peers"


class Field(Setting, frozen=True, kw_only=True):
    """One key and what is declared of it. `base` is int, float, str or bool; `many` means a list of them."""

    table: str
    key: str
    base: type
    many: bool

    @property
    def path(self) -> str:
        """As errors and flags name it: network.mtu."""
        return f"{self.table}.{self.key}"

    @property
    def variable(self) -> str:
        """The environment variable that sets it; peers can only be set in the file."""
        return "" if self.table == PEERS else f"VPND_{self.table}_{self.key}".upper()

    @property
    def least_value(self) -> float:
        """The lower limit, of the field's own type."""
        return self.base(self.least)

    @property
    def most_value(self) -> float:
        """The upper limit, of the field's own type."""
        return self.base(self.most)

    @property
    def required(self) -> bool:
        """True when there is no default."""
        return self.default is REQUIRED


def struct_of(table: str) -> type[Table]:
    """The Struct behind a table's name."""
    return schema.Peer if table == PEERS else typing.get_type_hints(schema.Config)[table]


@functools.cache
def tables() -> dict[str, dict[str, Field]]:
    """table -> key -> field, in the order of the schema."""
    names = [name for name in schema.Config.__struct_fields__ if name != "state_dir"]
    return {name: _fields_of(name, struct_of(name)) for name in names}


def all_settings() -> list[Field]:
    """Every field but those of peers."""
    return [field for name, keys in tables().items() if name != PEERS for field in keys.values()]


def _fields_of(table: str, struct: type[Table]) -> dict[str, Field]:
    hints = typing.get_type_hints(struct)
    found = {}
    for key, setting in struct.settings.items():
        many = typing.get_origin(hints[key]) is tuple
        base = typing.get_args(hints[key])[0] if many else hints[key]
        found[key] = Field(table=table, key=key, base=base, many=many, **msgspec.structs.asdict(setting))
    return found
