"""One value at a time: what is written for a key becomes what the Struct holds, or is refused; and back.

`Refused` carries the reason and, after a semicolon, the remedy; `load` puts file, key and value before it.
Durations are written "250ms", "30s", sizes "4MiB". Nothing here looks at a second setting: that is `check`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import math
import pwd
import re
import urllib.parse
from collections.abc import Callable
from decimal import Decimal

from vpnd import peerid
from vpnd.config import multiaddrs
from vpnd.config.fields import Field
from vpnd.config.multiaddrs import Refused
from vpnd.packet.flow import rule_of
from vpnd.packet.record import MAX_RECORD_BYTES

#: Linux IFNAMSIZ is 16 with the closing zero byte.
MAX_INTERFACE_NAME = 15
#: Longest name of a node or peer: a label of DNS is as long.
MAX_NAME = 63
#: A ring has room for at least so many of the largest records.
RECORDS_IN_RING = 4

_ON, _OFF = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def convert(field: Field, raw: object, *, text_form: bool) -> object:
    """`raw` as `field` holds it. Raises Refused.

    `text_form`: the value comes from the environment, where everything is text and lists are separated by
    commas.
    """
    if not field.many:
        return _convert_one(field, raw, text_form)
    if text_form and isinstance(raw, str):
        raw = [part.strip() for part in raw.split(",")] if raw.strip() else []
    if isinstance(raw, str):
        raise Refused(f'must be a list; write ["{raw}"]')
    if not isinstance(raw, list | tuple):
        raise Refused('must be a list of strings; write ["…", "…"]')
    values = []
    for item in raw:
        try:
            values.append(_convert_one(field, item, text_form))
        except Refused as refusal:
            raise Refused(f"{item!r} {refusal}" if len(raw) > 1 else str(refusal)) from None
    for value in values:
        if values.count(value) > 1:
            raise Refused(f"names {value} twice; remove one")
    return tuple(values)


def _convert_one(field: Field, raw: object, text_form: bool) -> object:
    value = _BY_UNIT.get(field.unit, _BY_BASE[field.base])(field, raw, text_form)
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_range(field, value)
    # an empty text means "not set" and is only good where that is the default
    may_be_empty = field.default == ""
    if field.choices:
        value = _choice(value, field.choices)
    elif isinstance(value, str) and (value or not may_be_empty):
        value = _TEXT_KINDS[field.unit](value)
    if field.path == "worker.ring_bytes":
        _check_ring(value)
    return value


def _check_range(field: Field, value: float) -> None:
    if field.least is None or field.most is None or field.least <= value <= field.most:
        return
    least, most = (toml_value(field, limit).strip('"') for limit in (field.least_value, field.most_value))
    limit = f"at least {least}" if value < field.least else f"at most {most}"
    raise Refused(f"must be {limit}; give a value from {least} to {most}")


def _check_ring(value: object) -> None:
    if not isinstance(value, int):
        return
    least = RECORDS_IN_RING * MAX_RECORD_BYTES
    power = 1 << (max(value, least) - 1).bit_length()
    if value & (value - 1) or value < least:
        raise Refused(f'must be a power of two, at least {least}; write "{format_size(power)}"')


def _integer(field: Field, raw: object, text_form: bool) -> int:
    if text_form and isinstance(raw, str) and re.fullmatch(r"-?[0-9]{1,19}", raw.strip(), re.ASCII):
        return int(raw)
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    quoted = isinstance(raw, str) and raw.isascii() and raw.isdigit()
    raise Refused(
        f"must be an integer; {f'write {raw}, without quotes' if quoted else f'give one from {limits(field)}'}"
    )


def _ratio(field: Field, raw: object, text_form: bool) -> float:
    if text_form and isinstance(raw, str):
        with contextlib.suppress(ValueError):
            raw = float(raw)
    if isinstance(raw, int | float) and not isinstance(raw, bool) and math.isfinite(raw):
        return float(raw)
    raise Refused(f"must be a number; give one from {limits(field)}")


def _switch(field: Field, raw: object, text_form: bool) -> bool:
    if text_form and isinstance(raw, str) and (word := raw.strip().lower()) in (*_ON, *_OFF):
        return word in _ON
    if isinstance(raw, bool):
        return raw
    raise Refused("must be true or false; write it without quotes")


def _duration(field: Field, raw: object, text_form: bool) -> float:
    if isinstance(raw, str):
        try:
            return parse_duration(raw.strip())
        except ValueError as error:
            raise Refused(str(error)) from None
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        raise Refused(f'has no unit; write "{raw}s" for seconds or "{raw}ms" for milliseconds')
    raise Refused('must be a duration; write it like "30s"')


def _size(field: Field, raw: object, text_form: bool) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if isinstance(raw, str):
        if text_form and raw.strip().isascii() and raw.strip().isdigit():
            return int(raw)
        try:
            return parse_size(raw.strip())
        except ValueError as error:
            raise Refused(str(error)) from None
    raise Refused('must be a size; write it like "4MiB"')


def _text(field: Field, raw: object, text_form: bool) -> str:
    if not isinstance(raw, str):
        raise Refused("must be text; write it in quotes")
    if "\0" in raw:
        raise Refused("holds a zero byte; remove it")
    return raw.strip() if text_form else raw


_BY_UNIT: dict[str, Callable[[Field, object, bool], object]] = {"duration": _duration, "size": _size}
_BY_BASE: dict[type, Callable[[Field, object, bool], object]] = {
    int: _integer,
    float: _ratio,
    bool: _switch,
    str: _text,
}


def _name(value: str) -> str:
    if not value or len(value) > MAX_NAME or not value.isprintable() or any(map(str.isspace, value)):
        raise Refused(
            f'must be 1 to {MAX_NAME} printable characters without spaces; write for example "laptop-1"'
        )
    return value


def _interface(value: str) -> str:
    """The kernel's own rule (dev_valid_name in net/core/dev.c), and no template ("tun%d")."""
    if not 0 < len(value.encode()) <= MAX_INTERFACE_NAME:
        raise Refused(f'must be 1 to {MAX_INTERFACE_NAME} bytes long; write for example "vpnd0"')
    if not value.isascii() or not value.isprintable() or any(c in "/:% \"'\\" for c in value):
        raise Refused('may not hold spaces, quotes or any of / : % \\; write for example "vpnd0"')
    if value in (".", "..", "all", "default", "lo"):  # "all" and "default" are taken by net.ipv4.conf
        raise Refused('is taken by the system; write for example "vpnd0"')
    return value


def _choice(value: object, choices: tuple[str, ...]) -> str:
    word = str(value).lower()
    if word not in choices:
        raise Refused(f'must be one of {", ".join(choices)}; write for example "{choices[0]}"')
    return word


def _ip(value: str) -> str:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        if "/" in value:
            remedy = f'write "{value.split("/")[0]}" (the prefix length of the VPN is network.subnet)'
            raise Refused(f"is a network, not an address; {remedy}") from None
        raise Refused('is not an IP address; write it like "10.86.0.1"') from None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            raise Refused(f'is IPv4 inside IPv6; write "{address.ipv4_mapped}"')
        if address.scope_id:
            raise Refused(f'names an interface; write "{value.split("%")[0]}"')
    if address.is_unspecified or address.is_loopback or address.is_multicast or address == _BROADCAST:
        raise Refused("cannot be a node's address inside the VPN; take a private one, like 10.86.0.1")
    return str(address)


_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


def _cidr(value: str) -> str:
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise Refused('is not a network; write it like "10.86.0.0/16"') from None
    if "/" not in value:
        raise Refused(f'has no prefix length; write "{network}"')
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
        raise Refused("is IPv4 inside IPv6; write the IPv4 network")
    if ipaddress.ip_address(value.split("/")[0]) != network.network_address:
        raise Refused(f'has bits set behind the prefix; write "{network}"')
    if network.is_multicast or network.is_loopback:
        raise Refused("is never routed into a VPN; remove it")
    return str(network)


#: vpnd's own user, of process.user.
OWN_USER = "vpnd"


def _user(value: str) -> str:
    if value == OWN_USER:  # made at the start
        return value
    try:
        entry = pwd.getpwnam(value)
    except KeyError:
        raise Refused(f"is not a user of this machine; make it: useradd --system {value}") from None
    if entry.pw_uid == 0:
        raise Refused('is root, which the children must not be; write "nobody" or make a user')
    return value


def _host_port(value: str) -> str:
    host, _, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or any(map(str.isspace, host)) or not multiaddrs.is_port(port):
        raise Refused('must be host:port; write for example "127.0.0.1:9586" or "[::1]:9586"')
    return value


def _url(value: str) -> str:
    try:
        parts = urllib.parse.urlsplit(value)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or not value.isascii() or not value.isprintable() or " " in value or "#" in value:
        raise Refused('must be a URL; write for example "https://rpc.example.org" or "http://127.0.0.1:8545"')
    return value


def _contract_address(value: str) -> str:
    if not re.fullmatch(r"0x[0-9a-fA-F]{40}", value, re.ASCII):
        raise Refused("must be 0x and 40 hex digits; copy it from a block explorer")
    return value.lower()


def _path(value: str) -> str:
    if not value or value.endswith("/"):
        raise Refused('must be the path of a file; write for example "/var/lib/vpnd/vpnd.sock"')
    return value


def _peer_id(value: str) -> str:
    try:
        peerid.public_key_untrusted(value)
    except ValueError as error:
        raise Refused(f"{error}; copy what `vpnd id` prints on that node") from None
    return value


def _flow(value: str) -> str:
    try:
        rule_of(value)
    except ValueError as error:
        raise Refused(str(error)) from None
    return value


_TEXT_KINDS: dict[str, Callable[[str], str]] = {
    "text": lambda value: value,
    "name": _name,
    "interface": _interface,
    "ip": _ip,
    "cidr": _cidr,
    "multiaddr": lambda value: str(multiaddrs.parse(value)),
    "path": _path,
    "peer_id": _peer_id,
    "user": _user,
    "host_port": _host_port,
    "url": _url,
    "contract_address": _contract_address,
    "flow": _flow,
}

# --- as text, and from it

#: Seconds in each unit, longest first.
_DURATION_UNITS = {"h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001")}
#: Bytes in each unit, largest first.
_SIZE_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1}

DURATION_PATTERN = r"[0-9]+(\.[0-9]+)?(ms|s|m|h)"
SIZE_PATTERN = r"[0-9]+(B|KiB|MiB|GiB)"

_duration_form = re.compile(
    rf"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>{'|'.join(_DURATION_UNITS)})", re.ASCII
)
_size_form = re.compile(rf"(?P<number>[0-9]+)(?P<unit>{'|'.join(_SIZE_UNITS)})", re.ASCII)


def parse_duration(text: str) -> float:
    """Seconds of "250ms", "1.5s", "5m" or "1h": one number, one unit. Raises ValueError."""
    match = _duration_form.fullmatch(text)
    if not match:
        raise ValueError('is not a duration; write it like "250ms", "30s", "5m" or "1h"')
    return float(Decimal(match["number"]) * _DURATION_UNITS[match["unit"]])


def parse_size(text: str) -> int:
    """Bytes of "512KiB", "4MiB", "1GiB" or "65536B". Raises ValueError."""
    match = _size_form.fullmatch(text)
    if not match:
        raise ValueError('is not a size; write it like 65536, "512KiB", "4MiB" or "1GiB"')
    return int(match["number"]) * _SIZE_UNITS[match["unit"]]


def format_duration(seconds: float) -> str:
    """The longest unit that needs no fraction: 90.0 is "90s", 300.0 is "5m", 0.25 is "250ms", 0.0 is "0s"."""
    exact = Decimal(repr(seconds))
    if not exact:
        return "0s"
    for unit, length in _DURATION_UNITS.items():
        if exact % length == 0:
            return f"{int(exact / length)}{unit}"
    return f"{exact / _DURATION_UNITS['ms']:f}ms"


def format_size(count: int) -> str:
    """The largest unit that needs no fraction: 4194304 is "4MiB", 1000 is "1000B"."""
    for unit, length in _SIZE_UNITS.items():
        if count % length == 0 and (count or unit == "B"):
            return f"{count // length}{unit}"
    raise ValueError(f"{count} is not a number of bytes")


def toml_value(field: Field, value: object) -> str:
    """One value as the file would have it."""
    if field.many and isinstance(value, list | tuple):
        return "[" + ", ".join(json.dumps(item, ensure_ascii=False) for item in value) + "]"
    if field.unit == "duration" and isinstance(value, int | float):
        return f'"{format_duration(float(value))}"'
    if field.unit == "size" and isinstance(value, int):
        return f'"{format_size(value)}"'
    return json.dumps(value, ensure_ascii=False)  # TOML's basic strings, numbers and booleans are JSON's


def limits(field: Field) -> str:
    """The values a number may have, in words; empty for everything else."""
    if field.least is None or field.most is None:
        return ""
    return f"{toml_value(field, field.least_value)} to {toml_value(field, field.most_value)}".replace('"', "")
