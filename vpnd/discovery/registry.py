"""The registry of peers: virtual address <-> peer id <-> addresses.

Control asks the registry and nothing else, so what the configuration names and what a network says are one to it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from vpnd.config.schema import Peer
from vpnd.session import VPND

#: Where a member is from that is configured by hand.
CONFIGURATION = "configuration"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A node that may have sessions with this one.

    `prefixes`: the networks it may send packets from, the most specific meaning its own address.
    `addresses`: multiaddrs to dial, without the /p2p part; empty when it can only dial us. `source`: who says so,
    configuration or membership. `protocol`: see vpnd.session. `relays`: peer ids of members that can call it.
    """

    peer_id: str
    name: str
    prefixes: tuple[str, ...]
    addresses: tuple[str, ...]
    source: str = CONFIGURATION
    protocol: str = VPND
    relays: tuple[str, ...] = ()

    @property
    def virtual_ips(self) -> tuple[str, ...]:
        """Its own addresses among the prefixes."""
        networks = map(ipaddress.ip_network, self.prefixes)
        return tuple(
            str(network.network_address) for network in networks if network.prefixlen == network.max_prefixlen
        )

    @property
    def routes(self) -> tuple[str, ...]:
        """The networks behind it among the prefixes."""
        networks = map(ipaddress.ip_network, self.prefixes)
        return tuple(str(network) for network in networks if network.prefixlen != network.max_prefixlen)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What is different from one moment to another. `changed`: as they were, as they are."""

    added: tuple[Member, ...] = ()
    removed: tuple[Member, ...] = ()
    changed: tuple[tuple[Member, Member], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


class Owners(Protocol):
    """Who owns which address, where that is not up to the peers. See vpnd.discovery.ownership."""

    def settle(self, member: Member) -> Member:
        """A peer, new or as it is now; returned with the prefixes it may use of those it claims, and others."""
        ...

    def forget(self, peer_id: str) -> None: ...


class PeerRegistry:
    """Configured peers and the members of the node's network. Owner: control.

    What is configured by hand counts: a peer id that is both is as it was configured, and of a prefix that a configured
    peer has no member has anything. `owners` have the last word on addresses; None: everybody has what it claims.
    """

    def __init__(self, peers: Iterable[Peer] = (), owners: Owners | None = None) -> None:
        self._owners = owners
        self._subscribers: list[Callable[[Change], object]] = []
        self._configured = _by_id(peers)
        self._network: dict[str, Member] = {}
        self._all = self._settled(self._configured)

    def members(self) -> Sequence[Member]:
        """All members, in a stable order."""
        return tuple(self._all.values())

    def find(self, peer_id: str) -> Member | None:
        """The member with that peer id; None for everybody else. Asked at every handshake."""
        return self._all.get(peer_id)

    def subscribe(self, changed: Callable[[Change], object]) -> None:
        """Call `changed` with every change, when the answers given here are the new ones already."""
        self._subscribers.append(changed)

    def of_network(self) -> Sequence[Member]:
        """The members the network has, as it has them."""
        return tuple(self._network.values())

    def claims(self) -> Mapping[str, Member]:
        """All members by peer id, with the addresses they claim, whether they may use them or not."""
        reserved = self._reserved()
        network = {peer_id: _without(member, reserved) for peer_id, member in self._network.items()}
        return {**self._configured, **{k: v for k, v in network.items() if k not in self._configured}}

    def replace(self, peers: Iterable[Peer]) -> Change:
        """Another list of configured peers from now on; returns what is different."""
        before, self._configured = self._all, _by_id(peers)
        claims = self.claims()
        for peer_id in before.keys() - claims.keys():
            self._forget(peer_id)
        self._all = self._settled(claims)
        return self._told(difference(before, self._all))

    def update(self, news: Mapping[str, Member | None]) -> Change:
        """Members of the network as they are now, None for who is none any more; returns what is different."""
        before: dict[str, Member] = {}
        after: dict[str, Member] = {}
        reserved = self._reserved()
        for peer_id, member in news.items():
            if member is None:
                self._network.pop(peer_id, None)
            else:
                self._network[peer_id] = member
            if peer_id in self._configured:
                continue
            if (held := self._all.pop(peer_id, None)) is not None:
                before[peer_id] = held
            if member is not None:
                after[peer_id] = self._all[peer_id] = self._settle(_without(member, reserved))
            else:
                self._forget(peer_id)
        return self._told(difference(before, after))

    def reconsider(self, peer_ids: Iterable[str]) -> Change:
        """The owners say something else of these than before; returns what is different. Others are ignored."""
        held = {peer_id: member for peer_id in peer_ids if (member := self._all.get(peer_id)) is not None}
        reserved = self._reserved()
        for peer_id in held:
            claim = self._configured.get(peer_id) or _without(self._network[peer_id], reserved)
            self._all[peer_id] = self._settle(claim)
        return self._told(difference(held, {peer_id: self._all[peer_id] for peer_id in held}))

    def _told(self, change: Change) -> Change:
        if change:
            for changed in self._subscribers:
                changed(change)
        return change

    def _settle(self, member: Member) -> Member:
        return self._owners.settle(member) if self._owners is not None else member

    def _settled(self, members: Mapping[str, Member]) -> dict[str, Member]:
        return {peer_id: self._settle(member) for peer_id, member in members.items()}

    def _forget(self, peer_id: str) -> None:
        if self._owners is not None:
            self._owners.forget(peer_id)

    def _reserved(self) -> frozenset[str]:
        return frozenset(prefix for member in self._configured.values() for prefix in member.prefixes)


def _without(member: Member, reserved: frozenset[str]) -> Member:
    if reserved.isdisjoint(member.prefixes):
        return member
    left = tuple(prefix for prefix in member.prefixes if prefix not in reserved)
    return msgspec.structs.replace(member, prefixes=left)


def difference(before: Mapping[str, Member], after: Mapping[str, Member]) -> Change:
    """From one set of members, by peer id, to another."""
    return Change(
        added=tuple(member for peer_id, member in after.items() if peer_id not in before),
        removed=tuple(member for peer_id, member in before.items() if peer_id not in after),
        changed=tuple(
            (before[peer_id], member)
            for peer_id, member in after.items()
            if peer_id in before and before[peer_id] != member
        ),
    )


def _by_id(peers: Iterable[Peer]) -> dict[str, Member]:
    return {peer.peer_id: _member(peer) for peer in peers}


def _member(peer: Peer) -> Member:
    address = ipaddress.ip_address(peer.virtual_ip)
    return Member(
        peer_id=peer.peer_id,
        name=peer.name,
        prefixes=(f"{address}/{address.max_prefixlen}",),
        # operators paste addresses with /p2p/<id> behind them; the id is in its own key already
        addresses=tuple(text.partition("/p2p/")[0] for text in peer.addresses),
        protocol=peer.protocol,
    )
