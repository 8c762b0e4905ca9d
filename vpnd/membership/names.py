"""Names of networks, members and groups: one label of DNS, so that `<member>.<network>.vpn` is a host name."""

from __future__ import annotations

import re

#: RFC 1035 section 2.3.4.
MAX_LABEL = 63
#: RFC 1123 section 2.1 (a digit may come first), in lower case: DNS does not tell cases apart, so only one is stored.
LABEL_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"

_label = re.compile(LABEL_PATTERN, re.ASCII)
_other = re.compile(r"[^a-z0-9]+", re.ASCII)


def is_label(text: str) -> bool:
    """Whether `text` can be a name as it stands."""
    return _label.match(text) is not None


def to_label(text: str, fallback: str = "node") -> str:
    """The name nearest to what a person or a machine calls itself: "Ann's Laptop" is "ann-s-laptop"."""
    return _other.sub("-", text.lower())[:MAX_LABEL].strip("-") or fallback


def numbered(label: str, number: int) -> str:
    """`label` made different from its like: "laptop-2"; within the length of a label."""
    tail = f"-{number}"
    return label[: MAX_LABEL - len(tail)].rstrip("-") + tail
