"""Whether a session is alive: probes, signs of life, and what is concluded; and whether what it sends arrives.

    healthy ── a probe, nothing heard for the timeout ──▶ suspect ── max_consecutive_failures in all ──▶ dead
       ▲                                                    │
       └──────────────── anything heard ────────────────────┘

A probe is a Yamux ping; anything received after it was sent is a sign of life. Probes are sent every
health.interval, and at once on an occasion (`hurry`), then with health.urgent_timeout. A peer that vanishes
is suspect within interval + timeout and given up within max_consecutive_failures - 1 timeouts more.
In a session that sends no packets, health.idle_interval counts, from when anything was heard: of the two ends one asks.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from typing import NamedTuple, Protocol

from shards.session.transport import TcpState
from shards.stream.spec import DATA_OVERHEAD_BYTES
from vpnd.config.live import Live

#: The part of the control frames a peer may send at once that a proof takes: enough for segments of 15 KB.
_OF_BURST = 4
#: Retransmissions in a row after which a lost packet is no longer the likely reason.
_REPEATED = 2


class Verdict(enum.Enum):
    """What the caller is to do."""

    NOTHING = "nothing"
    PROBE = "send a probe"
    SUSPECT = "a probe has failed: send another one, look for a replacement"
    RECOVERED = "it was suspect and is healthy again"
    DEAD = "end the session"


class Health:
    """One session's, without a clock. `step` at `next_s`, and when something is heard while it is suspect; times in
    seconds. `idle`: it sends no packets. `second`: the other end is the one to ask then."""

    def __init__(self, live: Live, now_s: float, *, second: bool = False) -> None:
        self._live, self._second = live, second
        self.failures = 0
        self.idle = False
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

    def rouse(self, now_s: float) -> bool:
        """It sends packets again, after a time in which nobody looked: whether a probe is due now."""
        due = self.idle and self._sent_s is None and now_s < self.next_s
        self.idle = False
        if due:
            self.next_s = now_s
        return due

    def retime(self, now_s: float) -> bool:
        """The interval may be another one: whether `next_s` comes earlier now."""
        due_s = now_s + self._live.config.health.interval
        earlier = due_s < self.next_s
        self.next_s = min(due_s, self.next_s)
        return earlier

    def step(self, now_s: float, heard_s: float) -> Verdict:
        """What is to be done now; `heard_s`: when something was received last."""
        health = self._live.config.health
        interval_s = max(health.interval, health.idle_interval) if self.idle else health.interval
        if self._sent_s is None:
            if self.idle:
                self.next_s = max(self.next_s, heard_s + interval_s + health.timeout * self._second)
            return self._probe(now_s, health.timeout) if now_s >= self.next_s else Verdict.NOTHING
        if heard_s >= self._sent_s:
            recovered = self.suspect
            self.failures = 0
            self.next_s = max(now_s, self._sent_s + interval_s)
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


class Talk(Protocol):
    """A session, as its health looks at it. `heard_s`: when something was received last."""

    heard_s: float
    initiator: bool
    packets_sent: int

    def now(self) -> float: ...


class HealthTimer:
    """A session's health on the loop. `act` does what a verdict asks. Owner: the link."""

    def __init__(self, live: Live, talk: Talk, act: Callable[[Verdict], None]) -> None:
        self.health = Health(live, talk.now(), second=not talk.initiator)
        self._talk, self._act = talk, act
        self._sent = -1  # packets, at the last step
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False

    def start(self) -> None:
        """Look when it is time, from now on."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._stopped:
            self._timer = self._loop.call_later(max(0.0, self.health.next_s - self._talk.now()), self.check)

    def check(self) -> None:
        talk = self._talk
        self.health.idle, self._sent = talk.packets_sent == self._sent, talk.packets_sent
        self._act(self.health.step(talk.now(), talk.heard_s))
        self.start()

    def hurry(self) -> None:
        if not self._stopped:
            self._act(self.health.hurry(self._talk.now()))
            self.start()

    def look(self) -> None:
        """Whether it sends packets again."""
        talk = self._talk
        if talk.packets_sent != self._sent and self.health.rouse(talk.now()):
            self.start()

    def retime(self) -> None:
        if self.health.retime(self._talk.now()):
            self.start()

    def stop(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()


class SegmentWatch:
    """Whether something on the way seems to drop a session's large segments and tells nobody, as a link with a small
    MTU may: `look` from time to time. `stuck`: what the last look found. Owner: the link.

    Seen from who sends, a segment is sent again and again. From the other end everything is acknowledged, and a probe
    is not answered in time. A way that carries nothing for a while looks much the same: only the next session can tell.
    """

    def __init__(self, live: Live) -> None:
        self._live = live
        self.stuck = False
        self._since_s: float | None = None  # so long a segment has been repeated too often

    def look(self, tcp: TcpState, suspect: bool, now_s: float) -> bool:
        """Whether it has just turned out. `suspect`: a probe was not answered in time."""
        config = self._live.config
        large = tcp.segment_bytes > config.session.small_segment
        if not large or tcp.retransmissions < config.session.stuck_retransmissions:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s
        repeated = self._since_s is not None and now_s - self._since_s >= config.health.timeout
        was, self.stuck = self.stuck, repeated or large and suspect and not tcp.unacknowledged
        return self.stuck and not was


class Proof:
    """That a session's largest segments arrive, both ways, before it is used: as many pings as fill one, each of them
    and each answer being a message of its own. Owner: the link."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._open: set[int] = set()
        self._begun_s = 0.0

    def begin(self, ping: Callable[[float], int], segment_bytes: int, now_s: float) -> None:
        """Send them with one `ping` each. What is flushed at once goes in one segment."""
        burst = self._live.config.session.control_burst // _OF_BURST
        count = min(-(-segment_bytes // DATA_OVERHEAD_BYTES), burst)
        self._open, self._begun_s = {ping(now_s) for _ in range(count)}, now_s

    def answered(self, value: int) -> bool:
        """Whether a pong is for one of them."""
        known = value in self._open
        self._open.discard(value)
        return known

    @property
    def under_way(self) -> bool:
        """Some are not answered."""
        return bool(self._open)

    def failed(self, now_s: float) -> bool:
        """Some were not answered in time."""
        return self.under_way and now_s - self._begun_s >= self._live.config.health.timeout


class Stall(NamedTuple):
    """Since `since_s` nothing that was sent has been acknowledged; `noticed_s`: when that was seen."""

    since_s: float
    noticed_s: float


class StallWatch:
    """Whether anything of what a session sends is acknowledged: `look` from time to time. `stall`: what the last look
    found; `in_flight`: something was not yet; `since_s`: nothing since then. Owner: the lane of datagrams beside it."""

    def __init__(self, now_s: float) -> None:
        self.stall: Stall | None = None
        self.in_flight = False
        self._acknowledged = 0
        self.since_s = now_s

    def look(self, tcp: TcpState | None, now_s: float) -> Stall | None:
        """`tcp` None: nothing was sent."""
        self.in_flight = tcp is not None and tcp.unacknowledged > 0
        if tcp is None or not tcp.unacknowledged or tcp.acknowledged_bytes != self._acknowledged:
            self._acknowledged = tcp.acknowledged_bytes if tcp is not None else self._acknowledged
            self.since_s, self.stall = now_s, None
        elif self.stall is None and tcp.retransmissions >= _REPEATED:
            self.stall = Stall(self.since_s, now_s)
        return self.stall
