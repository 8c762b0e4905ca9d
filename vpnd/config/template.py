"""Configurations as TOML: the commented template of `config init`, and the effective one of `config show`."""

from __future__ import annotations

import json
import textwrap

from vpnd.config import durations, fields
from vpnd.config.fields import PEERS, Field
from vpnd.config.schema import Config, Table

_WIDTH = 100

_HEAD = """\
# vpnd: settings of one node. Everything here is optional: a line that starts with # shows the default.
# Also settable as environment variables (VPND_NETWORK_MTU=1400), which win over this file.
# Check after a change: vpnd config check. All settings explained: docs/configuration.md
"""

_PEER_EXAMPLE = """\
# One [[peers]] entry for each other node. `vpnd id` prints a node's peer id.
#[[peers]]
#name = "b"
#peer_id = "12D3KooW…"
#virtual_ip = "10.86.0.2"
#addresses = ["/ip4/192.0.2.2/tcp/4001"]
"""


def toml_value(field: Field, value: object) -> str:
    """One value as the file would have it."""
    if field.many and isinstance(value, list | tuple):
        return "[" + ", ".join(json.dumps(item, ensure_ascii=False) for item in value) + "]"
    if field.unit == "duration" and isinstance(value, int | float):
        return f'"{durations.format_duration(float(value))}"'
    if field.unit == "size" and isinstance(value, int):
        return f'"{durations.format_size(value)}"'
    return json.dumps(value, ensure_ascii=False)  # TOML's basic strings, numbers and booleans are JSON's


def limits(field: Field) -> str:
    """The values a number may have, in words; empty for everything else."""
    if field.least is None or field.most is None:
        return ""
    return f"{toml_value(field, field.least_value)} to {toml_value(field, field.most_value)}".replace('"', "")


def template() -> str:
    """A configuration that says nothing but shows every key with its default."""
    lines = [_HEAD]
    for table, known in fields.tables().items():
        if table == PEERS:
            lines.append(_PEER_EXAMPLE)
            continue
        lines.append(f"[{table}]")
        for field in known.values():
            allowed = limits(field)
            text = field.description + (f" ({allowed})" if allowed else "")
            lines += textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"#{field.key} = {toml_value(field, field.default)}")
        lines.append("")
    return "\n".join(lines)


def as_toml(config: Config) -> str:
    """Every setting with its value; reads back as the same configuration, but for the state directory."""
    lines = []
    for table, known in fields.tables().items():
        held = getattr(config, table)
        entries: tuple[Table, ...] = held if table == PEERS else (held,)
        for entry in entries:
            lines.append(f"[[{table}]]" if table == PEERS else f"[{table}]")
            lines += [f"{key} = {toml_value(field, getattr(entry, key))}" for key, field in known.items()]
            lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"
