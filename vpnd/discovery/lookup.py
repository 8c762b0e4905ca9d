"""Looking up a member: from a name, a virtual address or a peer id to the addresses it can be dialed at.

    directory   what this node knows by itself: configured peers and the signed directory of the network
    contract    who owns an IPv4 address, where registry.kind is contract; then it decides, whatever the directory says
    cache       what the table said a while ago (discovery.cache_lifetime, discovery.negative_cache_lifetime)
    dht         the members' Kademlia table (discovery.dht_timeout)

Each step is recorded with its source, the age of what it knows and its outcome, for `vpnd resolve`. Nothing of this is
on the path of packets: shards know the owner of every virtual address; a look-up is for a member that cannot be dialed
where it was, and for users who ask.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from vpnd import peerid
from vpnd.discovery.contract import Owner
from vpnd.errors import VpndError


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """What a source knows of a member. `age_s` None: it cannot say, or it holds until it is changed."""

    peer_id: str
    name: str = ""
    virtual_ips: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    age_s: float | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One source that was asked. `result`: a line for the user."""

    source: str
    result: str
    age_s: float | None = None


class Resolution(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome. `peer_id` is empty when nobody is `what`."""

    what: str
    steps: tuple[Step, ...]
    peer_id: str = ""
    name: str = ""
    virtual_ips: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the table said of a peer id: where it can be dialed, how many seconds ago the member said so itself, and the
    statement in which it did."""

    addresses: tuple[str, ...]
    age_s: float
    statement: bytes = b""


class Directory(Protocol):
    """What is known without asking anybody."""

    def find(self, what: str) -> Known | None:
        """The member of that name, virtual address or peer id."""
        ...


#: The owner of a virtual address by contract. Raises VpndError.
AskOwner = Callable[[ipaddress.IPv4Address], Awaitable[Owner]]
#: The table's answer for a peer id, None for none. Has a deadline of its own. Raises VpndError.
Search = Callable[[str], Awaitable[Found | None]]


class Entry(msgspec.Struct, frozen=True):
    """One answer of the table. `value` None: there was nothing. `found_s`: when it was found."""

    value: Found | None
    found_s: float


class AnswerCache:
    """Answers of the table by what was asked for. Over `most` entries, the one stored longest ago goes. Owner: control.

    Time is an argument, in seconds of one clock.
    """

    def __init__(self, positive_s: float, negative_s: float, most: int) -> None:
        """`positive_s`, `negative_s`: how long an answer, and that there is none, is believed."""
        self._positive_s, self._negative_s, self._most = positive_s, negative_s, most
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def get(self, key: str, now_s: float) -> Entry | None:
        """The answer while it is believed; None: ask."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        lifetime_s = self._negative_s if entry.value is None else self._positive_s
        if now_s < entry.found_s + lifetime_s:
            return entry
        del self._entries[key]
        return None

    def put(self, key: str, value: Found | None, now_s: float) -> None:
        """Remember an answer, or None for nothing, instead of what was there."""
        self._entries.pop(key, None)
        self._entries[key] = Entry(value, now_s)
        while len(self._entries) > self._most:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything: the world is another one."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


class Lookup:
    """The chain of sources. Owner: control.

    `search` or `owner` None: there is no such source. `cache` holds what `search` found, and is there with it.
    """

    def __init__(
        self,
        directory: Directory,
        now_s: Callable[[], float],
        *,
        cache: AnswerCache | None = None,
        search: Search | None = None,
        owner: AskOwner | None = None,
    ) -> None:
        self._directory, self._now_s = directory, now_s
        self._cache, self._search, self._owner = cache, search, owner

    async def resolve(self, what: str) -> Resolution:
        """Every step from `what` to addresses. Never raises for what sources fail with: that is in the steps."""
        steps: list[Step] = []
        known = self._directory.find(what)
        steps.append(Step(source="directory", result=_said(known), age_s=known.age_s if known else None))
        address = _ipv4(what)
        if self._owner is not None and address is not None:
            known = await self._owned(self._owner, address, steps)
        elif known is None and is_peer_id(what):
            known = Known(peer_id=what)
        if known is None:
            return Resolution(what=what, steps=tuple(steps))
        found = await self.whereabouts(known.peer_id, steps)
        addresses = dict.fromkeys(known.addresses)
        # those of the source that spoke last first
        if found is not None and (known.age_s is None or found.age_s < known.age_s):
            addresses = dict.fromkeys((*found.addresses, *addresses))
        elif found is not None:
            addresses |= dict.fromkeys(found.addresses)
        return Resolution(
            what=what,
            steps=tuple(steps),
            peer_id=known.peer_id,
            name=known.name,
            virtual_ips=known.virtual_ips,
            addresses=tuple(addresses),
        )

    async def _owned(self, ask: AskOwner, address: ipaddress.IPv4Address, steps: list[Step]) -> Known | None:
        """Who has an address by contract, and what the directory knows of that peer."""
        try:
            owner = await ask(address)
        except VpndError as error:
            steps.append(Step(source="contract", result=f"failed: {error}"))
            return None
        result = f"peer {owner.peer_id}" if owner.peer_id else "nobody owns it"
        if owner.stale:
            result += ", as was confirmed last; look-ups fail"
        steps.append(
            Step(source="contract", result=result, age_s=max(0.0, self._now_s() - owner.confirmed_s))
        )
        if not owner.peer_id:
            return None
        return self._directory.find(owner.peer_id) or Known(
            peer_id=owner.peer_id, virtual_ips=(str(address),)
        )

    async def whereabouts(self, peer_id: str, steps: list[Step] | None = None) -> Found | None:
        """Where the table, or its last answer as far as that is remembered, says that a member is. `steps` gets what is
        done."""
        steps = [] if steps is None else steps
        if self._search is None or self._cache is None:
            return None
        now_s = self._now_s()
        entry = self._cache.get(peer_id, now_s)
        if entry is not None:
            waited_s = now_s - entry.found_s
            steps.append(Step(source="cache", result=_where(entry.value), age_s=waited_s))
            if entry.value is None:
                return None
            return msgspec.structs.replace(entry.value, age_s=entry.value.age_s + waited_s)
        steps.append(Step(source="cache", result="nothing"))
        try:
            found = await self._search(peer_id)
        except VpndError as error:
            # not remembered: the table could not be asked, which says nothing of the member
            steps.append(Step(source="dht", result=f"failed: {error}"))
            return None
        self._cache.put(peer_id, found, self._now_s())
        steps.append(Step(source="dht", result=_where(found), age_s=found.age_s if found else None))
        return found


def is_peer_id(text: str) -> bool:
    """Whether `text` is a peer id as `vpnd id` prints it."""
    try:
        peerid.public_key_untrusted(text)
    except ValueError:
        return False
    return True


def _ipv4(text: str) -> ipaddress.IPv4Address | None:
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        return None


def _said(known: Known | None) -> str:
    if known is None:
        return "not known"
    return f"peer {known.peer_id}, {_where_addresses(known.addresses)}"


def _where(found: Found | None) -> str:
    return "nothing" if found is None else _where_addresses(found.addresses)


def _where_addresses(addresses: tuple[str, ...]) -> str:
    return f"at {', '.join(addresses)}" if addresses else "no address"
