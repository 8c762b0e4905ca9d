"""What is known of dialing one peer: how often it failed, how long to leave it alone, what is under way.

Two things are counted. Every try that fails, a dial or a session that ended before packets flowed, makes the next
one wait (`Retry`). What fails while no session with the peer is up counts for its circuit as well, and so does the
failure of its last session; used-up attempts open it. While a session is up, the circuit is not touched and blocks
nothing: the peer is evidently there. What broke together is one failure: it counts only if the thing that failed
began after the failure that was counted last. So the loss of eight sessions at a stroke does not open a circuit
before a single dial has tried.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from vpnd.config.live import Live
from vpnd.discovery.registry import Member
from vpnd.resilience import Circuit, CircuitBreaker, Retry, Uniform

NEVER = math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class Dial:
    """One dial, from the planner's decision to its end. `retry`: it follows a failure."""

    member: Member
    shard: int
    begun_s: float
    retry: bool


@dataclasses.dataclass(frozen=True)
class CircuitChange:
    """A circuit went from `old` to `new`; `why` is the last error, empty when there is none."""

    member: Member
    old: Circuit
    new: Circuit
    why: str


class PeerDials:
    """Dialing state of one peer. Owner: the planner, which writes the plain attributes."""

    def __init__(
        self, member: Member, live: Live, uniform: Uniform, changed: Callable[[CircuitChange], None]
    ) -> None:
        self.member = member
        self.not_before_s = -NEVER  # end of the wait after a failure; urgent packets end it earlier
        self.last_dial_s = -NEVER
        self.settled_s = -NEVER  # other addresses, known after a dial at that time, are tried at once
        self.urgent_s = -NEVER  # when packets waited last
        self.turn_s: dict[int, float] = {}  # shard -> its turn, its pace
        self.wanted: dict[int, int] = {}  # shard -> sessions it wants, where it has said so
        self.under_way: set[Dial] = set()
        self.due_s = NEVER  # as it stands in the planner's queue
        self.dials = 0
        self.failures = 0
        self.last_error = ""
        #: a session with it is up; when that ended last
        self.present, self.gone_s = False, -NEVER
        self._counted_s = -NEVER  # when a failure counted last
        self._why = ""
        self._uniform = uniform
        self._changed = changed
        self._live, self._retry_settings = live, live.config.retry
        self.retry = Retry.by(self._retry_settings, self._uniform)
        self.breaker = CircuitBreaker(live.config.circuit_breaker, self._moved)

    def other_settings(self) -> None:
        """Waits are drawn anew when the settings of [retry] are others; the circuit stays as it is."""
        config = self._live.config
        self.breaker.settings = config.circuit_breaker
        if config.retry != self._retry_settings:
            self._retry_settings = config.retry
            self.retry = Retry.by(self._retry_settings, self._uniform)
            self.not_before_s = -NEVER
            self.turn_s.clear()  # the pace is one of them

    def _moved(self, old: Circuit, new: Circuit) -> None:
        self._changed(CircuitChange(self.member, old, new, self._why))

    def failed(
        self, error: str, begun_s: float, now_s: float, *, connected: bool, blame: bool = True
    ) -> None:
        """A dial, or a session that never was up, came to nothing.

        `begun_s`: when it began. `connected`: whether another session with the peer is up. `blame`: whether it
        counts against the peer, beside making it wait.
        """
        self.failures += 1
        self.last_error = error
        if not self._counts(begun_s, now_s):
            return
        again_s = self.retry.fail(now_s)
        self.not_before_s = self.retry.not_before_s
        if connected or not blame:
            return
        self._why = error
        self.breaker.fail(now_s)
        if again_s is None:
            self.breaker.trip(now_s)
        if self.breaker.state is Circuit.OPEN and self.urgent_s >= begun_s:
            # Packets waited for this very try: the next one comes as early as the circuit lets it.
            self.not_before_s = now_s

    def gone(self, now_s: float) -> None:
        """The last session with it that was up has ended."""
        self.present, self.gone_s = False, now_s

    def lost(self, reason: str, begun_s: float, now_s: float) -> None:
        """The last session that was up has failed. It worked until now, so the next dial does not wait."""
        if self._counts(begun_s, now_s):
            self._why = f"the session was lost: {reason}"
            self.breaker.fail(now_s)

    def _counts(self, begun_s: float, now_s: float) -> bool:
        if begun_s < self._counted_s:
            return False
        self._counted_s = now_s
        return True

    def worked(self, *, inbound: bool) -> None:
        """A session with the peer is up. One that it dialed shows more than any probe: the circuit closes."""
        self.retry.reset()
        self.not_before_s = self._counted_s = -NEVER
        self.last_error = self._why = ""
        self.present = True
        if inbound:
            self.breaker.close()
        else:
            self.breaker.succeed()

    def begin_anew(self) -> None:
        """The circumstances are new: no wait, no turn and no failure from before counts, and no dial either."""
        self.wait_no_more()
        self.turn_s.clear()
        self.under_way.clear()

    def wait_no_more(self) -> None:
        """There is another way: no wait and no failure from before counts."""
        self.retry.reset()
        self.not_before_s = self._counted_s = -NEVER
        self.breaker.wait_no_more()

    def shard_left(self, shard: int) -> None:
        """The shard is gone; what it wanted too. A dial under way for it is nobody's any more."""
        self.turn_s.pop(shard, None)
        self.wanted.pop(shard, None)
        self.under_way = {dial for dial in self.under_way if dial.shard != shard}
