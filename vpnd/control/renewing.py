"""Keeping this node a member: its membership is renewed long before it ends, by whatever authority can be reached.

It is also how a node finds out that it was removed while it was away: members turn it away without a word, so it asks.
Authorities come first. Any member can prove a removal; nobody is believed without the proof.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence

import trio

from vpnd.adapter.dial import DialError
from vpnd.adapter.host import Host
from vpnd.control.common import Common
from vpnd.control.state import EARLY, EXPIRED, LOST, MEMBER, MILLISECONDS, REMOVED, OwnNetwork
from vpnd.membership import enrolment
from vpnd.membership.authority import renewal_ms
from vpnd.membership.enrolment import MAX_ANSWER, Leave, Refusal, Renew
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Grant, Statement
from vpnd.membership.store import StoreError
from vpnd.nat.paths import RelayAt
from vpnd.printable import printable

#: Of the share of its lifetime at which a membership is renewed, so much is drawn by lot, or all that joined together
#: would ask together.
JITTER = 0.2
#: Of the time from when a membership is to be renewed to its end: who has tried for so long in vain tells its user.
OVERDUE_SHARE = 0.2

MS_PER_HOUR = 3600 * MILLISECONDS

log = logging.getLogger(__name__)


class Renewing:
    """Owner: control's loop; `run` once. `publish` and `learn` take statements in: signed here, and somebody else's.
    `relays`: where an authority that cannot be dialed may be called."""

    def __init__(
        self,
        own: OwnNetwork,
        common: Common,
        *,
        publish: Callable[[Iterable[Statement]], object],
        learn: Callable[[Sequence[bytes]], None],
        relays: Callable[[], Sequence[RelayAt]],
    ) -> None:
        self._own, self._publish, self._learn, self._relays = own, publish, learn, relays
        self._live, self._count, self._now_ms = common.live, common.count, common.now_ms
        self._dice = common.dice
        self._asked, self._anew = trio.Event(), trio.Event()
        self._drawn: tuple[int, int] = (-1, 0)  # (issue of a membership, when it is to be renewed)
        self._error = ""
        self._common, self._backoff = common, common.backoff()
        self._live.watch(lambda config: config.retry, self._other_waits)

    def _other_waits(self) -> None:
        """The first of the new ones comes next."""
        self._backoff = self._common.backoff()

    def ask(self) -> None:
        """Something is wrong with the membership, or may be: ask an authority now."""
        self._asked.set()

    def begin_anew(self) -> None:
        """The clock was set: what came of it before is no measure for now."""
        self._backoff.reset()
        self._drawn = (-1, 0)
        self._anew.set()
        self._asked.set()

    async def run(self, host: Host) -> None:
        asked = False
        while True:
            wait_s = self._wait_s()
            if not asked and wait_s > 0:
                # Not for long at a stretch: it is the wall clock that counts, and that may be set.
                with trio.move_on_after(min(wait_s, self._live.config.membership.gossip_interval)):
                    await self._asked.wait()
                    asked = True
                self._asked = trio.Event()
                continue
            lost = self._own.state(self._now_ms()) == LOST  # and with it who is an authority
            if await self._renew(host, suspicious=asked or lost):
                self._backoff.reset()
            pause_s = self._backoff.fail(trio.current_time()) - trio.current_time()
            with trio.move_on_after(max(pause_s, self._live.config.retry.initial_interval)):
                await self._anew.wait()
            self._anew = trio.Event()
            asked = False

    @property
    def problem(self) -> str:
        """For how long the membership could not be renewed, and why; empty while there is nothing to worry about."""
        body, now_ms = self._own.membership(), self._now_ms()
        issued_ms, due_ms = self._drawn
        if not self._error or body is None or body.issued_ms != issued_ms:
            return ""
        if self._own.state(now_ms) not in (MEMBER, EXPIRED):
            return ""
        if now_ms < due_ms + OVERDUE_SHARE * (body.expires_ms - due_ms):
            return ""
        left_h, tried_h = (time_ms / MS_PER_HOUR for time_ms in (body.expires_ms - now_ms, now_ms - due_ms))
        ends = f"ends in {left_h:.1f} h" if left_h > 0 else "has ended"
        return (
            f"the membership {ends} and could not be renewed for {tried_h:.1f} h: {self._error}; does an authority "
            "run (vpnd members) that this node can reach?"
        )

    def _wait_s(self) -> float:
        """Until the membership is to be renewed; for ever once this node was removed."""
        now_ms = self._now_ms()
        state = self._own.state(now_ms)
        if state == REMOVED:
            return math.inf
        body = self._own.membership()
        if body is None or state == EARLY:
            return 0.0
        member = self._own.directory.find(self._own.peer_id, now_ms)
        if member is not None and member.lost:
            return 0.0  # an older claim has its address: an authority gives another one
        if self._drawn[0] != body.issued_ms:
            share = self._live.config.membership.renew_share * self._dice.uniform(1.0 - JITTER, 1.0)
            self._drawn = body.issued_ms, renewal_ms(body.issued_ms, body.expires_ms, share)
        return (self._drawn[1] - now_ms) / MILLISECONDS

    async def _renew(self, host: Host, *, suspicious: bool) -> bool:
        """Whether it was settled: renewed, or known to be over."""
        own = self._own
        authority = own.authority
        if authority is not None:
            try:
                self._publish([authority.renew(own.peer_id, self._now_ms())])
            except (MembershipRefused, StoreError) as error:
                self._say(str(error))
                return False
            self._count("renewals")
            return True
        asked = self._whom_to_ask(suspicious)
        for peer_id, addresses in asked:
            if await self._ask(host, peer_id, addresses):
                return True
        if not asked:
            self._say("no authority is known")
        return False

    async def leave(self, host: Host) -> bool:
        """Tell an authority that this node goes; whether one has heard of it within p2p.dial_timeout."""
        request = enrolment.encode(Leave(network=self._own.network.id))
        with trio.move_on_after(self._live.config.p2p.dial_timeout):
            for peer_id, addresses in self._whom_to_ask(suspicious=False):
                try:
                    data = await host.ask(addresses, peer_id, request, MAX_ANSWER, relays=self._relays())
                    answer = enrolment.parse_answer_untrusted(data)
                except (DialError, MembershipRefused) as error:
                    log.info("%s could not be told that this node leaves: %s", peer_id, error)
                    continue
                if isinstance(answer, Refusal) and answer.reason == "removed":
                    return True
        return False

    def _whom_to_ask(self, suspicious: bool) -> list[tuple[str, tuple[str, ...]]]:
        """Authorities first, the most senior on top: what it gives nobody junior can take away (`membership.roster`).
        When it may be over, in any order, and some others that may know.

        Authorities whose own membership has ended too are asked where they were last.
        """
        own, directory = self._own, self._own.directory
        found: dict[str, tuple[str, ...]] = {}
        early = (one.body for one in directory.early() if isinstance(one.body, Grant))
        valid = (standing.peer_id for standing in directory.authorities() if not standing.revoked)
        for peer_id in (*valid, *(grant.peer_id for grant in early)):
            if addresses := directory.last_seen(peer_id):
                found[peer_id] = addresses
        found.pop(own.peer_id, None)
        asked = list(found.items())
        if suspicious:
            self._dice.shuffle(asked)
            members = directory.members(self._now_ms())
            others = [(one.peer_id, one.multiaddrs) for one in members if one.multiaddrs]
            others = [one for one in others if one[0] not in found and one[0] != own.peer_id]
            asked += self._dice.sample(others, min(self._live.config.membership.neighbours, len(others)))
        return asked

    async def _ask(self, host: Host, peer_id: str, addresses: tuple[str, ...]) -> bool:
        own = self._own
        before = own.directory.membership(own.peer_id)
        request = enrolment.encode(Renew(network=own.network.id))
        try:
            with trio.fail_after(self._live.config.membership.join_timeout):
                data = await host.ask(addresses, peer_id, request, MAX_ANSWER, relays=self._relays())
            answer = enrolment.parse_answer_untrusted(data)
        except (DialError, MembershipRefused) as error:
            self._say(str(error))
            return False
        except trio.TooSlowError:
            self._say(f"{peer_id} did not answer in time")
            return False
        self._learn(answer.statements)
        if isinstance(answer, Refusal):
            self._say(f"{peer_id} refused: {printable(answer.text)}")
            return not own.is_member(self._now_ms())
        self._error = ""
        if own.directory.membership(own.peer_id) != before:
            self._count("renewals")
            return True
        return own.is_member(self._now_ms())

    def _say(self, error: str) -> None:
        if error != self._error:
            self._error = error
            log.info("the membership is not renewed yet: %s", error)
