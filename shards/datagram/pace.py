"""How fast datagrams go out: as fast as they come, until the path loses a good part of them.

A path that loses more than carrier.loss_limit of what is sent is taken to be slower than that: from then on a little
less goes out than arrived, and what is too much waits in the fair queue in front. Where the session's own streams have
more to send, too, each of the two gets half of what arrives. The pace is raised step by step while less is lost, until
it holds nothing back.
"""

from __future__ import annotations

from vpnd.config.live import Live

#: Of what has arrived while too much was lost; and by how much the pace rises with each report of less loss.
_BACK_OFF, _RAISE = 0.85, 1.25
#: Datagrams of one report whose loss says that the path is full, and that it still is: a few are lost on good ones too.
_BEGIN, _GO_ON = 64, 8
#: Seconds that may be saved up, so that a late timer costs nothing; and the slowest pace, in bytes a second.
_BURST_S = 0.02
_LEAST = 16_384


class Pace:
    """A token bucket in bytes. Owner: the path. `rate` None: nothing is held back. `beside`: bytes a second that arrive
    of the streams beside, if more is waiting to be sent there."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.rate: float | None = None
        self.beside: float | None = None
        self._tokens = self._filled_s = 0.0
        self._bytes = self._datagrams = 0
        self._used = False  # it has held something back since the last report

    def spent(self, size: int, datagrams: int) -> None:
        """So much went out."""
        self._bytes += size
        self._datagrams += datagrams
        if self.rate is not None:
            self._tokens -= size

    def wait_s(self, now_s: float) -> float:
        """Until something may go out; 0: now."""
        rate = self.rate
        if rate is None:
            return 0.0
        self._tokens = min(self._tokens + (now_s - self._filled_s) * rate, rate * _BURST_S)
        self._filled_s = now_s
        if self._tokens > 0:
            return 0.0
        self._used = True
        return -self._tokens / rate + 1e-4

    def learn(self, sent: int, loss: float, within_s: float) -> None:
        """Of `sent` datagrams of the last `within_s` seconds the share `loss` has not come."""
        size = self._bytes / self._datagrams if self._datagrams else 0.0
        self._bytes = self._datagrams = 0
        used, self._used = self._used, False
        lost = sent * loss
        arrived = sent - lost
        arrives = arrived * size / max(within_s, 1e-3)
        if loss > self._live.config.carrier.loss_limit and lost >= (_BEGIN if self.rate is None else _GO_ON):
            self.rate = min(arrives, self.rate or arrives) * _BACK_OFF
            self._tokens = min(self._tokens, 0.0)
        elif self.rate is not None:
            if used:
                self.rate *= _RAISE
            else:
                self.free()
        if self.rate is not None:
            fair = self.rate if self.beside is None else (arrives + self.beside) / 2
            self.rate = max(_LEAST, min(self.rate, fair))

    def free(self) -> None:
        """Nothing is held back any more."""
        self.rate = None
        self._tokens = 0.0
