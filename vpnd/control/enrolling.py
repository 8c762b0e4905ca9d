"""What this node answers to those who want to join or to renew (`vpnd.adapter.guests` lets them ask).

    asks                      an authority                            every other member
    ------------------------  --------------------------------------  --------------------------------------
    Join with a secret        a membership, if an invitation has it   not_authority
    Renew, a member           the membership, newer                   not_authority
    Renew, a removed node     removed, with the proof                 removed, with the proof
    Renew, anybody else       not_member                              not_authority
    Leave, a member           removed, with the proof                 not_authority

Strangers to whom a node has nothing of this to say may not ask it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable

from vpnd.control.common import Common
from vpnd.control.state import OwnNetwork
from vpnd.membership import enrolment
from vpnd.membership.authority import Authority
from vpnd.membership.enrolment import MAX_STATEMENTS_BYTES, Join, Leave, Refusal, Welcome
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Membership, Statement
from vpnd.membership.store import StoreError

log = logging.getLogger(__name__)


class EnrolmentDesk:
    """Owner: control's loop. `publish` makes a statement known, here and to others.

    A new member is told where membership.neighbours others are.
    """

    def __init__(
        self,
        own: OwnNetwork,
        common: Common,
        *,
        publish: Callable[[Iterable[Statement]], object],
    ) -> None:
        self._own, self._publish = own, publish
        self._live, self._count, self._seldom = common.live, common.count, common.seldom
        self._now_ms, self._dice = common.now_ms, common.dice

    def admits(self, peer_id: str) -> bool:
        """Whether a node that is no member may ask something here."""
        directory = self._own.directory
        if directory.removal(peer_id) is not None:
            return True
        if self._own.authority is None:
            return False
        return directory.newest(peer_id) is not None or bool(self._own.invitations.all())

    def answer_untrusted(self, peer_id: str, data: bytes) -> bytes:
        """The answer to a request; `peer_id` is proven. Raises nothing."""
        try:
            request = enrolment.parse_request_untrusted(data)
            if isinstance(request, Leave):
                return enrolment.encode(self._leave(peer_id, request))
            answer = self._join(peer_id, request) if isinstance(request, Join) else self._renew(peer_id)
            return enrolment.encode(answer)
        except MembershipRefused as refusal:
            self._count(f"refused_{refusal.reason}")
            self._seldom.warn("enrolment", f"{peer_id} was refused: {refusal}")
            proof = self._own.directory.removal_proof(peer_id) if refusal.reason == "removed" else ()
            return enrolment.encode(enrolment.refusal(refusal, proof))
        except StoreError as error:
            # a token that could be used again after a restart is worse than one that cannot be used now
            log.error("nobody can join: %s", error)
            failure = MembershipRefused("not_authority", "this authority cannot keep its state; see its log")
            return enrolment.encode(enrolment.refusal(failure))

    def _join(self, peer_id: str, request: Join) -> Welcome:
        own, now_ms = self._own, self._now_ms()
        authority = self._authority(peer_id)
        before = own.invitations.all()
        statement = own.invitations.redeem(
            authority, own.directory, request.secret, peer_id, request.name, now_ms
        )
        if own.invitations.all() != before:
            own.save_invitations(before)
        if not own.directory.knows(statement.digest):
            self._publish([statement])
            self._count("enrolled")
            body = statement.body
            if isinstance(body, Membership):
                log.info("%s is a member now, at %s", body.name, ", ".join(body.addresses))
        guides = self._live.config.membership.neighbours
        members = [
            member.peer_id
            for member in own.directory.members(now_ms)
            if member.multiaddrs and member.peer_id not in (peer_id, own.peer_id)
        ]
        return self._welcome(statement, self._dice.sample(members, min(guides, len(members))))

    def _welcome(self, statement: Statement, guides: Iterable[str] = ()) -> Welcome:
        """With a membership: the grants it rests on, where this node and some others are to be found, and of the rest
        of the charter what there is room for; gossip brings what there is not."""
        directory = self._own.directory
        wires = [*(one.wire for one in directory.vouching(statement.signer)), statement.wire]
        for peer_id in (self._own.peer_id, *guides):
            held = directory.membership(peer_id)
            if held is not None:
                wires += [one.wire for one in (*directory.vouching(held.signer), held)]
            if (presence := directory.presence(peer_id)) is not None:
                wires.append(presence.wire)
        wires = list(dict.fromkeys([*wires, *(one.wire for one in reversed(directory.charter()))]))
        room = MAX_STATEMENTS_BYTES
        sizes = itertools.takewhile(lambda total: total <= room, itertools.accumulate(map(len, wires)))
        wires = wires[: sum(1 for _ in sizes)]
        return Welcome(network=self._own.network.encode(), statements=tuple(wires))

    def _renew(self, peer_id: str) -> Welcome:
        own, now_ms = self._own, self._now_ms()
        authority = self._authority(peer_id)
        held = own.directory.membership(peer_id)
        if held is None or not self._is_fresh(held, now_ms):
            held = authority.renew(peer_id, now_ms)
            self._publish([held])
            self._count("renewals")
        return self._welcome(held)

    def _leave(self, peer_id: str, request: Leave) -> Refusal:
        """End a membership, and what its member may sign, at its own word."""
        own, now_ms = self._own, self._now_ms()
        authority = self._authority(peer_id)
        body = own.directory.newest(peer_id)
        if request.network != own.network.id or body is None:
            raise MembershipRefused("not_member", "this node is no member of the network")
        held = [one for one in own.directory.authorities() if one.peer_id == peer_id and not one.revoked]
        revocations = []
        for standing in held:
            with contextlib.suppress(
                MembershipRefused
            ):  # a senior's stands; its key is destroyed all the same
                revocations.append(authority.revoke(standing.key, now_ms))
        self._publish([*revocations, authority.remove(peer_id, now_ms, at_its_word=True)])
        log.info("%s has left the network", body.name)
        left = MembershipRefused("removed", "this node has left the network")
        return enrolment.refusal(left, own.directory.removal_proof(peer_id))

    def _is_fresh(self, held: Statement, now_ms: int) -> bool:
        """Whether signing it again would only be work: it is far from due, and nothing of it was lost to another."""
        body = held.body
        if not isinstance(body, Membership):
            return False
        member = self._own.directory.find(body.peer_id, now_ms)
        share = self._live.config.membership.renew_share
        age_ms, lifetime_ms = now_ms - body.issued_ms, body.expires_ms - body.issued_ms
        return member is not None and not member.lost and age_ms < lifetime_ms * (1.0 - share) / 2

    def _authority(self, peer_id: str) -> Authority:
        authority = self._own.authority
        if authority is not None:
            return authority
        directory = self._own.directory
        if directory.newest(peer_id) is None and directory.removal(peer_id) is not None:
            raise MembershipRefused("removed", "this node was removed from the network")
        raise MembershipRefused("not_authority", "this node is no authority of the network")
