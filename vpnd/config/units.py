"""How a setting is declared: its unit, its limits and its line of the reference, in one `Meta`."""

from __future__ import annotations

import msgspec
from msgspec import Meta


def duration(text: str, least: float, most: float) -> Meta:
    """A time in seconds, at least and at most so much; written as a duration in TOML."""
    return Meta(ge=least, le=most, description=text, extra={"unit": "duration"})


def size(text: str, least: int, most: int) -> Meta:
    """A number of bytes; TOML may say it as an integer or with KiB, MiB, GiB."""
    return Meta(ge=least, le=most, description=text, extra={"unit": "size"})


def number(text: str, least: int, most: int, unit: str = "count") -> Meta:
    """A plain integer within limits."""
    return Meta(ge=least, le=most, description=text, extra={"unit": unit})


def share(text: str, least: float, most: float) -> Meta:
    """A plain ratio within limits."""
    return Meta(ge=least, le=most, description=text, extra={"unit": "ratio"})


def text(text: str, kind: str = "text") -> Meta:
    """A string; `kind` names the further check in `check`: ip, cidr, multiaddr, path, name …"""
    return Meta(description=text, extra={"unit": kind})


def switch(text: str) -> Meta:
    """true or false."""
    return Meta(description=text, extra={"unit": "switch"})


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every table: frozen, and an unknown key is an error."""
