"""Introductions: a member that another member does not know yet proves its membership to it.

Two members may never have heard of each other: one was enrolled while the other was off, and no third member that knows
both is up. The one that knows the other dials it, is refused right after the handshake, sends its statements
(`vpnd.membership.introduction`), and dials again. It is enough that one of the two knows the other. Where neither does,
discovery.bootstrap says whom to dial: whoever is admitted gets the other member's statements with the answer.

Otherwise the answer is the reason of the refusal: another network, removed here, signed by no authority that this node
knows. A member is asked only after it refused a dial, and after each refusal it is asked less often ([retry]).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from vpnd.adapter.dial import DialError
from vpnd.adapter.guests import BOTH, INTRODUCE
from vpnd.adapter.host import Host
from vpnd.config.multiaddrs import parse
from vpnd.control.common import Common, Waits
from vpnd.control.state import LOST, MEMBER, OwnNetwork
from vpnd.membership import enrolment, introduction
from vpnd.membership.enrolment import MAX_ANSWER, Refusal
from vpnd.membership.gossip import Outcome
from vpnd.membership.refusal import MembershipRefused
from vpnd.printable import printable

ADMITTED = introduction.Admitted()

log = logging.getLogger(__name__)


class _Asking:
    """One member being asked; `over` tells those who wait for the same, and `admitted` what came of it."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.admitted = False


class Introducing:
    """Owner: control's loop. `act` is given what comes of statements."""

    def __init__(self, own: OwnNetwork, common: Common, *, act: Callable[[Outcome], None]) -> None:
        self._own, self._act = own, act
        self._live, self._count, self._seldom = common.live, common.count, common.seldom
        self._now_ms = common.now_ms
        #: What the operator says is a member of the network, whether this node has heard of it or not.
        self._bootstrap = {parse(address).peer_id for address in self._live.config.discovery.bootstrap}
        self._asking: dict[str, _Asking] = {}
        self._waits = Waits(common)  # of those that said no

    def begin_anew(self) -> None:
        """The network changed: whoever could not be asked may be at once."""
        self._waits.clear()

    # --- who comes

    def admits(self, peer_id: str) -> bool:
        """Whether a stranger may introduce itself: who is no member itself lets nobody in. But who has lost all it knew
        takes in who else is one, to ask the authorities among them."""
        return self._own.state(self._now_ms()) in (MEMBER, LOST)

    def answer_both_untrusted(self, peer_id: str, data: bytes) -> bytes:
        """The answer to an introduction, with what shows that this node is a member; see `answer_untrusted`."""
        own = introduction.of_member(self._own.directory, self._own.peer_id)
        admitted = introduction.Acquainted(own.statements) if own is not None else introduction.Admitted()
        return self.answer_untrusted(peer_id, data, admitted)

    def answer_untrusted(
        self,
        peer_id: str,
        data: bytes,
        admitted: introduction.Admitted | introduction.Acquainted = ADMITTED,
    ) -> bytes:
        """The answer to an introduction; `peer_id` is proven. Raises nothing."""
        try:
            self._receive_untrusted(peer_id, data)
        except MembershipRefused as refusal:
            self._count(f"refused_{refusal.reason}")
            self._seldom.warn("introduction", f"{peer_id} is not let in: {refusal}")
            proof = self._own.directory.removal_proof(peer_id) if refusal.reason == "removed" else ()
            return introduction.encode(enrolment.refusal(refusal, proof))
        return introduction.encode(admitted)

    def _receive_untrusted(self, peer_id: str, data: bytes) -> None:
        """Returns when `peer_id` is a member, if it was not then is now. Raises MembershipRefused."""
        own, now_ms = self._own, self._now_ms()
        request = introduction.parse_request_untrusted(data)
        if request.network != own.network.id:
            raise MembershipRefused("wrong_network", "it is a member of another network")
        if own.directory.find(peer_id, now_ms) is not None:
            return
        outcome = own.gossip.learn(request.statements, now_ms)
        reasons, outcome.refused = outcome.refused, []  # the first of them is counted, as what it came to
        self._act(outcome)
        member = own.directory.find(peer_id, now_ms)
        if member is not None:
            self._count("introduced")
            log.info("%s was not known here, and has shown that it is a member", member.name or peer_id)
        elif own.directory.newest(peer_id) is None and own.directory.removal(peer_id) is not None:
            raise MembershipRefused("removed", "this node was removed from the network")
        else:
            raise MembershipRefused(reasons[0] if reasons else "not_member")

    # --- whom this node comes to

    async def introduce(self, host: Host, addresses: Sequence[str], peer_id: str) -> bool:
        """Whether a member that turned this node away admits it now. Asks it when it is time; who wants to know while
        it is being asked waits for that answer."""
        own, now_ms = self._own, self._now_ms()
        request = introduction.of_member(own.directory, own.peer_id) if own.is_member(now_ms) else None
        known = own.directory.find(peer_id, now_ms) is not None or (
            peer_id in self._bootstrap and own.directory.removal(peer_id) is None
        )
        if request is None or not known:
            return False
        asking = self._asking.get(peer_id)
        if asking is not None:
            await asking.over.wait()
            return asking.admitted
        if trio.current_time() < self._waits.until_s(peer_id):
            return False
        asking = self._asking[peer_id] = _Asking()
        try:
            asking.admitted = await self._ask(host, addresses, peer_id, introduction.encode(request))
        finally:
            del self._asking[peer_id]
            asking.over.set()
        return asking.admitted

    async def _ask(self, host: Host, addresses: Sequence[str], peer_id: str, request: bytes) -> bool:
        self._count("introductions")
        try:
            known = self._own.directory.find(peer_id, self._now_ms()) is not None
            data = await host.ask(addresses, peer_id, request, MAX_ANSWER, INTRODUCE if known else BOTH)
            answer = introduction.parse_answer_untrusted(data)
        except (DialError, MembershipRefused) as error:
            log.debug("%s was not asked to let this node in: %s", peer_id, error)
            self._waits.fail(peer_id)
            return False
        if isinstance(answer, Refusal):
            log.info("%s does not let this node in: %s", peer_id, printable(answer.text))
            self._waits.fail(peer_id)
            self._act(self._own.gossip.learn(answer.statements, self._now_ms()))
            return False
        self._waits.reset(peer_id)
        if isinstance(answer, introduction.Acquainted):
            self._act(self._own.gossip.learn(answer.statements, self._now_ms()))
        return True
