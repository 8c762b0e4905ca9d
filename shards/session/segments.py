"""Whether something on the way drops a session's large segments and tells nobody, as a link with a small MTU may.

Seen from who sends, a segment is sent again and again. From the other end everything is acknowledged, and no probe is
answered. A way that carries nothing looks much the same, but a moment of that must not count: so either has to last.
"""

from __future__ import annotations

from shards.session.transport import TcpState
from vpnd.config.live import Live

#: Looks in a row that find everything acknowledged and nothing answered: what was stuck on its way for a moment comes
#: with the peer's next repetition.
_LOOKS = 3


class SegmentWatch:
    """One session's, without a clock: `look` from time to time. `stuck`: what the last look found. Owner: the link."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.stuck = False
        self._since_s: float | None = None  # so long a segment has been repeated too often
        self._unanswered = 0  # looks

    def look(self, tcp: TcpState, suspect: bool, now_s: float) -> bool:
        """Whether it has just turned out. `suspect`: a probe was not answered in time."""
        config = self._live.config
        large = tcp.segment_bytes > config.session.small_segment
        if not large or tcp.retransmissions < config.session.stuck_retransmissions:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s
        repeated = self._since_s is not None and now_s - self._since_s >= config.health.timeout
        self._unanswered = self._unanswered + 1 if large and suspect and not tcp.unacknowledged else 0
        was, self.stuck = self.stuck, repeated or self._unanswered >= _LOOKS
        return self.stuck and not was
