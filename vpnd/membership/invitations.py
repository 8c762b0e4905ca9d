"""Invitations an authority has given out: what a token's secret is good for, and for how often and how long.

The secret itself is in the token alone; here is its hash. Redeeming twice by the same node gives the same
membership, so a lost answer costs nothing; by another node it takes another use.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import msgspec

from vpnd.membership import network
from vpnd.membership.authority import Authority, Wish
from vpnd.membership.directory import Directory
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import MAX_GROUPS, MAX_ROUTES, Statement, is_label, to_label
from vpnd.membership.token import secret_hash

#: Of networks and groups in one invitation: with all else that is in a membership it has to be a statement.
MAX_WORDS = 512


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """One invitation.

    `name`, `addresses`: empty for what the node wishes, and what is free. `joined`: the peer ids so far.
    """

    secret_hash: bytes
    created_ms: int
    expires_ms: int
    uses_left: int
    name: str = ""
    addresses: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """How an operator names it; says nothing about the secret."""
        return self.secret_hash.hex()[:8]

    def state(self, now_ms: int) -> str:
        """open: somebody can join by it; used, expired: nobody can any more."""
        if not self.uses_left:
            return "used"
        return "expired" if now_ms > self.expires_ms else "open"


class Invitations:
    """All invitations of one authority. To be stored after every change, before anybody hears of it. Owner: control."""

    def __init__(self, known: Iterable[Invitation] = ()) -> None:
        self._by_hash: dict[bytes, Invitation] = {}
        self.restore(known)

    def restore(self, known: Iterable[Invitation]) -> None:
        """These, and no others."""
        self._by_hash = {invitation.secret_hash: invitation for invitation in known}

    def all(self) -> tuple[Invitation, ...]:
        """The oldest first; what the store keeps."""
        return tuple(sorted(self._by_hash.values(), key=lambda one: (one.created_ms, one.secret_hash)))

    def add(
        self,
        secret: bytes,
        directory: Directory,
        now_ms: int,
        *,
        lifetime_ms: int,
        uses: int = 1,
        name: str = "",
        addresses: tuple[str, ...] = (),
        routes: tuple[str, ...] = (),
        groups: tuple[str, ...] = (),
    ) -> Invitation:
        """An invitation for who has `secret` (16 random bytes, to be put into a token).

        Raises MembershipRefused for a name or address that is taken or unfit now; that is judged again when it is used.
        Also for networks and groups no membership can have.
        """
        _check(routes, groups)
        taken = directory.taken()
        promised = {
            what
            for one in self.all()
            if one.uses_left and one.expires_ms >= now_ms
            for what in (one.name, *one.addresses)
            if what
        }
        if name and to_label(name) != name:
            raise MembershipRefused("malformed", f"{name!r} cannot be a name; write {to_label(name)!r}")
        if name in taken | promised:
            raise MembershipRefused("name_taken", f"{name} is taken, by a member or an invitation")
        checked = tuple(network.check_wish(directory.network, text, taken | promised) for text in addresses)
        if uses > 1 and (name or addresses):
            raise MembershipRefused(
                "malformed", "a name or an address is for one member; invite with one use"
            )
        invitation = Invitation(
            secret_hash=secret_hash(secret),
            created_ms=now_ms,
            expires_ms=now_ms + lifetime_ms,
            uses_left=uses,
            name=name,
            addresses=checked,
            routes=routes,
            groups=groups,
        )
        self._by_hash[invitation.secret_hash] = invitation
        return invitation

    def withdraw(self, invitation_id: str) -> bool:
        """Take an invitation back; False when there is none of that id."""
        found = [digest for digest, one in self._by_hash.items() if one.id == invitation_id]
        for digest in found:
            del self._by_hash[digest]
        return bool(found)

    def prune(self, before_ms: int) -> None:
        """Forget those that expired before; until then they are still known as expired or used."""
        self._by_hash = {key: one for key, one in self._by_hash.items() if one.expires_ms >= before_ms}

    def redeem(
        self,
        authority: Authority,
        directory: Directory,
        secret: bytes,
        peer_id: str,
        wished: str,
        now_ms: int,
    ) -> Statement:
        """The membership of a node that shows the secret; `peer_id` is proven, `wished` is the name it goes by.

        Raises MembershipRefused: unknown_token, expired_token, used_token, removed (by a removal younger than the
        invitation), and what `Authority.enrol` raises; nothing is used up then.
        """
        invitation = self._by_hash.get(secret_hash(secret))
        if invitation is None:
            raise MembershipRefused("unknown_token", "no invitation of this authority has that token")
        removal = directory.removal(peer_id)
        if removal is not None and removal.issued_ms >= invitation.created_ms:
            raise MembershipRefused(
                "removed", "the token is from before this node left or was removed; it needs a new one"
            )
        again = peer_id in invitation.joined
        known = directory.membership(peer_id)
        if again and directory.find(peer_id, now_ms) is not None and known is not None:
            return known
        if now_ms > invitation.expires_ms:
            raise MembershipRefused("expired_token", "the token has expired; ask for a new one")
        if not invitation.uses_left and not again:
            raise MembershipRefused("used_token", "the token was used already; ask for a new one")
        wish = Wish(
            name=invitation.name or to_label(wished),
            firm=bool(invitation.name),
            addresses=invitation.addresses,
            routes=invitation.routes,
            groups=invitation.groups,
        )
        statement = authority.enrol(peer_id, wish, now_ms)
        if not again:
            self._by_hash[invitation.secret_hash] = msgspec.structs.replace(
                invitation, uses_left=invitation.uses_left - 1, joined=(*invitation.joined, peer_id)
            )
        return statement


def _check(routes: tuple[str, ...], groups: tuple[str, ...]) -> None:
    for text in routes:
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise MembershipRefused(
                "malformed", f"--route {text}: is no network; write 192.168.7.0/24, say"
            ) from None
        if str(network) != text:
            raise MembershipRefused("malformed", f"--route {text}: write {network}")
    for text in groups:
        if not is_label(text):
            raise MembershipRefused(
                "malformed", f"--group {text}: a-z, 0-9 and - only, 63 characters at most"
            )
    for values, most, what in ((routes, MAX_ROUTES, "--route"), (groups, MAX_GROUPS, "--group")):
        if len(set(values)) != len(values):
            raise MembershipRefused("malformed", f"{what}: the same is given twice")
        if len(values) > most:
            raise MembershipRefused("malformed", f"{what}: at most {most} of them")
    if sum(map(len, (*routes, *groups))) > MAX_WORDS:
        raise MembershipRefused("malformed", f"--route and --group: together at most {MAX_WORDS} characters")
