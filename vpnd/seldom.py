"""Log lines that others can cause: how often they are written."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vpnd.config.live import Live

#: Kinds and peers of which it is known when a line was written last; beyond, peers of one kind are told together.
MOST_REMEMBERED = 1024


class Seldom:
    """Of one kind, and of one member, at most one line is written in log.refusal_interval; the next one says how many
    were left out.

    `now_s` is a clock. Owner: the loop that logs; not thread-safe.
    """

    def __init__(self, log: logging.Logger, live: Live, now_s: Callable[[], float]) -> None:
        self._log, self._live, self._now_s = log, live, now_s
        #: by kind and member: when a line was written last, and those left out since
        self._last: dict[tuple[str, str], tuple[float, int]] = {}

    def warn(self, kind: str, text: str, member: str = "") -> None:
        """A warning. `member`: who causes it, where that is a member, of whom there are only so many."""
        self.log(logging.WARNING, kind, text, member)

    def log(self, level: int, kind: str, text: str, member: str = "") -> None:
        """See `warn`."""
        now_s, interval_s = self._now_s(), self._live.config.log.refusal_interval
        if (kind, member) not in self._last and len(self._last) >= MOST_REMEMBERED:
            self._last = {key: was for key, was in self._last.items() if now_s < was[0] + interval_s}
            if len(self._last) >= MOST_REMEMBERED:
                member = ""
        last_s, left_out = self._last.get((kind, member), (now_s - interval_s, 0))
        if now_s < last_s + interval_s:
            self._last[kind, member] = last_s, left_out + 1
            return
        self._last[kind, member] = now_s, 0
        self._log.log(level, "%s%s", text, f" (and {left_out} more like it)" if left_out else "")
