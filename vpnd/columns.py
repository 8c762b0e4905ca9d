"""Text on a terminal: how wide, and how what is longer is wrapped."""

from __future__ import annotations

import textwrap

#: Columns of what commands print.
WIDTH = 80


def wrapped(paragraph: str, indent: int = 2, begun: int = 0) -> str:
    """In lines of WIDTH at most; all but the first are indented, which has `begun` characters before it already."""
    lines = textwrap.wrap(
        "x" * begun + paragraph,
        WIDTH,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    return "\n".join(lines)[begun:]
