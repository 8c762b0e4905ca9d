"""The members' Kademlia table, by py-libp2p's KadDHT: publishing where this node is, and finding where others are.

Records and who may have one: `vpnd.discovery.records`. What stands between the library and the network here:

- it gets a host on which streams go to members only, at addresses of the directory and with the deadlines of every
  dial; what other nodes say of addresses is a last resort;
- `get_value` would answer from this node's own copy for 24 hours: the copy is laid aside while others are asked, and
  the newest of all answers counts;
- a record found when the deadline strikes counts, though the library still waits for somebody;
- records are stored bare: what a member adds to its statement would be kept, and passed on, unread;
- one silent node holds up a look-up for a share of discovery.dht_timeout, not for ten seconds.

The wire protocol is that of every libp2p table (/ipfs/kad/1.0.0), but strangers get no streams of this host and this
node none of theirs, so the table is the network's own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import trio
from libp2p.kad_dht import kad_dht, peer_routing
from libp2p.kad_dht.common import PROTOCOL_ID, format_time_rfc3339
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Record
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.kad_dht.value_store import ValueStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from vpnd.adapter.guards import Notifee
from vpnd.adapter.host import Host
from vpnd.config.schema import Discovery
from vpnd.discovery.lookup import Found
from vpnd.discovery.records import PREFIX, RecordRules, dht_key
from vpnd.errors import VpndError
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Presence, parse_untrusted

#: Of discovery.dht_timeout, what one question to one node may take: a look-up asks round after round.
QUERY_SHARE = 0.2
MILLISECONDS = 1000
#: The namespace of our keys, as the library's validators are called by.
NAMESPACE = PREFIX.split("/")[1]

log = logging.getLogger(__name__)


class DhtError(VpndError):
    """The table could not be asked, or did not answer in time. It says nothing of who was looked for."""


class MembersDht:
    """The table of one network. Owner: control's trio loop; `run` once, the rest while it runs.

    `addresses_of(peer_id)` are the multiaddrs the directory knows of a member, None for everybody else; `presence()`
    gives this node's own presence statement, signed just now, or None while it has none. `stream_timeout_s`: longest
    life of a stream that others open. `now_ms`: milliseconds since 1970.
    """

    def __init__(
        self,
        host: Host,
        rules: RecordRules,
        settings: Discovery,
        *,
        stream_timeout_s: float,
        addresses_of: Callable[[str], Sequence[str] | None],
        presence: Callable[[], bytes | None],
        now_ms: Callable[[], int],
        count: Callable[[str], None],
    ) -> None:
        """Before the host runs, or while it does. Counts dht_published, dht_found, dht_not_found, dht_failures and
        dht_refused_records."""
        self._host, self._settings, self._rules = host, settings, rules
        self._addresses_of, self._presence, self._now_ms, self._count = addresses_of, presence, now_ms, count
        self._validator = _Validator(rules, now_ms, count)
        # globals of the library: there is one table in a process
        query_s = settings.dht_timeout * QUERY_SHARE
        kad_dht.QUERY_TIMEOUT = peer_routing.QUERY_TIMEOUT = query_s  # type: ignore[assignment]
        self._dht = KadDHT(
            _MembersHost(host, addresses_of),  # type: ignore[arg-type]
            DHTMode.SERVER,
            validator=NamespacedValidator({NAMESPACE: self._validator}, strict_validation=True),
            validator_changed=True,
            strict_validation=True,
            # members are vouched for; a whole network may be in one building
            max_peers_per_subnet=0,
        )
        self._dht.value_store = _BareValues(self._dht.host, self._dht.local_peer_id)
        self._dht.provider_store = _NoProviders(self._dht.host)
        host.serve(PROTOCOL_ID, self._dht.handle_stream, stream_timeout_s)
        self._publish_now = trio.Event()
        self._published_to = 0
        connected, self._connected = trio.open_memory_channel[ID](settings.dht_backlog)
        self._connecting = connected
        host.swarm.register_notifee(Notifee(lambda conn: self._on_connected(conn.muxed_conn.peer_id)))

    async def run(self) -> None:
        """Keep the table, and our record in it, until cancelled.

        An error of the library's ends the table and nothing else: what the directory knows needs no table.
        """
        try:
            await self._run()
        except* Exception as group:
            self._count("dht_failures")
            log.error("the members' table has stopped: %r", group.exceptions[0])

    async def _run(self) -> None:
        async with background_trio_service(self._dht), trio.open_nursery() as nursery:
            nursery.start_soon(self._learn)
            while True:
                await self._publish_now.wait()
                self._publish_now = trio.Event()
                await self._publish()
                with trio.move_on_after(self._settings.dht_publish_interval):
                    await self._publish_now.wait()
                self._publish_now.set()

    def publish(self) -> None:
        """Our addresses are others than before: say so soon."""
        self._publish_now.set()

    async def find(self, peer_id: str) -> Found | None:
        """Where a member says it is, within discovery.dht_timeout; None when nobody knows. Raises DhtError."""
        key = dht_key(peer_id)
        values = await self._values_untrusted(key)
        if not values:
            self._count("dht_not_found")
            return None
        self._count("dht_found")
        wire = values[self._rules.best_untrusted(values)]
        body = parse_untrusted(wire).body
        assert isinstance(body, Presence)
        age_s = max(0, self._now_ms() - body.sequence_ms) / MILLISECONDS
        return Found(addresses=body.addresses, age_s=age_s, statement=wire)

    def size(self) -> int:
        """Members in the routing table."""
        return int(self._dht.get_routing_table_size())

    def records(self) -> int:
        """Records held for others and for us."""
        return len(self._dht.value_store.store)

    # looking up

    async def _values_untrusted(self, key: str) -> list[bytes]:
        """All records of a key that were found and are good, our own copy too."""
        raw, store = key.encode(), self._dht.value_store.store
        held = store.pop(raw, None)
        with self._validator.watching(key) as seen:
            try:
                with trio.move_on_after(self._settings.dht_timeout) as scope:
                    await self._dht.get_value(key)
            except Exception as error:  # the library lets errors of streams and parsers through
                self._count("dht_failures")
                raise DhtError(f"the table could not be asked: {error}") from error
            finally:
                self._lay_back(raw, held)
        values = list(seen)
        if held is not None and self._validator.holds(key, held[0].value):
            values.append(held[0].value)
        if scope.cancelled_caught and not values:
            self._count("dht_failures")
            raise DhtError(f"no answer within {self._settings.dht_timeout:g} s")
        return values

    def _lay_back(self, raw: bytes, held: tuple[Any, float] | None) -> None:
        """Others ask this node for the record; the newer of it and what was stored meanwhile stays."""
        store = self._dht.value_store.store
        now = store.get(raw)
        if held is None or not self._validator.holds(raw.decode(), held[0].value):
            return
        if now is None or self._rules.best_untrusted([now[0].value, held[0].value]) == 1:
            store[raw] = held

    # publishing

    async def _publish(self) -> None:
        wire = self._presence()
        if wire is None:
            return
        body = parse_untrusted(wire).body
        assert isinstance(body, Presence)
        try:
            with trio.move_on_after(self._settings.dht_timeout):
                await self._dht.put_value(dht_key(body.peer_id), wire)
            self._count("dht_published")
        except Exception as error:  # as in `_values_untrusted`; it is tried again at the next interval
            self._count("dht_failures")
            log.debug("our record was not published: %s", error)

    # who is there

    def _on_connected(self, peer_id: ID) -> None:
        try:
            self._connecting.send_nowait(peer_id)
        except trio.WouldBlock:
            log.debug("too many connections at once; the table learns of %s later", peer_id)

    async def _learn(self) -> None:
        """Who connects is taken into the table. While that grows, our record is published to more and more."""
        for peer_id in list(self._host.libp2p.get_connected_peers()):
            await self._take(peer_id)
        async for peer_id in self._connected:
            await self._take(peer_id)

    async def _take(self, peer_id: ID) -> None:
        addresses = self._addresses_of(str(peer_id))
        if addresses is None:
            return
        info = PeerInfo(peer_id, [Multiaddr(address) for address in addresses])
        await self._dht.routing_table.add_peer(info, skip_server_mode_check=True)
        if self.size() >= max(1, 2 * self._published_to):
            self._published_to = self.size()
            self.publish()


class _MembersHost:
    """The host as the library sees it: everything of libp2p's, but streams are opened to members, by `Host`."""

    def __init__(self, host: Host, addresses_of: Callable[[str], Sequence[str] | None]) -> None:
        self._host, self._addresses_of = host, addresses_of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host.libp2p, name)

    def set_stream_handler(self, protocol: str, handler: Any) -> None:
        """The handler is served by `MembersDht`, contained."""

    async def new_stream(self, peer_id: ID, protocols: Sequence[str]) -> Any:
        """See IHost. Raises DhtError for everybody but members, DialError."""
        addresses = self._addresses_of(str(peer_id))
        if addresses is None:
            raise DhtError(f"{peer_id} is not a member")
        return await self._host.open_stream(addresses or self._heard(peer_id), str(peer_id), protocols[0])

    def _heard(self, peer_id: ID) -> list[str]:
        """What other members say of where it is."""
        try:
            return [str(address) for address in self._host.libp2p.get_peerstore().addrs(peer_id)]
        except Exception:  # the peerstore's own way to say that there are none
            return []


class _Validator(Validator):
    """`RecordRules` as the library calls them."""

    def __init__(self, rules: RecordRules, now_ms: Callable[[], int], count: Callable[[str], None]) -> None:
        self._rules, self._now_ms, self._count = rules, now_ms, count
        self._watches: dict[str, list[list[bytes]]] = {}

    @contextlib.contextmanager
    def watching(self, key: str) -> Iterator[list[bytes]]:
        """Gather the records of `key` that come by and are good."""
        seen: list[bytes] = []
        watches = self._watches.setdefault(key, [])
        watches.append(seen)
        try:
            yield seen
        finally:
            watches[:] = [each for each in watches if each is not seen]
            if not watches:
                del self._watches[key]

    def holds(self, key: str, value: bytes) -> bool:
        try:
            self._rules.check_untrusted(key, value, self._now_ms())
        except MembershipRefused:
            return False
        return True

    def validate(self, key: str, value: bytes) -> None:
        """See Validator. Raises MembershipRefused."""
        try:
            self._rules.check_untrusted(key, value, self._now_ms())
        except MembershipRefused:
            self._count("dht_refused_records")
            raise
        for seen in self._watches.get(key, ()):
            if value not in seen:
                seen.append(value)

    def select(self, key: str, values: list[bytes]) -> int:
        """See Validator. Raises MembershipRefused."""
        return self._rules.best_untrusted(values)


class _BareValues(ValueStore):
    """Keeps the key and value of a record that was checked, and the time, and nothing else that came with it."""

    def put_record(self, key: bytes, record: Record) -> None:
        super().put_record(key, Record(key=key, value=record.value, timeReceived=format_time_rfc3339()))


class _NoProviders(ProviderStore):
    """Keeps nothing: nobody provides anything here, and a member could fill the memory with what it says it does."""

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """See ProviderStore."""
