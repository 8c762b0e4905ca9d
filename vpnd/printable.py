"""Text from elsewhere on its way to a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with everything a terminal would act on (controls, escapes, line ends) written as \\uXXXX."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
