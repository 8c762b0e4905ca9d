"""Text on its way to a person: from elsewhere, what numbers mean, and how wide a terminal is."""

from __future__ import annotations

import textwrap

#: Columns of what commands print.
WIDTH = 80


def printable(text: str) -> str:
    """`text` with everything a terminal would act on (controls, escapes, line ends) written as \\uXXXX."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def many(number: int, what: str, plural: str = "") -> str:
    """ "1 peer", "2 peers", "1,234 peers"; `plural`: of a word that takes more than an s."""
    return f"{number:,} {what if number == 1 else plural or f'{what}s'}"


def span(seconds: float) -> str:
    """Seconds in the two largest units: "3 d 4 h", "1 m 5 s"."""
    left = int(seconds)
    shown: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, length)
        if amount or shown or unit == "s":
            shown.append(f"{amount} {unit}")
    return " ".join(shown[:2])


def wrapped(paragraph: str, indent: int = 2, begun: int = 0) -> str:
    """In lines of WIDTH at most; all but the first are indented, which has `begun` characters before it already."""
    lines = textwrap.wrap(
        "x" * begun + paragraph,
        WIDTH,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    return "\n".join(lines)[begun:]
