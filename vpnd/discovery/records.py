"""Records of the distributed hash table: which key belongs to whom, and which of several records is believed.

    key     dht_key(peer id)
    value   the member's own presence statement (vpnd.membership.statements): where it can be dialed, signed by the key
            in its peer id, with the time of signing as its sequence

Nodes store what other members put there, and must not be made to store anything else: a record counts when its bytes
are a presence statement of a member, its key is that member's, it is neither too old nor of the future, and none newer
is known. Who reads records checks them in the same way, because the node that answers may be lying.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Presence, parse_untrusted

#: libp2p's table drops look-ups of longer keys without a word, so a peer id (52 bytes) cannot be part of one.
MAX_KEY_BYTES = 50
PREFIX = "/vpn/m/"
DIGEST_CHARACTERS = 32


def dht_key(peer_id: str) -> str:
    """The key of a node's record: a namespace and half of a SHA-256 in hex, 39 bytes."""
    return PREFIX + hashlib.sha256(peer_id.encode()).hexdigest()[:DIGEST_CHARACTERS]


class RecordRules:
    """Judges records. Times are milliseconds since 1970 and an argument. Owner: control.

    `known_ms(peer_id)` is the sequence of the newest presence known of a member, -1 when none is, None for nobody.
    """

    def __init__(self, known_ms: Callable[[str], int | None], lifetime_ms: int, skew_ms: int) -> None:
        self._known_ms = known_ms
        self.lifetime_ms, self.skew_ms = lifetime_ms, skew_ms

    def check_untrusted(self, key: str, value: bytes, now_ms: int) -> Presence:
        """What a record says. Raises MembershipRefused, with the reason to count it under, and nothing else."""
        body = parse_untrusted(value).body
        if not isinstance(body, Presence):
            raise MembershipRefused("malformed", "a record of the table is no presence")
        if key != dht_key(body.peer_id):
            raise MembershipRefused("forged", "a record of the table lies under another's key")
        known_ms = self._known_ms(body.peer_id)
        if known_ms is None:
            raise MembershipRefused("not_member", "a record of the table is of no member")
        if body.sequence_ms > now_ms + self.skew_ms:
            raise MembershipRefused("not_yet_valid", "a record of the table is of the future")
        if body.sequence_ms + self.lifetime_ms + self.skew_ms < now_ms:
            raise MembershipRefused("expired", "a record of the table is too old")
        if body.sequence_ms < known_ms:
            raise MembershipRefused("rolled_back", "a newer record of the member is known")
        return body

    def best_untrusted(self, values: Sequence[bytes]) -> int:
        """The place of the newest of values that were checked; the last of equal ones, so that one that is put again
        counts as new.

        Raises MembershipRefused when one is unreadable, or there is none.
        """
        ranks = [parse_untrusted(value).rank for value in values]
        if not ranks:
            raise MembershipRefused("malformed", "there is no record to choose from")
        return max(range(len(ranks)), key=lambda place: (ranks[place], place))
