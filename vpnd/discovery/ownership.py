"""Which IPv4 addresses peers may use where a contract says who owns them. No I/O; time is an argument.

Membership says who may talk, the contract as whom. What is asked for, and what comes of it:

    address             the contract names    it is
    ------------------  --------------------  ---------------------------------------------------------------------
    claimed by a peer   that peer             that peer's; asked for again before registry.positive_lifetime ends
                        another, nobody       not used by who claims it; asked again each registry.negative_lifetime
    wanted by packets   a peer                that peer's, as if it had claimed it
                        a stranger, nobody    nobody's; forgotten after registry.negative_lifetime, or asked again
                                              then if packets still want it
    either              no answer             as it was, until registry.stale_lifetime after it was confirmed; asked
                                              again after registry.failure_lifetime, then more and more seldom

A claim is what [[peers]] or a membership says. The contract's to give are the addresses of configured peers and what is
in the networks that were given to `govern`; IPv6 addresses have no token, and networks behind members stay a matter of
membership. This node's
own addresses are asked for like claims, so that its user hears when the contract has them for somebody else's; no peer
ever gets them.
"""

from __future__ import annotations

import heapq
import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Iterable

import msgspec

from vpnd.config.schema import Registry
from vpnd.discovery.registry import CONFIGURATION, Member
from vpnd.resilience import Backoff

Address = ipaddress.IPv4Address

#: When something is due that cannot wait.
NOW = float("-inf")
NEVER = float("inf")


class _Record:
    """What is known of one address. `owner` None: nothing (any more), "": that nobody owns it.

    `error`: why the last look-up failed, empty after one that did not. `wanted`: by packets, since it was asked for.
    """

    __slots__ = (
        "asked",
        "backoff",
        "claimants",
        "confirmed_s",
        "due_s",
        "error",
        "owner",
        "under_way",
        "wanted",
    )

    def __init__(self, backoff: Backoff) -> None:
        self.claimants: set[str] = set()
        self.owner: str | None = None
        self.confirmed_s = self.due_s = NEVER
        self.error = ""
        self.asked = self.under_way = self.wanted = False
        self.backoff = backoff


class Ownership:
    """The addresses of all peers. Owner: control's loop.

    `multiplier`: growth of the wait between look-ups that fail. `due` is called when something has come to be due
    earlier than `next_s` said.
    """

    def __init__(self, settings: Registry, multiplier: float, due: Callable[[], None]) -> None:
        self._settings, self._multiplier, self._due = settings, multiplier, due
        self._governed: set[ipaddress.IPv4Network] = set()
        self._records: dict[Address, _Record] = {}
        self._claims: dict[str, frozenset[Address]] = {}  # by peer id; all peers, and this node
        self._owned: dict[str, set[Address]] = {}  # by peer id
        self._own: frozenset[Address] = frozenset()
        #: (due, address); entries whose time is no longer the record's are skipped
        self._queue: list[tuple[float, Address]] = []
        #: until when owners are believed without another answer: in the order in which they were confirmed
        self._believed: OrderedDict[Address, float] = OrderedDict()
        #: claims without an answer that holds; claims of what is somebody else's; owners whose last look-up failed
        self.unconfirmed = self.disowned = self.stale = 0
        #: claimed, and never asked for so far
        self.unasked = 0
        #: wanted by packets alone, and without an owner
        self._strays = 0

    @property
    def governed(self) -> tuple[str, ...]:
        """The networks whose addresses are the contract's to give."""
        return tuple(str(network) for network in sorted(self._governed))

    # --- who claims what

    def govern(self, networks: Iterable[str]) -> None:
        """These too are networks of the VPN. Before anybody is settled who claims something in them."""
        parsed = map(ipaddress.ip_network, networks)
        self._governed.update(one for one in parsed if isinstance(one, ipaddress.IPv4Network))

    def own(self, peer_id: str, addresses: Iterable[str]) -> None:
        parsed = map(ipaddress.ip_address, addresses)
        self._own = frozenset(one for one in parsed if isinstance(one, Address))
        self._claim(peer_id, self._own)

    def settle(self, member: Member) -> Member:
        """Take in what a peer claims; the peer with what it may use instead: first what it claims, then the rest."""
        configured = member.source == CONFIGURATION
        claimed = {
            p: address for p in member.prefixes if (address := self._address(p, configured=configured))
        }
        self._claim(member.peer_id, frozenset(claimed.values()))
        owned = self._owned.get(member.peer_id, set()) - self._own
        kept = [prefix for prefix in member.prefixes if prefix not in claimed or claimed[prefix] in owned]
        more = sorted(owned.difference(claimed.values()))
        prefixes = (*kept, *(f"{address}/{address.max_prefixlen}" for address in more))
        return msgspec.structs.replace(member, prefixes=prefixes)

    def forget(self, peer_id: str) -> None:
        self._claim(peer_id, frozenset())
        self._claims.pop(peer_id, None)

    def wanted(self, address: Address) -> bool:
        """Packets want to go there. False when that is none of the contract's business, or too many wait already."""
        if not any(address in network for network in self._governed):
            return False
        record = self._records.get(address)
        if record is None:
            full = len(self._records) >= self._settings.max_entries
            if full or self._strays >= self._settings.max_waiting:
                return False
            record = self._record(address)
        record.wanted = True
        return True

    # --- what is asked

    def next_s(self) -> float:
        """When `take_due` or `lapse` has something to do."""
        while self._queue and not self._is_due(*self._queue[0]):
            heapq.heappop(self._queue)
        asks_s = self._queue[0][0] if self._queue else NEVER
        return min(asks_s, self.lapses_s())

    def lapses_s(self) -> float:
        """When `lapse` has something to do."""
        return next(iter(self._believed.values()), NEVER)

    def take_due(self, now_s: float, most: int) -> list[Address]:
        """Up to so many addresses to ask for now; each must be followed by `answered` or `failed`."""
        taken: list[Address] = []
        while self._queue and self._queue[0][0] <= now_s and len(taken) < most:
            due_s, address = heapq.heappop(self._queue)
            if not self._is_due(due_s, address):
                continue
            record = self._records[address]
            if record.claimants or record.wanted or record.owner in self._claims:
                record.under_way, record.due_s = True, NEVER
                taken.append(address)
            else:
                self._drop(address)
        return taken

    def answered(self, address: Address, peer_id: str, now_s: float) -> frozenset[str]:
        """The contract names an owner, or "" for nobody. Returns the peer ids of those for whom that is news."""
        record = self._records.get(address)
        if record is None:
            return frozenset()
        before = record.owner
        self._tally(record, -1)
        _come_back(record)
        record.error = ""
        record.backoff.reset()
        self._give(address, record, peer_id)
        record.confirmed_s = now_s
        settings = self._settings
        self._believed.pop(address, None)
        if peer_id:
            self._believed[address] = now_s + max(settings.stale_lifetime, settings.positive_lifetime)
        self._tally(record, 1)
        if peer_id in record.claimants or peer_id in self._claims:
            self._schedule(address, record, now_s + settings.positive_lifetime * settings.refresh_share)
        else:
            self._schedule(address, record, now_s + settings.negative_lifetime)
        return _concerned(record, before) if before != peer_id else frozenset()

    def failed(self, address: Address, reason: str, now_s: float) -> None:
        """There was no usable answer: what was confirmed stands for now."""
        record = self._records.get(address)
        if record is None:
            return
        self._tally(record, -1)
        _come_back(record)
        record.error = reason
        self._tally(record, 1)
        again_s = record.backoff.fail(now_s)
        if not record.claimants and not record.owner:
            again_s = now_s + self._settings.negative_lifetime
        self._schedule(address, record, again_s)

    def lapse(self, now_s: float) -> frozenset[str]:
        """Owners that were not confirmed for too long are believed no more. Returns as `answered`."""
        concerned: set[str] = set()
        while self.lapses_s() <= now_s:
            address, _ = self._believed.popitem(last=False)
            record = self._records[address]
            before = record.owner
            self._tally(record, -1)
            self._give(address, record, None)
            self._tally(record, 1)
            concerned |= _concerned(record, before)
        return frozenset(concerned)

    # --- what is said of it

    def report(self, peer_id: str, now_s: float, name: Callable[[str], str]) -> tuple[str, ...]:
        """A line for each address that the peer claims and may not use, or uses though the last look-up failed.
        `name` gives what another peer is called."""
        lines = (
            self._line(address, peer_id, now_s, name) for address in sorted(self._claims.get(peer_id, ()))
        )
        return tuple(filter(None, lines))

    def _line(self, address: Address, peer_id: str, now_s: float, name: Callable[[str], str]) -> str:
        record = self._records[address]
        if record.owner is None:
            why = (
                f"its owner could not be looked up: {record.error}"
                if record.error
                else "its owner is looked up"
            )
        elif record.owner != peer_id:
            why = "the contract says that " + (
                f"{name(record.owner)} owns it" if record.owner else "nobody owns it"
            )
        elif record.error:
            left_s = max(0.0, self._believed[address] - now_s)
            return (
                f"{address} is used for another {left_s:.0f} s, unless its owner is confirmed: {record.error}"
            )
        else:
            return ""
        return f"{address} is not used: {why}"

    # --- records

    def _address(self, prefix: str, *, configured: bool) -> Address | None:
        """Of a single address that is the contract's to give. `configured`: what a peer has is its own address, not a
        network behind it, wherever that lies."""
        network = ipaddress.ip_network(prefix)
        if not isinstance(network, ipaddress.IPv4Network) or network.prefixlen != network.max_prefixlen:
            return None
        address = network.network_address
        return address if configured or any(address in network for network in self._governed) else None

    def _claim(self, peer_id: str, claimed: frozenset[Address]) -> None:
        before = self._claims.get(peer_id, frozenset())
        self._claims[peer_id] = claimed
        for address in before - claimed:
            record = self._records[address]
            self._tally(record, -1)
            record.claimants.discard(peer_id)
            self._tally(record, 1)
        for address in claimed - before:
            record = self._records.get(address) or self._record(address)
            self._tally(record, -1)
            record.claimants.add(peer_id)
            self._tally(record, 1)

    def _record(self, address: Address) -> _Record:
        settings = self._settings
        longest_s = max(settings.failure_lifetime, settings.negative_lifetime)
        # one client of one endpoint: there is nobody to keep out of step with
        backoff = Backoff(settings.failure_lifetime, longest_s, self._multiplier, lambda low, high: high)
        record = self._records[address] = _Record(backoff)
        self._tally(record, 1)
        self._schedule(address, record, NOW)
        self._due()
        return record

    def _drop(self, address: Address) -> None:
        record = self._records.pop(address)
        self._tally(record, -1)
        self._give(address, record, None)
        self._believed.pop(address, None)

    def _give(self, address: Address, record: _Record, owner: str | None) -> None:
        if record.owner:
            held = self._owned[record.owner]
            held.discard(address)
            if not held:
                del self._owned[record.owner]
        record.owner = owner
        if owner:
            self._owned.setdefault(owner, set()).add(address)

    def _schedule(self, address: Address, record: _Record, due_s: float) -> None:
        record.due_s = due_s
        heapq.heappush(self._queue, (due_s, address))

    def _is_due(self, due_s: float, address: Address) -> bool:
        record = self._records.get(address)
        return record is not None and not record.under_way and record.due_s == due_s

    def _tally(self, record: _Record, sign: int) -> None:
        """Take a record out of the sums, or put it back in when it has changed."""
        if record.owner is None:
            self.unconfirmed += sign * len(record.claimants)
        else:
            self.disowned += sign * len(record.claimants - {record.owner})
        self.stale += sign * bool(record.owner and record.error)
        self.unasked += sign * bool(record.claimants and not record.asked)
        self._strays += sign * (not record.claimants and not record.owner)


def _come_back(record: _Record) -> None:
    """The question was answered, or not."""
    record.under_way = record.wanted = False
    record.asked = True


def _concerned(record: _Record, before: str | None) -> frozenset[str]:
    return frozenset(peer_id for peer_id in (before, record.owner, *record.claimants) if peer_id)
