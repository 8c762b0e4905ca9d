"""Whether datagrams reach the peer, how large ones, how many of them, how soon: probes and what their answers say.

    silent ── a probe is answered ──▶ alive ── none is for carrier.probe_timeout ──▶ silent
                                        │
In both, a datagram from another address proposes that address, if its counter is the highest so far; a probe is sent
there, and its answer moves the path there: the peer has roamed, or its NAT has.

Probes of a path that is in use are as large as its datagrams, so a path that no longer carries those is silent; then it
is found again by small ones. One that nobody uses is kept open by small ones, of which one end sends all, and the other
answers. Sizes are searched for as RFC 8899 says, but all at once: a path that has just come alive, or
carrier.search_interval later, is sent a probe of each size, and the largest answered one is what it carries.

Every probe and every answer tells how many datagrams have come, of which the loss towards the peer is made.
No clock here: times are arguments, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from shards.datagram import spec
from shards.datagram.pace import Pace
from vpnd.config.live import Live

#: As a socket of the shard takes it and gives it.
Address = tuple[str, int] | tuple[str, int, int, int]

#: Rounds of probes of all sizes: a probe that is lost must not be taken for one that was too large.
_ROUNDS = 3
#: Datagrams that have to be known of for the loss to be told; and the weight of what is new in averages (RFC 6298).
_LOSS_SAMPLE = 32
_WEIGHT = 0.125
#: A probe without padding; and probes that are sent in one turn, or wait for their answers, whatever a peer does.
_SMALL_BYTES = spec.OVERHEAD_BYTES + spec.PROBE_BYTES
_MOST_AT_ONCE = 64
#: Places of a peer that are remembered, however many it names.
_MOST_CANDIDATES = 8


class Probe(NamedTuple):
    """One to be sent: `size` bytes in all, to `address`; `token` 0: not a probe but the answer to `answers`."""

    address: Address
    size: int
    token: int = 0
    answers: int = 0


class _Sent(NamedTuple):
    sent_s: float
    address: Address
    size: int


class Path:
    """Of one association, which owns it. `candidates`: where the peer may be, tried in turn. `draw()`: a token.
    `second`: the other end is the one to keep it open while nobody uses it.

    `probes`: what is to be sent now; the owner empties it. `since_s`: when it came alive or fell silent. `confirmed_s`:
    when the latest probe that was answered was sent. `size`: the largest datagram that arrives, in bytes of payload.
    Of round trips: `rtt_s`, `jitter_s` (how much it changes, RFC 3550) and `least_rtt_s` (since the path is alive).
    `loss`: of what we sent, None until it is known.
    """

    def __init__(
        self,
        live: Live,
        candidates: tuple[Address, ...],
        draw: Callable[[], int],
        now_s: float,
        *,
        second: bool = False,
    ) -> None:
        self._live, self._draw, self._second = live, draw, second
        self._candidates = list(candidates)
        self.address: Address | None = candidates[0] if candidates else None
        self.alive = False
        self.since_s = now_s
        self.confirmed_s = -math.inf
        self.size = spec.BASE_BYTES
        self.probes: list[Probe] = []
        self.rtt_s: float | None = None
        self.least_rtt_s = self.jitter_s = 0.0
        self.loss: float | None = None
        self.pace = Pace(live)
        self.next_s = now_s
        self._sent: dict[int, _Sent] = {}
        self._fails_s: float | None = None  # when it is silent, if no answer comes to what was asked
        self._wait_s = live.config.carrier.probe_interval  # between two probes while it is silent
        self._rounds = 0  # of searching for its size, left
        self._search_s = 0.0
        self._told: tuple[int, int] | None = None  # what the loss was made of last: highest, received
        self._told_s = now_s
        self._asked_s = now_s  # when it was probed last
        self._answered_s = now_s  # when the peer did so last
        self._proposed: Address | None = None
        self._proposed_s = now_s

    @property
    def settled(self) -> bool:
        """Whether its size is known, as far as it can be now."""
        return self.alive and not self._rounds

    # --- time

    def step(self, now_s: float, used: bool) -> None:
        """Look at the time; `used`: something went over it, either way, since the last call. Then again at `next_s`."""
        carrier = self._live.config.carrier
        self._sent = {
            token: sent
            for token, sent in self._sent.items()
            if now_s - sent.sent_s < carrier.probe_timeout * 4
        }
        if self.alive and self._fails_s is not None and now_s >= self._fails_s:
            self._fall_silent(now_s)
        if self.address is None:
            self.next_s = now_s + carrier.retry_interval
            return
        if not self.alive:
            self._probe(self.address, spec.BASE_BYTES, now_s)
            self._asked_s = now_s
            self._try_next_candidate()
            self.next_s = now_s + self._wait_s
            self._wait_s = min(self._wait_s * 2, carrier.retry_interval)
            return
        asked_s = (
            max(self._asked_s, self._answered_s) + carrier.keepalive + carrier.probe_timeout * self._second
        )
        kept = not used and self._fails_s is None and not self._rounds and now_s < self._search_s
        if kept and now_s < asked_s:
            self.next_s = asked_s
            return
        self._probe(self.address, _SMALL_BYTES if kept else self.size, now_s)
        self._asked_s = now_s
        if self._fails_s is None:
            self._fails_s = now_s + carrier.probe_timeout
        if now_s >= self._search_s:
            self._rounds, self._search_s = _ROUNDS, now_s + carrier.search_interval
        if self._rounds:
            self._search(now_s)
        self.next_s = min(now_s + carrier.probe_interval, self._fails_s)

    def consider(self, addresses: tuple[Address, ...], now_s: float) -> None:
        """While it is silent, try these addresses first."""
        new = [address for address in addresses if address not in self._candidates]
        if new and not self.alive:
            self._candidates = [*new, *self._candidates][:_MOST_CANDIDATES]
            self.address = self._candidates[0]
            self.hurry(now_s)

    def hurry(self, now_s: float) -> None:
        """Something begins to go over it, or happened to the machine: do not wait as for an idle or silent one."""
        self._wait_s = self._live.config.carrier.probe_interval
        self.next_s = min(self.next_s, max(now_s, self._asked_s + self._wait_s))

    def doubt(self, now_s: float) -> None:
        """Whatever was known of it may be true no longer: it is silent until a probe is answered."""
        self._fall_silent(now_s)

    def _fall_silent(self, now_s: float) -> None:
        self.alive, self.since_s = False, now_s
        self.size, self._rounds = spec.BASE_BYTES, 0
        self._fails_s = self._told = None
        self._wait_s = self._live.config.carrier.probe_interval
        self.pace.free()

    def _try_next_candidate(self) -> None:
        if len(self._candidates) > 1:
            self._candidates.append(self._candidates.pop(0))
            self.address = self._candidates[0]

    def _search(self, now_s: float) -> None:
        assert self.address is not None  # it is alive
        self._rounds -= 1
        most = self._live.config.carrier.largest_datagram
        for size in sorted({min(size, most) for size in spec.PATH_BYTES}):
            if size > self.size:
                self._probe(self.address, size, now_s)

    def _probe(self, address: Address, size: int, now_s: float) -> None:
        token = self._draw()
        self._sent[token] = _Sent(now_s, address, size)
        self.probes.append(Probe(address, size, token))

    # --- what comes

    def heard(self, address: Address, now_s: float) -> None:
        """The datagram with the highest counter so far came from another address than the path has."""
        if self.address is None:
            self.address = address
            self._candidates = [address]
        if len(self._sent) >= _MOST_AT_ONCE:
            return
        if address != self._proposed or now_s >= self._proposed_s + self._live.config.carrier.probe_interval:
            self._proposed, self._proposed_s = address, now_s
            self._probe(address, _SMALL_BYTES, now_s)  # whoever is there did not ask for more

    def asked(self, address: Address, token: int, now_s: float) -> None:
        """A probe has come: it is answered to where it came from, whatever its size was with a small one."""
        self._answered_s = now_s
        if len(self.probes) < _MOST_AT_ONCE:
            self.probes.append(Probe(address, _SMALL_BYTES, 0, token))

    def answered(self, address: Address, token: int, now_s: float) -> None:
        """An answer has come. One to a token that is not ours, or from elsewhere, says nothing."""
        sent = self._sent.pop(token, None)
        if sent is None or sent.address != address:
            return
        self._measure(now_s - sent.sent_s)
        self.confirmed_s = max(self.confirmed_s, sent.sent_s)
        if address != self.address:
            if self.alive and address != self._proposed:
                return
            self.address = address
            self._candidates = [address]
            self.size = spec.BASE_BYTES
            self._search_s = self.next_s = now_s
        self._proposed = None
        self._fails_s = None
        self.size = max(self.size, sent.size)
        if not self.alive:
            self.alive, self.since_s = True, now_s
            self.least_rtt_s = now_s - sent.sent_s
            self._wait_s = self._live.config.carrier.probe_interval
            self._rounds, self._search_s = _ROUNDS, now_s + self._live.config.carrier.search_interval
            self.next_s = now_s

    def refused(self, size: int) -> None:
        """This machine does not send datagrams of `size` bytes (EMSGSIZE)."""
        if self.size >= size:
            self.size = spec.BASE_BYTES
            self._search_s = self.next_s
        self._sent = {token: sent for token, sent in self._sent.items() if sent.size < size}

    def _measure(self, rtt_s: float) -> None:
        if self.rtt_s is None:
            self.rtt_s = self.least_rtt_s = rtt_s
            return
        self.jitter_s += (abs(rtt_s - self.rtt_s) - self.jitter_s) * _WEIGHT
        self.rtt_s += (rtt_s - self.rtt_s) * _WEIGHT
        self.least_rtt_s = min(self.least_rtt_s, rtt_s)

    def told(self, highest: int, received: int, now_s: float) -> None:
        """The peer has received so many of our datagrams, and this was the highest."""
        if self._told is None:
            self._told, self._told_s = (highest, received), now_s
            return
        sent = highest - self._told[0]
        arrived = received - self._told[1]
        if sent < _LOSS_SAMPLE or arrived < 0:
            return
        loss = max(0.0, 1.0 - arrived / sent)
        self.loss = loss if self.loss is None else self.loss + (loss - self.loss) * _WEIGHT
        self.pace.learn(sent, loss, now_s - self._told_s)
        self._told, self._told_s = (highest, received), now_s
