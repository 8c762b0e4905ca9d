"""The settings for readers: docs/configuration.md, and a JSON Schema for editors, both made from `schema`."""

from __future__ import annotations

from typing import Any

import msgspec

from vpnd.config import durations, fields
from vpnd.config.fields import PEERS, Field
from vpnd.config.template import limits, toml_value

_HEAD = """\
# Configuration

<!-- Made by `vpnd config reference` from vpnd/config/schema.py; change it there. -->

A node reads one TOML file, `vpnd.toml` in its state directory (`/var/lib/vpnd`) unless `--config` or
`VPND_CONFIG` names another. Every setting has a default; a missing file means defaults. `vpnd config init`
writes a commented file to start from, `vpnd config check` says what is wrong with one, `vpnd config show`
prints what is in force and, with `--json`, where each value came from.

The order of precedence is: flags, environment, file, defaults. The environment variable of a setting is
`VPND_<TABLE>_<KEY>`, e.g. `VPND_NETWORK_MTU=1280`; lists are separated by commas. Peers are set in the file
only.

The state directory is not a key of the file: it is `--state-dir` or `VPND_STATE_DIR`. Relative paths in the
file are relative to it. Each node on a machine has a state directory and an interface of its own.

Durations are one number with `ms`, `s`, `m` or `h`: `"250ms"`, `"1.5s"`, `"5m"`. Sizes are bytes, or one
number with `KiB`, `MiB` or `GiB`: `"4MiB"`.

Multiaddrs are `/ip4/192.0.2.1/tcp/4001`, `/ip6/2001:db8::1/tcp/4001` or, in a peer's addresses,
`/dns/node.example.org/tcp/4001` (also `dns4` and `dns6`); a peer's may end in `/p2p/` and its peer id.
"""

_KINDS = {
    "cidr": "networks, like 10.86.0.0/16",
    "host_port": "host:port",
    "interface": "interface name",
    "ip": "IP address",
    "level": "level",
    "cipher": "cipher",
    "contract_address": "0x and 40 hex digits",
    "registry": "static, contract",
    "url": "http or https URL",
    "multiaddr": "multiaddrs",
    "peer_id": "peer id",
}


def reference() -> str:
    """docs/configuration.md."""
    parts = [_HEAD]
    for table, known in fields.tables().items():
        title = f"[[{table}]]" if table == PEERS else f"[{table}]"
        parts.append(f"## `{title}`\n\n{(fields.struct_of(table).__doc__ or '').strip()}\n")
        rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
        rows += [_row(field) for field in known.values()]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(field: Field) -> str:
    default = "must be given" if field.required else f"`{toml_value(field, field.default)}`"
    meaning = field.description.replace("|", "\\|")
    return f"| `{field.key}` | {default} | {_allowed(field)} | {meaning} |"


def _allowed(field: Field) -> str:
    within = limits(field)
    if within:
        plain = field.unit in ("duration", "size", "ratio", "count")
        return within if plain else f"{within} {field.unit}"
    if field.unit == "switch":
        return "true, false"
    kind = _KINDS.get(field.unit, field.unit)
    return f"list of {kind}" if field.many else kind


def json_schema() -> dict[str, Any]:
    """A JSON Schema (2020-12) of the file, for editors that complete and check TOML."""
    properties: dict[str, Any] = {}
    for table, known in fields.tables().items():
        content: dict[str, Any] = {
            "type": "object",
            "description": (fields.struct_of(table).__doc__ or "").strip(),
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
        one = {"type": "string", "pattern": f"^{durations.DURATION_PATTERN}$"}
    elif field.unit == "size":
        number = {"type": "integer", "minimum": field.least_value, "maximum": field.most_value}
        one = {"anyOf": [number, {"type": "string", "pattern": f"^{durations.SIZE_PATTERN}$"}]}
    elif field.base in (int, float):
        kind = "integer" if field.base is int else "number"
        one = {"type": kind, "minimum": field.least_value, "maximum": field.most_value}
    else:
        one = {"type": "boolean" if field.base is bool else "string"}
    if field.many:
        one = {"type": "array", "items": one, "uniqueItems": True}
    one["description"] = field.description
    if field.default is not msgspec.NODEFAULT:
        one["default"] = msgspec.json.decode(_json_default(field))
    return one


def _json_default(field: Field) -> str:
    # lists, texts and numbers of TOML as `toml_value` writes them are JSON too
    return toml_value(field, field.default)
