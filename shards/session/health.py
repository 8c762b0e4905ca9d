"""Whether a session is alive: probes, signs of life, and what is concluded.

    healthy ── a probe, nothing heard for the timeout ──▶ suspect ── max_consecutive_failures in all ──▶ dead
       ▲                                                    │
       └──────────────── anything heard ────────────────────┘

A probe is a Yamux ping; anything received after it was sent is a sign of life. Probes are sent every
health.interval, and at once on an occasion (`hurry`), then with health.urgent_timeout. A peer that vanishes
is suspect within interval + timeout and given up within max_consecutive_failures - 1 timeouts more.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable

from vpnd.config.live import Live


class Verdict(enum.Enum):
    """What the caller is to do."""

    NOTHING = "nothing"
    PROBE = "send a probe"
    SUSPECT = "a probe has failed: send another one, look for a replacement"
    RECOVERED = "it was suspect and is healthy again"
    DEAD = "end the session"


class Health:
    """One session's, without a clock. `step` at `next_s`, and when something is heard while it is suspect; times in
    seconds."""

    def __init__(self, live: Live, now_s: float) -> None:
        self._live = live
        self.failures = 0
        self.next_s = now_s + live.config.health.interval
        self._sent_s: float | None = None
        self._failed_s = 0.0  # when the probe under way has failed
        self._timeout_s = 0.0  # of the next one, if it fails

    @property
    def suspect(self) -> bool:
        """The last probe failed."""
        return self.failures > 0

    def hurry(self, now_s: float) -> Verdict:
        """Something happened that sessions do not always survive: probe now, or shorten the deadline of the probe
        under way."""
        urgent_s = self._live.config.health.urgent_timeout
        if self._sent_s is not None:
            self._failed_s = self.next_s = min(self._failed_s, now_s + urgent_s)
            self._timeout_s = min(self._timeout_s, urgent_s)
            return Verdict.NOTHING
        return self._probe(now_s, urgent_s)

    def retime(self, now_s: float) -> bool:
        """The interval may be another one: whether `next_s` comes earlier now."""
        due_s = now_s + self._live.config.health.interval
        earlier = due_s < self.next_s
        self.next_s = min(due_s, self.next_s)
        return earlier

    def step(self, now_s: float, heard_s: float) -> Verdict:
        """What is to be done now; `heard_s`: when something was received last."""
        health = self._live.config.health
        if self._sent_s is None:
            return self._probe(now_s, health.timeout) if now_s >= self.next_s else Verdict.NOTHING
        if heard_s >= self._sent_s:
            recovered = self.suspect
            self.failures = 0
            self.next_s = max(now_s, self._sent_s + health.interval)
            self._sent_s = None
            return Verdict.RECOVERED if recovered else Verdict.NOTHING
        if now_s < self._failed_s:
            self.next_s = self._failed_s
            return Verdict.NOTHING
        self.failures += 1
        if self.failures >= health.max_consecutive_failures:
            return Verdict.DEAD
        self._probe(now_s, self._timeout_s)
        return Verdict.SUSPECT

    def _probe(self, now_s: float, timeout_s: float) -> Verdict:
        self._sent_s, self._failed_s, self._timeout_s = now_s, now_s + timeout_s, timeout_s
        # Answered or not: an interval that is shorter than the timeout is kept as well.
        self.next_s = now_s + min(timeout_s, self._live.config.health.interval)
        return Verdict.PROBE


class HealthTimer:
    """A session's health on the loop. `heard_s()`: when something was received last; `act` does what a verdict asks.

    Owner: the link.
    """

    def __init__(
        self,
        live: Live,
        now: Callable[[], float],
        heard_s: Callable[[], float],
        act: Callable[[Verdict], None],
    ) -> None:
        self.health = Health(live, now())
        self._now, self._heard_s, self._act = now, heard_s, act
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def start(self) -> None:
        """Look when it is time, from now on."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._stopped:
            self._timer = self._loop.call_later(max(0.0, self.health.next_s - self._now()), self.check)

    def check(self) -> None:
        """Look now."""
        self._act(self.health.step(self._now(), self._heard_s()))
        self.start()

    def hurry(self) -> None:
        """As Health.hurry."""
        if not self._stopped:
            self._act(self.health.hurry(self._now()))
            self.start()

    def retime(self) -> None:
        """The interval may be another one."""
        if self.health.retime(self._now()):
            self.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
