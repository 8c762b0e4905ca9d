"""Streams that give way: while a little goes in datagrams, a session's bulk must not fill the queue of a slow link.

What a call has to wait for on its way is mostly what this very session has put there: TCP fills the queue in front of
the narrowest link, and datagrams stand in the same one. So, as long as datagrams are few beside what goes in streams,
TCP is paced a little below what arrives whenever its round trip says that a queue stands, and a little above when none
does. Others' traffic may be that queue: streams keep carrier.yield_share of what they have reached.

No clock and no socket in it.
"""

from __future__ import annotations

from shards.session.transport import TcpState
from vpnd.config.live import Live

#: How much less, and more, with each look; and how slowly it is forgotten what was reached.
_LESS, _MORE, _FORGET = 0.9, 1.03, 0.995
#: Bytes in datagrams for each one in streams up to which they are few.
_FEW = 0.2
#: Looks without a datagram after which none is in use.
_PATIENCE = 8
#: So many times the jitter is the mean of an even spread above its least.
_SPREAD = 3.0


class Courtesy:
    """Of one session. `rate`: the most that TCP may send, in bytes a second; None: no limit. Owner: its lane of
    datagrams."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.rate: float | None = None
        self._reached = 0.0
        self._unused = _PATIENCE

    def look(self, tcp: TcpState, jitter_s: float, in_streams: int, in_datagrams: int) -> bool:
        """From time to time, with the bytes sent since the last look; `jitter_s`: of the datagrams' round trip. Whether
        `rate` is another one."""
        carrier, before = self._live.config.carrier, self.rate
        self._unused = 0 if in_datagrams > 0 else self._unused + 1
        if self._unused >= _PATIENCE or in_datagrams > in_streams * _FEW or not tcp.rate:
            self.rate, self._reached = None, 0.0
            return before is not None
        self._reached = max(self._reached * _FORGET, tcp.rate)
        queued_s = tcp.rtt_s - tcp.least_rtt_s - jitter_s * _SPREAD
        if queued_s > carrier.yield_delay:
            less = min(self.rate or tcp.rate, tcp.rate) * _LESS
            self.rate = max(less, self._reached * carrier.yield_share)
        elif self.rate is not None:
            self.rate *= _MORE
        return self.rate != before
