"""Waiting between tries: exponential backoff with full jitter, as a value that knows neither clock nor dice.

Full jitter (a wait drawn evenly between nothing and the current ceiling) keeps nodes that lost each other
at the same moment from knocking at the same moment again.
"""

from __future__ import annotations

from collections.abc import Callable

#: Draws a number evenly from [low, high]; `random.Random().uniform` in production, a script in tests.
Uniform = Callable[[float, float], float]


class Backoff:
    """The waits of one thing that is tried again and again.

    `initial_s`, `max_s`: ceiling of the first wait and of any wait, in seconds. `multiplier`: growth of the
    ceiling from one failure to the next, at least 1. `failures` counts since the last `reset`.
    """

    def __init__(self, initial_s: float, max_s: float, multiplier: float, uniform: Uniform) -> None:
        self._initial_s = initial_s
        self._max_s = max_s
        self._multiplier = multiplier
        self._uniform = uniform
        self._ceiling_s = min(initial_s, max_s)
        self.failures = 0

    def fail(self, now_s: float) -> float:
        """Count a failure; returns the moment, on the clock of `now_s`, before which not to try again."""
        wait_s = self._uniform(0.0, self._ceiling_s)
        self.failures += 1
        # Grown step by step instead of by a power: a peer that is away for days must not overflow a float.
        self._ceiling_s = min(self._ceiling_s * self._multiplier, self._max_s)
        return now_s + wait_s

    def reset(self) -> None:
        """It worked: the next failure starts from the smallest wait again."""
        self.failures = 0
        self._ceiling_s = min(self._initial_s, self._max_s)
