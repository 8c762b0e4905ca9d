"""What an authority does: it lets nodes in, renews, removes, and names other authorities. Each is a signed statement.

Nothing here changes the directory it reads: the caller merges (publishes) every statement before it asks for the next,
so that the next knows of it. Times are milliseconds since 1970. Clocks of authorities differ, so what supersedes
something is always issued after it, whatever the clock says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vpnd import peerid
from vpnd.membership import network
from vpnd.membership.directory import Directory
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import (
    AT_ITS_WORD,
    MAX_LIFETIME_MS,
    AnyBody,
    Grant,
    Membership,
    Removal,
    Revoke,
    Statement,
    is_label,
    numbered,
    sign,
    signed_ms,
)


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a new member is to have. `name`: a label. `addresses`: empty, or those it gets instead of chosen ones; of a
    family that is not among them one is chosen.

    `firm`: the name must be that one; otherwise a number is put behind one that is taken.
    """

    name: str
    firm: bool = False
    addresses: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


class Theft(msgspec.Struct, frozen=True):
    """What answers the theft of an authority's key.

    `again`: the memberships that were good, to be known before `final`, the revocation and the removal of the node
    whose key it was. `lost`: peer ids of members only the stolen key vouches for.
    """

    again: list[Statement]
    final: list[Statement]
    lost: list[str]


#: Stands for all members in `Authority.revoke_stolen`.
EVERYBODY = frozenset({"*"})


class Authority:
    """The holder of one authority key. `lifetime_ms`: how long memberships are valid. Owner: control.

    Every method that signs raises MembershipRefused with the reason not_authority when the key is not, or no longer,
    an authority of the directory's network.
    """

    def __init__(self, key: Ed25519PrivateKey, directory: Directory, *, lifetime_ms: int) -> None:
        self._key = key
        self._directory = directory
        self._network = directory.network
        self._lifetime_ms = min(lifetime_ms, MAX_LIFETIME_MS)
        self.public_key = key.public_key().public_bytes_raw()

    def __repr__(self) -> str:  # the key never reaches a log
        return f"Authority(public_key={self.public_key.hex()})"

    @property
    def valid(self) -> bool:
        """Whether others accept what it signs, as far as this node knows."""
        standing = self._directory.authority(self.public_key)
        return standing is not None and not standing.revoked

    def found(self, peer_id: str, now_ms: int) -> Statement:
        """The first statement of a network: this node holds the root key. Issued again when the key has moved."""
        return self.grant(self.public_key, peer_id, now_ms)

    def enrol(self, peer_id: str, wish: Wish, now_ms: int) -> Statement:
        """Let a node in, also one that was removed, or give a member another name, addresses and rights.

        Raises MembershipRefused: name_taken, address_taken, address_outside, subnet_full, malformed.
        """
        before = self._directory.newest(peer_id)
        taken = self._directory.taken()
        if before is not None:
            taken -= {before.name, *before.addresses}
        name = _free_name(wish, taken)
        if wish.addresses:
            addresses = self._wished_addresses(wish, peer_id, taken)
        elif before is not None:
            addresses = self._kept_addresses(before, taken)
        else:
            addresses = self._new_addresses(peer_id, taken)
        removal = self._directory.removal(peer_id)
        enrolled_ms = max(now_ms, removal.issued_ms + 1 if removal else 0)
        given = msgspec.structs.replace(wish, name=name, addresses=addresses)
        return self._membership(before, peer_id, given, enrolled_ms, now_ms)

    def renew(self, peer_id: str, now_ms: int) -> Statement:
        """A member's membership for another lifetime; what it lost to a better claim is replaced.

        Expired ones are renewed while they are remembered. Raises MembershipRefused: removed, not_member, subnet_full.
        """
        before = self._directory.newest(peer_id)
        if before is None:
            raise MembershipRefused("removed" if self._directory.removal(peer_id) else "not_member")
        taken = self._directory.taken() - set(before.addresses)
        addresses = self._kept_addresses(before, taken)
        name = before.name
        if self._directory.holder(name) not in (None, peer_id):
            name = _free_name(Wish(name=name), taken)
        given = Wish(name=name, addresses=addresses, routes=before.routes, groups=before.groups)
        return self._membership(before, peer_id, given, before.enrolled_ms, now_ms)

    def remove(self, peer_id: str, now_ms: int, *, at_its_word: bool = False) -> Statement:
        """Put a node out: by this statement, every membership it has had so far is void. Any peer id may be named.
        `at_its_word`: it leaves by itself."""
        self._check_valid()
        before, removal = self._directory.newest(peer_id), self._directory.removal(peer_id)
        known_ms = [before.issued_ms, before.enrolled_ms] if before else []
        issued_ms = max(now_ms, *known_ms, removal.issued_ms + 1 if removal else 0)
        return self._sign(
            Removal(
                network=self._id,
                signer=self.public_key,
                peer_id=peer_id,
                issued_ms=issued_ms,
                serial=AT_ITS_WORD if at_its_word else 0,
            )
        )

    def grant(self, key: bytes, peer_id: str, now_ms: int) -> Statement:
        """Make `key`, held by the node `peer_id`, an authority; one that was revoked cannot be made one again."""
        self._check_valid()
        known = self._directory.authority(key)
        if known is not None and known.revoked:
            raise MembershipRefused("revoked_authority", "a revoked authority needs a new key")
        granted_ms = known.granted_ms if known is not None and known.granted_ms else now_ms
        body = Grant(
            network=self._id,
            signer=self.public_key,
            key=key,
            peer_id=peer_id,
            granted_ms=granted_ms,
            issued_ms=max(now_ms, granted_ms),
        )
        return self._sign(body)

    def revoke(self, key: bytes, now_ms: int) -> Statement:
        """End an authority. What it signed before stays valid, so this is no answer to a theft: see `revoke_stolen`.

        Raises MembershipRefused: unknown_authority, not_permitted (the other is senior, or the root).
        """
        return self._revoke(key, now_ms, now_ms)

    def revoke_stolen(self, key: bytes, now_ms: int, keep: Collection[str] = ()) -> Theft:
        """End an authority from the beginning of time, for a thief can date back.

        What other authorities vouch for is signed again as they have it, and so are the members in `keep`, peer ids,
        which only the stolen key vouches for; `everybody` stands for all of those. Who holds the key is removed.
        Raises what `revoke` does.
        """
        revocation = self._revoke(key, 0, now_ms)
        table = self._directory.charter_with(revocation)
        trusted = {standing.peer_id for standing in table.values() if not standing.revoked}
        again, lost = [], []
        for member in self._directory.members(now_ms):
            if peerid.public_key_untrusted(member.peer_id) == key:
                continue
            good = self._directory.vouched(member.peer_id, table, now_ms)
            if good is None and (keep is EVERYBODY or member.peer_id in keep or member.peer_id in trusted):
                good = self._directory.newest(member.peer_id)
            if good is None:
                lost.append(member.peer_id)
            else:
                again.append(self._again(good, now_ms))
        final = [revocation]
        holder = self._directory.authority(key)
        if holder is not None and holder.peer_id and peerid.public_key_untrusted(holder.peer_id) == key:
            final.append(self.remove(holder.peer_id, now_ms))
        return Theft(again=again, final=final, lost=lost)

    def again(self, signed: Sequence[Statement], now_ms: int) -> list[Statement]:
        """What this authority signed while its clock was ahead, with right times: in the same order, the last now."""
        late_ms = max((one.issued_ms for one in signed), default=now_ms) - now_ms

        def at(then_ms: int) -> int:
            return then_ms if then_ms <= now_ms else min(now_ms, then_ms - late_ms)

        found = []
        for body in (one.body for one in sorted(signed, key=lambda one: (one.kind, one.issued_ms))):
            times = {"issued_ms": at(signed_ms(body))}
            if isinstance(body, Membership):
                times["expires_ms"] = times["issued_ms"] + body.expires_ms - body.issued_ms
            for began in ("enrolled_ms", "granted_ms", "since_ms"):
                if began in body.__struct_fields__:
                    times[began] = min(times["issued_ms"], at(getattr(body, began)))
            found.append(sign(self._key, msgspec.structs.replace(body, **times)))
        return found

    def _revoke(self, key: bytes, since_ms: int, now_ms: int) -> Statement:
        self._check_valid()
        own, other = self._directory.authority(self.public_key), self._directory.authority(key)
        if other is None or own is None:
            raise MembershipRefused("unknown_authority")
        if other.distance == 0:
            raise MembershipRefused("not_permitted", "nobody is senior to the root: make a new network")
        if key != self.public_key and own.seniority >= other.seniority:
            raise MembershipRefused("not_permitted", "only an authority that was named earlier may revoke it")
        return self._sign(
            Revoke(network=self._id, signer=self.public_key, key=key, since_ms=since_ms, issued_ms=now_ms)
        )

    def _again(self, body: Membership, now_ms: int) -> Statement:
        """A membership as it is, by this authority and for another lifetime."""
        issued_ms = max(now_ms, body.issued_ms + 1)
        return self._sign(
            msgspec.structs.replace(
                body,
                signer=self.public_key,
                issued_ms=issued_ms,
                expires_ms=issued_ms + self._lifetime_ms,
                serial=body.serial + 1,
            )
        )

    @property
    def _id(self) -> bytes:
        return self._network.id

    def _check_valid(self) -> None:
        if not self.valid:
            raise MembershipRefused("not_authority", "this node is no authority of the network")

    def _sign(self, body: AnyBody) -> Statement:
        self._check_valid()
        return sign(self._key, body)

    def _membership(
        self,
        before: Membership | None,
        peer_id: str,
        given: Wish,
        enrolled_ms: int,
        now_ms: int,
    ) -> Statement:
        if before is not None:
            enrolled_ms = before.enrolled_ms
        issued_ms = max(now_ms, enrolled_ms, before.issued_ms + 1 if before else 0)
        body = Membership(
            network=self._id,
            signer=self.public_key,
            peer_id=peer_id,
            name=given.name,
            addresses=given.addresses,
            routes=given.routes,
            groups=given.groups,
            enrolled_ms=enrolled_ms,
            issued_ms=issued_ms,
            expires_ms=issued_ms + self._lifetime_ms,
            serial=before.serial + 1 if before else 0,
        )
        return self._sign(body)

    def _wished_addresses(self, wish: Wish, peer_id: str, taken: Collection[str]) -> tuple[str, ...]:
        """Those, and a chosen one of the family that none of them is of."""
        checked = tuple(network.check_wish(self._network, text, taken) for text in wish.addresses)
        if all(":" in text for text in checked):
            return (network.ipv4(self._network, peer_id, taken), *checked)
        if all(":" not in text for text in checked):
            return (*checked, network.ipv6(self._network, peer_id, taken))
        return checked

    def _new_addresses(self, peer_id: str, taken: Collection[str]) -> tuple[str, ...]:
        return (
            network.ipv4(self._network, peer_id, taken),
            network.ipv6(self._network, peer_id, taken),
        )

    def _kept_addresses(self, before: Membership, taken: Collection[str]) -> tuple[str, ...]:
        """What a member has, with others in the place of those that are another's."""
        kept: list[str] = []
        for text in before.addresses:
            if self._directory.holder(text) not in (None, before.peer_id):
                choose = network.ipv6 if ":" in text else network.ipv4
                text = choose(self._network, before.peer_id, {*taken, text, *kept})
            kept.append(text)
        return tuple(kept)


def renewal_ms(issued_ms: int, expires_ms: int, share: float) -> int:
    """When a membership is to be renewed: when `share` of its lifetime is left."""
    return expires_ms - int((expires_ms - issued_ms) * share)


def _free_name(wish: Wish, taken: Collection[str]) -> str:
    if not is_label(wish.name):
        raise MembershipRefused("malformed", f"{wish.name!r} cannot be a name: a-z, 0-9 and - only")
    if wish.name not in taken:
        return wish.name
    if wish.firm:
        raise MembershipRefused("name_taken", f"{wish.name} is the name of another member")
    free = (numbered(wish.name, number) for number in range(2, len(taken) + 3))
    return next(name for name in free if name not in taken)
