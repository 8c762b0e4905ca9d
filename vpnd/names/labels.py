"""Names of members as labels of DNS.

A member's name is any 1 to 63 printable characters; a host label has letters, digits and hyphens in its middle
(RFC 1123 section 2.1), and DNS does not tell capitals from small letters. So:

    1. a name that is a host label in small letters is its own label;
    2. one that is a host label but for capitals has it in small letters, when nobody has that yet
       (of several such names, the one that sorts first);
    3. every other has what is left of it, a hyphen, and the first digits of its SHA-256: "büro" is
       "b-ro-7d0b1e".

The outcome depends on the set of names alone, so every node that knows the same members says the same. Labels
with hyphens in the third and fourth place are kept for encodings (RFC 5890 section 2.3.1) and fall under 3.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

#: RFC 1035 section 2.3.4.
MAX_LABEL = 63
#: Hex digits that tell names apart whose letters are the same; more are taken should that not be enough.
DIGEST_DIGITS = 6
#: What remains of a name without a single letter or digit.
NAMELESS = "member"

_HOST_LABEL = re.compile(r"(?!..--)[a-z0-9]([a-z0-9-]*[a-z0-9])?", re.ASCII)


def assign(names: Iterable[str]) -> dict[str, str]:
    """name -> label, one label for each name and no label twice."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    later = []
    rest = sorted(set(names))
    for exact in (True, False):
        for name in rest:
            label = name if exact else _lower(name)
            if is_label(label) and label not in taken:
                found[name] = label
                taken.add(label)
            else:
                later.append(name)
        rest, later = later, []
    for name in rest:
        found[name] = _marked(name, taken)
        taken.add(found[name])
    return found


def is_label(text: str) -> bool:
    """True for a host label in small letters."""
    return len(text) <= MAX_LABEL and _HOST_LABEL.fullmatch(text) is not None


def _lower(text: str) -> str:
    """A to Z alone: str.lower() makes some other characters letters of ASCII ("K", the Kelvin sign)."""
    return "".join(c.lower() if c.isascii() else c for c in text)


def _marked(name: str, taken: set[str]) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    kept = re.sub(r"[^a-z0-9]+", "-", _lower(name)).strip("-") or NAMELESS
    for digits in range(DIGEST_DIGITS, MAX_LABEL - 1):
        label = f"{kept[: MAX_LABEL - 1 - digits].rstrip('-')}-{digest[:digits]}"
        if is_label(label) and label not in taken:
            return label
    raise AssertionError("62 digits of SHA-256 and a first letter were taken")
