"""What look-ups found, or that they found nothing, and for how long that is believed.

The lifetimes are settings: discovery.cache_lifetime and discovery.negative_cache_lifetime. Time is an argument, in
seconds of one clock.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

import msgspec

Value = TypeVar("Value")


class Entry(msgspec.Struct, Generic[Value], frozen=True):
    """One answer. `value` None: there was nothing. `found_s`: when it was found."""

    value: Value | None
    found_s: float


class AnswerCache(Generic[Value]):
    """Answers by what was asked for. Over `most` entries, the one stored longest ago goes. Owner: control."""

    def __init__(self, positive_s: float, negative_s: float, most: int) -> None:
        """`positive_s`, `negative_s`: how long an answer, and that there is none, is believed."""
        self._positive_s, self._negative_s, self._most = positive_s, negative_s, most
        self._entries: OrderedDict[str, Entry[Value]] = OrderedDict()

    def get(self, key: str, now_s: float) -> Entry[Value] | None:
        """The answer while it is believed; None: ask."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        lifetime_s = self._negative_s if entry.value is None else self._positive_s
        if now_s < entry.found_s + lifetime_s:
            return entry
        del self._entries[key]
        return None

    def put(self, key: str, value: Value | None, now_s: float) -> None:
        """Remember an answer, or None for nothing, instead of what was there."""
        self._entries.pop(key, None)
        self._entries[key] = Entry(value, now_s)
        self._shrink()

    def forget(self, key: str) -> None:
        """What was found turned out to be wrong."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Forget everything: the world is another one."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _shrink(self) -> None:
        while len(self._entries) > self._most:
            self._entries.popitem(last=False)
