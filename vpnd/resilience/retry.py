"""Trying again a limited number of times: what is left of the attempts, and the waits between them."""

from __future__ import annotations

from vpnd.resilience.backoff import Backoff


class Retry:
    """The attempts at one thing: a dial, a stream to open, an address to set.

    `max_attempts`: failures in a row after which it is given up. Being cancelled needs no call: whoever has lost
    interest does not ask any more. Owner: who tries.
    """

    def __init__(self, backoff: Backoff, max_attempts: int) -> None:
        """`backoff` belongs to the retry from now on."""
        self._backoff = backoff
        self._max_attempts = max_attempts
        #: End of the wait after the last failure. It goes on growing when the attempts are used up, for a thing
        #: that is never given up for good.
        self.not_before_s = 0.0

    @property
    def failures(self) -> int:
        """Failures since the last `reset`."""
        return self._backoff.failures

    @property
    def left(self) -> int:
        """Failures until it is given up; 0 when it is."""
        return max(0, self._max_attempts - self._backoff.failures)

    def fail(self, now_s: float) -> float | None:
        """An attempt failed: the moment before which not to try again, or None when it is given up."""
        self.not_before_s = self._backoff.fail(now_s)
        return self.not_before_s if self.left else None

    def reset(self) -> None:
        """It worked, or the circumstances are new: all attempts are there again, the smallest wait first."""
        self._backoff.reset()
