"""The settings for readers, all made from `schema`: docs/configuration.md, the template of `config init`, the effective
configuration of `config show`, and a JSON Schema for editors.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any

from vpnd.config import fields
from vpnd.config.fields import PEERS, Field
from vpnd.config.schema import Config
from vpnd.config.setting import Table
from vpnd.config.values import DURATION_PATTERN, SIZE_PATTERN, limits, toml_value

_HEAD = """\
# Configuration

<!-- Made by `vpnd config reference` from vpnd/config/schema.py; change it there. -->

A node reads one TOML file, `vpnd.toml` in its state directory (`/var/lib/vpnd`) unless `--config` or
`VPND_CONFIG` names another. Every setting has a default; a missing file means defaults. `vpnd config check` says
what is wrong with one, `vpnd config show` prints what is in force and, with `--json`, where each value came from.

The order of precedence is: flags, environment, file, defaults. The environment variable of a setting is
`VPND_<TABLE>_<KEY>`, e.g. `VPND_NETWORK_MTU=1280`; lists are separated by commas. Peers are set in the file
only.

The state directory is not a key of the file: it is `--state-dir` or `VPND_STATE_DIR`. Relative paths in the
file are relative to it. Each node on a machine has a state directory and an interface of its own.

Durations are one number with `ms`, `s`, `m` or `h`: `"250ms"`, `"1.5s"`, `"5m"`. Sizes are bytes, or one
number with `KiB`, `MiB` or `GiB`: `"4MiB"`.

*Settings* are those people set; `vpnd config init` writes them into a commented file to start from. *Tuning* settings
rarely need another value; any of them may be added to the file. A change of a *live* setting is in force after
`vpnd reload`, at the latest for what is made from then on; the others need the restart that the reload names.

Multiaddrs are `/ip4/192.0.2.1/tcp/4001`, `/ip6/2001:db8::1/tcp/4001` or, in a peer's addresses,
`/dns/node.example.org/tcp/4001` (also `dns4` and `dns6`); a peer's may end in `/p2p/` and its peer id.
"""

_KINDS = {
    "cidr": "network, like 10.86.0.0/16",
    "host_port": "host:port",
    "interface": "interface name",
    "ip": "IP address",
    "contract_address": "0x and 40 hex digits",
    "url": "http or https URL",
    "peer_id": "peer id",
}
_WIDTH = 100

_TEMPLATE_HEAD = """\
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


def _chapter(essential: bool) -> list[tuple[str, list[Field]]]:
    """The tables with settings of that kind."""
    chosen = [
        (table, [field for field in known.values() if field.essential == essential])
        for table, known in fields.tables().items()
    ]
    return [(table, known) for table, known in chosen if known]


def reference() -> str:
    """docs/configuration.md."""
    parts = [_HEAD]
    for title, essential in (("Settings", True), ("Tuning", False)):
        parts.append(f"## {title}\n")
        for table, known in _chapter(essential):
            name = f"[[{table}]]" if table == PEERS else f"[{table}]"
            parts.append(f"### `{name}`\n\n{_about(table)}\n")
            rows = ["| key | default | allowed | change | meaning |", "|---|---|---|---|---|"]
            rows += [_row(field) for field in known]
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _about(table: str) -> str:
    return (fields.struct_of(table).__doc__ or "").strip()


def _row(field: Field) -> str:
    default = "must be given" if field.required else f"`{toml_value(field, field.default)}`"
    change = "restart" if field.restart else "live"
    return f"| `{field.key}` | {default} | {_allowed(field)} | {change} | {field.meaning} |"


def _allowed(field: Field) -> str:
    within = limits(field)
    if within:
        plain = field.unit in ("duration", "size", "ratio")
        return within if plain else f"{within} {field.unit}"
    if field.choices:
        return ", ".join(field.choices)
    if field.unit == "switch":
        return "true, false"
    kind = _KINDS.get(field.unit, field.unit)
    return f"list: {kind}" if field.many else kind


def template() -> str:
    """A configuration that says nothing but shows the essential keys with their defaults."""
    lines = [_TEMPLATE_HEAD]
    for table, known in _chapter(essential=True):
        if table == PEERS:
            lines.append(_PEER_EXAMPLE)
            continue
        lines.append(f"[{table}]")
        for field in known:
            allowed = limits(field) or ", ".join(field.choices)
            text = field.meaning + (f" ({allowed})" if allowed else "")
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


def json_schema() -> dict[str, Any]:
    """A JSON Schema (2020-12) of the file, for editors that complete and check TOML."""
    properties: dict[str, Any] = {}
    for table, known in fields.tables().items():
        content: dict[str, Any] = {
            "type": "object",
            "description": _about(table),
            "properties": {key: _property(field) for key, field in known.items()},
            "additionalProperties": False,
        }
        required = [key for key, field in known.items() if field.required]
        if required:
            content["required"] = required
        properties[table] = {"type": "array", "items": content} if table == PEERS else content
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vpnd configuration",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _property(field: Field) -> dict[str, Any]:
    one: dict[str, Any]
    if field.unit == "duration":
        one = {"type": "string", "pattern": f"^{DURATION_PATTERN}$"}
    elif field.unit == "size":
        number = {"type": "integer", "minimum": field.least_value, "maximum": field.most_value}
        one = {"anyOf": [number, {"type": "string", "pattern": f"^{SIZE_PATTERN}$"}]}
    elif field.base in (int, float):
        kind = "integer" if field.base is int else "number"
        one = {"type": kind, "minimum": field.least_value, "maximum": field.most_value}
    else:
        one = {"type": "boolean" if field.base is bool else "string"}
    if field.choices:
        one["enum"] = list(field.choices)
    if field.many:
        one = {"type": "array", "items": one, "uniqueItems": True}
    one["description"] = field.meaning
    if not field.required:
        # lists, texts and numbers of TOML as `toml_value` writes them are JSON too
        one["default"] = json.loads(toml_value(field, field.default))
    return one
