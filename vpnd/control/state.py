"""What a node is in its network: the directory, the keys it may sign with, and what it says of itself.

Nothing here waits, sends or logs. Times are milliseconds since 1970 and an argument.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable, Sequence

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vpnd.api.reports import NetworkReport, OwnAddresses
from vpnd.config.schema import Config
from vpnd.membership.authority import Authority
from vpnd.membership.directory import Directory
from vpnd.membership.gossip import Gossip
from vpnd.membership.invitations import Invitation, Invitations
from vpnd.membership.network import Network
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.roster import permitted
from vpnd.membership.statements import (
    AT_ITS_WORD,
    MAX_MULTIADDRS,
    MAX_RELAYS,
    MAX_ROUTES,
    Kind,
    Membership,
    Presence,
    Removal,
    Statement,
    check_multiaddr,
    sign,
    to_label,
)
from vpnd.membership.store import Store, StoreError

MILLISECONDS = 1000

MEMBER, REMOVED, EXPIRED, EARLY, LOST = "member", "removed", "expired", "early", "lost"
#: Of others only: who has left knows no network any more.
LEFT = "left"
#: Of so many of its own presences a node knows that they are its own.
PRESENTED = 64
#: When this was written. A clock that is before it is wrong, whatever it says.
WRITTEN_MS = 1_795_000_000_000


class OwnNetwork:
    """One node's part in one network. Owner: control's loop.

    `identity` signs presences; it is an authority's key too once an authority has made this node one. `root`: the key
    the network was made with, on the node that made it.
    """

    def __init__(
        self,
        config: Config,
        network: Network,
        store: Store,
        *,
        peer_id: str,
        node_name: str,
        identity: Ed25519PrivateKey,
        root: Ed25519PrivateKey | None,
        dice: random.Random,
    ) -> None:
        settings = config.membership
        self.network = network
        self.store = store
        self.peer_id = peer_id
        self._node_name = node_name
        self._identity = identity
        self._presented: collections.deque[int] = collections.deque(maxlen=PRESENTED)
        self._advertise = config.network.advertise
        #: what of it nobody is told of
        self.withheld: tuple[str, ...] = ()
        #: whether nothing of this node was among what was saved
        self.lost = False
        self.directory = Directory(
            network,
            skew_ms=milliseconds(settings.clock_skew),
            forget_ms=milliseconds(settings.forget_after),
            max_members=settings.max_members,
        )
        self.gossip = Gossip(
            self.directory,
            interval_ms=milliseconds(settings.gossip_interval),
            push_bytes=settings.gossip_push,
            request_ms=milliseconds(settings.gossip_request_timeout),
            presence_ms=milliseconds(settings.presence_interval),
            choose=dice.choice,
        )
        self.invitations = Invitations(store.load_invitations())
        lifetime_ms = milliseconds(settings.record_lifetime)
        keys = [key for key in (root, identity) if key is not None]
        self._authorities = [Authority(key, self.directory, lifetime_ms=lifetime_ms) for key in keys]

    @property
    def authority(self) -> Authority | None:
        """What this node signs with as an authority; None when it is none."""
        return next((one for one in self._authorities if one.valid), None)

    def save_invitations(self, before: Sequence[Invitation]) -> None:
        """Keep the invitations there are. Raises StoreError, and there are those from `before` then."""
        try:
            self.store.save_invitations(self.invitations.all())
        except StoreError:
            self.invitations.restore(before)
            raise

    def state(self, now_ms: int) -> str:
        """member; removed: put out, until it is let in again; early: signed in the future, by this machine's clock;
        expired: not renewed in time; lost with what was saved."""
        if self.directory.find(self.peer_id, now_ms) is not None:
            return MEMBER
        if self.directory.newest(self.peer_id) is None and self.directory.removal(self.peer_id) is not None:
            return REMOVED
        if self.directory.newest(self.peer_id) is None:
            return EARLY if self._early_memberships() else LOST if self.lost else EXPIRED
        return EXPIRED

    def _early_memberships(self) -> list[Membership]:
        bodies = (one.body for one in self.directory.early())
        return [one for one in bodies if isinstance(one, Membership) and one.peer_id == self.peer_id]

    def signed_ahead(self, now_ms: int) -> list[Statement]:
        """What this node signed while its clock was ahead. Nobody else takes it as it is.

        Nothing while it is this machine's clock that is behind: other authorities have signed in its future. (Of a
        clock that is a little behind, what is signed again does no harm: whoever has what it is to replace keeps it.)
        """
        keys = {
            self._identity.public_key().public_bytes_raw(),
            *(one.public_key for one in self._authorities),
        }
        if self.clock_is_behind(now_ms):
            return []
        return [one for one in self.directory.early() if one.signer in keys]

    def clock_is_behind(self, now_ms: int) -> bool:
        """Whether what this node signs now would be dated back, as far as that can be known."""
        keys = {authority.public_key for authority in self._authorities}
        early = (one for one in self.directory.early() if one.kind is not Kind.PRESENCE)
        return now_ms < WRITTEN_MS or any(one.signer not in keys for one in early)

    def signed_again(self, ahead: Sequence[Statement], now_ms: int) -> list[Statement]:
        """Of `signed_ahead`, what is to be known all the same, signed anew."""
        lasting = [one for one in ahead if one.kind is not Kind.PRESENCE]
        return [
            statement
            for authority in self._authorities
            for statement in authority.again(
                [one for one in lasting if one.signer == authority.public_key], now_ms
            )
        ]

    def clock(self, now_ms: int) -> str:
        """What is wrong with this machine's clock, as far as others' statements show it; empty when nothing."""
        early = [one.issued_ms for one in self.directory.early()]
        if not early:
            return ""
        ahead_s = (max(early) - now_ms) / MILLISECONDS
        return f"statements of the network are from up to {ahead_s:.0f} s ahead of this machine's clock: is it right?"

    def is_member(self, now_ms: int) -> bool:
        """Whether others take this node for one of them."""
        return self.directory.find(self.peer_id, now_ms) is not None

    def membership(self) -> Membership | None:
        """The last membership of this node, be it void, over or early."""
        held = self.directory.newest(self.peer_id) or self.directory.void_membership(self.peer_id)
        return held or max(self._early_memberships(), key=lambda body: body.issued_ms, default=None)

    def addresses(self, now_ms: int) -> OwnAddresses:
        """What this node is, or was last when it is no member any more."""
        body = self.membership()
        member = self.directory.find(self.peer_id, now_ms)
        addresses = member.addresses if member is not None else body.addresses if body is not None else ()
        name = member.name if member is not None else body.name if body is not None else ""
        return OwnAddresses(
            network=self.network.name,
            label=name or to_label(self._node_name),
            addresses=tuple(sorted(addresses, key=lambda text: ":" in text)),
            subnets=(self.network.subnet, str(self.network.members_ipv6)),
            advertised=permitted(self._advertise, body.routes) if body is not None else (),
        )

    def presence(
        self, multiaddrs: Iterable[str], now_ms: int, relays: Sequence[str] = ()
    ) -> Statement | None:
        """The statement that this node can be dialed at `multiaddrs`, or called by `relays`; None when that is what it
        said last."""
        addresses = tuple(text for text in dict.fromkeys(multiaddrs) if _can_be_said(text))[:MAX_MULTIADDRS]
        routes = tuple(text for text in self._advertise if text not in self.withheld)[:MAX_ROUTES]
        relays = tuple(relays)[:MAX_RELAYS]
        held = self.directory.presence(self.peer_id)
        last = held.body if held is not None else None
        sequence_ms = now_ms
        if isinstance(last, Presence):
            if (last.addresses, last.routes, last.relays) == (addresses, routes, relays):
                return None
            sequence_ms = max(now_ms, last.sequence_ms + 1)
        return self._present(
            Presence(
                self.network.id,
                peer_id=self.peer_id,
                addresses=addresses,
                sequence_ms=sequence_ms,
                routes=routes,
                relays=relays,
            )
        )

    def presence_again(self, now_ms: int) -> Statement | None:
        """What this node said last of where it is, signed anew; None when it has said nothing."""
        held = self.directory.presence(self.peer_id)
        if held is None or not isinstance(held.body, Presence):
            return None
        sequence_ms = max(now_ms, held.body.sequence_ms)
        return self._present(msgspec.structs.replace(held.body, sequence_ms=sequence_ms))

    def _present(self, body: Presence) -> Statement:
        self._presented.append(body.sequence_ms)
        return sign(self._identity, body)

    def has_signed(self, said: Presence) -> bool:
        """Whether a presence of this node is of this run, and not of another that has its identity."""
        return said.sequence_ms in self._presented

    def whom(self, text: str) -> str:
        """The peer id behind a member's name, peer id or virtual address, or the name of who is no member any more.

        Raises MembershipRefused: not_member.
        """
        label = text.lower().rstrip(".").removesuffix(f".{self.network.name}.vpn")
        if peer_id := self.directory.owner(label) or self.directory.owner(text):
            return peer_id
        if self.directory.newest(text) or self.directory.removal(text):
            return text
        if peer_id := self.directory.last_named(label):
            return peer_id
        raise MembershipRefused("not_member", f"{text} is no member's name, address or peer id")

    def report(self, now_ms: int, neighbours: int) -> NetworkReport:
        body = self.membership()
        conflicts = (
            f"{one.what} belongs to {self.known_as(one.owner, now_ms)}, and is claimed by "
            f"{', '.join(self.known_as(loser, now_ms) for loser in one.losers)}"
            for one in self.directory.conflicts()
        )
        return NetworkReport(
            name=self.network.name,
            network_id=self.network.id.hex(),
            state=self.state(now_ms),
            authority=self.authority is not None,
            authorities=sum(not standing.revoked for standing in self.directory.authorities()),
            members=len(self.directory.members(now_ms)),
            addresses=self.addresses(now_ms).addresses,
            expires_s=max(0.0, (body.expires_ms - now_ms) / MILLISECONDS) if body is not None else 0.0,
            conflicts=tuple(conflicts),
            warnings=tuple(filter(None, [self.clock(now_ms)])),
            neighbours=neighbours,
        )

    def known_as(self, peer_id: str, now_ms: int) -> str:
        """The name of a member, the peer id of anybody else."""
        member = self.directory.find(peer_id, now_ms)
        return member.name if member is not None and member.name else peer_id


def end_of(removal: Removal | None) -> str:
    """How a membership ended that is over: LEFT, REMOVED, or EXPIRED without a removal."""
    if removal is None:
        return EXPIRED
    return LEFT if removal.serial == AT_ITS_WORD else REMOVED


def milliseconds(seconds: float) -> int:
    """Of a setting, as membership counts time."""
    return round(seconds * MILLISECONDS)


def _can_be_said(multiaddr: str) -> bool:
    try:
        check_multiaddr(multiaddr)
    except ValueError:
        return False
    return True
