"""Finding members that are not where the directory says, and being found; and the names of all members.

    in the members' table (DHT)  our presence is published; members that cannot be reached are looked for, a few at a
                                 time; what is found is a signed statement, which the directory takes like any other
    on the local network (mDNS)  an address somebody says to be a member's is dialed beside those it signed
    names                        `NameService`, kept up to date

All of it is help: a node whose table or local network does not work goes on with what its directory knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import trio

from vpnd.adapter.dht import MembersDht
from vpnd.adapter.host import Host
from vpnd.adapter.mdns import LocalNetwork
from vpnd.config.multiaddrs import parse
from vpnd.control.common import Common
from vpnd.control.dns_service import NameService
from vpnd.control.membership import NetworkService
from vpnd.control.state import MILLISECONDS, OwnNetwork, milliseconds
from vpnd.discovery.localnet import Recognizer
from vpnd.discovery.lookup import AnswerCache, AskOwner, Found, Known, Lookup
from vpnd.discovery.records import RecordRules
from vpnd.discovery.registry import PeerRegistry
from vpnd.endpoint import ip_of
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Presence


class LocalDirectory:
    """Configured peers and the signed directory. Owner: control's loop."""

    def __init__(self, registry: PeerRegistry, own: OwnNetwork | None, now_ms: Callable[[], int]) -> None:
        self._registry = registry
        self._own = own
        self._now_ms = now_ms

    def find(self, what: str) -> Known | None:
        """See vpnd.discovery.lookup.Directory; this node itself is found too."""
        if self._own is not None:
            try:
                peer_id = self._own.whom(what)
            except MembershipRefused:
                peer_id = ""
            if peer_id and (known := self._in_network(self._own, peer_id)) is not None:
                return known
        names = {what, str(ip_of(what) or what)}
        for member in self._registry.claims().values():
            if names & {member.name, member.peer_id, *member.virtual_ips}:
                return Known(
                    peer_id=member.peer_id,
                    name=member.name,
                    virtual_ips=member.virtual_ips,
                    addresses=member.addresses,
                )
        return None

    def _in_network(self, own: OwnNetwork, peer_id: str) -> Known | None:
        now_ms = self._now_ms()
        member = own.directory.find(peer_id, now_ms)
        if member is None:
            return None
        statement = own.directory.presence(peer_id)
        presence = statement.body if statement is not None else None
        said_ms = presence.sequence_ms if isinstance(presence, Presence) else member.issued_ms
        return Known(
            peer_id=peer_id,
            name=member.name,
            virtual_ips=member.addresses,
            addresses=member.multiaddrs,
            age_s=max(0.0, (now_ms - said_ms) / MILLISECONDS),
        )


class Turns:
    """Takes a few of many, everybody in turn, however the many change."""

    def __init__(self) -> None:
        self._had: set[str] = set()

    def next(self, candidates: Sequence[str], most: int) -> Sequence[str]:
        """Up to `most` of those that were not taken since everybody else was."""
        self._had.intersection_update(candidates)
        waiting = [each for each in candidates if each not in self._had]
        if not waiting:
            self._had.clear()
            waiting = list(candidates)
        chosen = waiting[:most]
        self._had.update(chosen)
        return chosen

    def clear(self) -> None:
        self._had.clear()


class Discovering:
    """Owner: control's trio loop; `run` once.

    `unreachable()` gives the peer ids of members that have no session and none under way. `owner`: of an address, where
    a contract says so.
    """

    def __init__(
        self,
        network: NetworkService,
        common: Common,
        registry: PeerRegistry,
        *,
        unreachable: Callable[[], Iterable[str]],
        owner: AskOwner | None = None,
    ) -> None:
        self._network, self._own, self._unreachable = network, network.own, unreachable
        self._live, self._count, now_s = common.live, common.count, common.now_s
        self._now_ms = common.now_ms
        settings = self._live.config.discovery
        self.cache = AnswerCache(
            settings.cache_lifetime, settings.negative_cache_lifetime, settings.cache_entries
        )
        #: For users and for `_search_on`: they share what was found.
        self.lookup = Lookup(
            LocalDirectory(registry, self._own, self._now_ms),
            now_s,
            cache=self.cache,
            search=self._search,
            owner=owner,
        )
        self.names = NameService(self._own.peer_id, registry.members, self._live.config.dns, self._count)
        network.watch_own(self.names.own_changed)
        registry.subscribe(lambda change: self.names.changed())
        self._dht: MembersDht | None = None
        self._local: LocalNetwork | None = None
        self._turns = Turns()

    async def run(self, host: Host) -> None:
        """Until cancelled. `host` must be running."""
        settings = self._live.config.discovery
        async with trio.open_nursery() as nursery:
            if self._live.config.dns.enabled:
                nursery.start_soon(self.names.run)
            if settings.dht:
                self._dht = self._make_dht(host)
                nursery.start_soon(self._dht.run)
                nursery.start_soon(self._search_on)
            if settings.mdns:
                self._local = self._make_local(host)
                nursery.start_soon(self._local.run)
            await trio.sleep_forever()

    def network_changed(self) -> None:
        """The machine has other addresses or routes: say so everywhere, and look anew for whoever is away."""
        self._turns.clear()
        self.cache.clear()
        if self._dht is not None:
            self._dht.publish()
        if self._local is not None:
            self._local.network_changed()

    # --- the table

    def _make_dht(self, host: Host) -> MembersDht:
        settings, membership = self._live.config.discovery, self._live.config.membership
        rules = RecordRules(
            self._known_ms, milliseconds(settings.dht_record_lifetime), milliseconds(membership.clock_skew)
        )
        return MembersDht(
            host,
            rules,
            settings,
            stream_timeout_s=self._live.config.p2p.stream_timeout,
            addresses_of=self._addresses_of,
            presence=self._presence,
            now_ms=self._now_ms,
            count=self._count,
        )

    def _known_ms(self, peer_id: str) -> int | None:
        if self._own.directory.find(peer_id, self._now_ms()) is None:
            return None
        held = self._own.directory.presence(peer_id)
        return held.body.sequence_ms if held is not None and isinstance(held.body, Presence) else -1

    def _addresses_of(self, peer_id: str) -> tuple[str, ...] | None:
        member = self._own.directory.find(peer_id, self._now_ms())
        return member.multiaddrs if member is not None and peer_id != self._own.peer_id else None

    def _presence(self) -> bytes | None:
        now_ms = self._now_ms()
        if not self._own.is_member(now_ms):
            return None
        statement = self._own.presence_again(now_ms)
        return statement.wire if statement is not None else None

    async def _search(self, peer_id: str) -> Found | None:
        """What the table says of a member; see vpnd.discovery.lookup.Search. Raises VpndError."""
        if self._dht is None:
            return None
        found = await self._dht.find(peer_id)
        if found is not None and found.statement:
            self._network.learn([found.statement])
        return found

    async def _search_on(self) -> None:
        """Look for members that cannot be reached, a few in each interval, everybody in turn."""
        while True:
            await trio.sleep(self._live.config.discovery.dht_search_interval)
            async with trio.open_nursery() as nursery:
                for peer_id in self._turns.next(
                    list(self._unreachable()), self._live.config.discovery.dht_searches
                ):
                    nursery.start_soon(self.lookup.whereabouts, peer_id)

    # --- the local network

    def _make_local(self, host: Host) -> LocalNetwork:
        settings = self._live.config.discovery

        def member_ids() -> Iterable[str]:
            return (member.peer_id for member in self._own.directory.members(self._now_ms()))

        recognizer = Recognizer(self._own.network.id, member_ids, settings.cache_entries)

        def port_at(ip: str) -> int | None:
            endpoints = map(parse, host.listen_addresses())
            return next((endpoint.port for endpoint in endpoints if endpoint.host == ip), None)

        return LocalNetwork(
            self._own.network.id,
            self._own.peer_id,
            recognizer,
            settings,
            without=self._live.config.network.interface,
            port_at=port_at,
            found=self._network.seen,
            count=self._count,
        )
