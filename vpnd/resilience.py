"""What is done about things that fail: waiting, giving up, leaving alone. Values that know neither clock nor dice.

The circuit breaker:

          failure_threshold failures, or trip()
closed ──────────────────────────────────────────▶ open ◀──┐
  ▲ ▲                                               │ │     │
  │ └───────────── proven: close() ─────────────────┘ │     │ one failure
  │                                                   │     │
  │   success_threshold successes       reset_timeout │     │
  └───────────────────────────────────── half_open ◀──┘     │
                                            └───────────────┘
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

from vpnd.config.schema import CircuitBreaker as CircuitSettings
from vpnd.config.schema import Retry as Settings

#: Draws a number evenly from [low, high]; `random.Random().uniform` in production, a script in tests.
Uniform = Callable[[float, float], float]


class Backoff:
    """The waits of one thing that is tried again and again: exponential, with full jitter.

    A wait drawn evenly between nothing and the current ceiling keeps nodes that lost each other at the same moment from
    knocking at the same moment again.

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

    @classmethod
    def by(cls, settings: Settings, uniform: Uniform) -> Retry:
        """By the settings of [retry]."""
        backoff = Backoff(settings.initial_interval, settings.max_interval, settings.multiplier, uniform)
        return cls(backoff, settings.max_attempts)

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


class Circuit(enum.StrEnum):
    """Named for what passes: everything, nothing, one try at a time."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Event(enum.Enum):
    """What moves a circuit from state to state."""

    FAILED = "failed"  # often enough for the state it is in
    WAITED = "waited"  # long enough, or there is a reason to try early
    PROVEN = "proven"  # it works


TRANSITIONS: dict[tuple[Circuit, Event], Circuit] = {
    (Circuit.CLOSED, Event.FAILED): Circuit.OPEN,
    (Circuit.OPEN, Event.WAITED): Circuit.HALF_OPEN,
    (Circuit.OPEN, Event.PROVEN): Circuit.CLOSED,
    (Circuit.HALF_OPEN, Event.FAILED): Circuit.OPEN,
    (Circuit.HALF_OPEN, Event.PROVEN): Circuit.CLOSED,
}

#: Told every change: from, to. Called in the middle of it: note it, and do not call the breaker from there.
Changed = Callable[[Circuit, Circuit], None]


class CircuitBreaker:
    """The circuit of one thing. Closed to begin with.

    failure_threshold failures in a row open it, reset_timeout later one try may `take` it half-open;
    success_threshold successes close it. `opened`: how often it left the closed state; a try in between that
    failed is the same outage. `settings`: may be others at any time.
    """

    def __init__(self, settings: CircuitSettings, changed: Changed) -> None:
        self.settings = settings
        self.state = Circuit.CLOSED
        self.opened = 0
        self.failures = 0  # in a row
        self._changed = changed
        self._successes = 0  # since it was open
        self._opened_s = -math.inf
        self._trying = False

    @property
    def not_before_s(self) -> float:
        """When `take` may say yes: infinite while a try is out, without limit when it says yes at once."""
        if self.state is Circuit.OPEN:
            return self._opened_s + self.settings.reset_timeout
        return math.inf if self._trying else -math.inf

    def take(self, now_s: float) -> bool:
        """Whether a try may begin now. Half-open that is one, which ends with `fail`, `succeed` or `release`."""
        if now_s < self.not_before_s:
            return False
        if self.state is Circuit.OPEN:
            self._move(Event.WAITED)
        self._trying = self.state is Circuit.HALF_OPEN
        return True

    def release(self) -> None:
        """The try that was out came to nothing, and nobody is to blame: another one may begin."""
        self._trying = False

    def fail(self, now_s: float) -> None:
        """A failure. One that began before the circuit opened and comes late changes nothing."""
        self.failures += 1
        if self.state is Circuit.HALF_OPEN or self.failures >= self.settings.failure_threshold:
            self.trip(now_s)

    def trip(self, now_s: float) -> None:
        """Open it, whatever the count says."""
        if self.state is Circuit.OPEN:
            return
        if self.state is Circuit.CLOSED:
            self.opened += 1
        self._opened_s = now_s
        self._move(Event.FAILED)

    def succeed(self) -> None:
        """A success; in an open circuit too, where something that was on its way has worked after all."""
        self.failures = 0
        self._trying = False
        if self.state is Circuit.CLOSED:
            return
        successes = self._successes + 1
        if successes >= self.settings.success_threshold:
            self._move(Event.PROVEN)
            return
        if self.state is Circuit.OPEN:
            self._move(Event.WAITED)
        self._successes = successes

    def close(self) -> None:
        self.failures = 0
        if self.state is not Circuit.CLOSED:
            self._move(Event.PROVEN)

    def wait_no_more(self) -> None:
        """The circumstances are new: failures so far say nothing, and an open circuit is half-open now."""
        self.failures = 0
        self._trying = False
        if self.state is Circuit.OPEN:
            self._move(Event.WAITED)

    def _move(self, event: Event) -> None:
        """The only place the state changes."""
        old, self.state = self.state, TRANSITIONS[self.state, event]
        self._successes = 0
        self._trying = False
        self._changed(old, self.state)
