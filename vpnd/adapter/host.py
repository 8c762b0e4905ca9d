"""The py-libp2p host of a node: listening, members only, data sessions taken out as they come.

What stock libp2p 0.8 would do, and what keeps it from that here (each has a test that fails without):

    offer /tls, /secio and /plaintext beside Noise      sec_opt with Noise alone
    keep a slot per inbound connection for ever         guards.InboundGate
    end the host when a stream handler raises           guards.contained
    leave port and connections open after the block     close() inside the block
    wait for ever for a silent peer when dialing        a deadline over the whole dial
    not notice a vanished peer                          transport.WatchfulTcp
    run on without a bound address, or share a port     binding.probe and binding.check
    announce 0.0.0.0                                    addresses.expand_wildcards
    accept one connection in a turn, of 128 that wait   door.Door
    leak a slot per refused connection                  a resource manager without limits; they are in guards
    dial whomever it hears of                           the auto-connector is stopped
    decode any kind of key, of anybody                  noise.MembersOnlyNoise, noise.ed25519_only
    read a negotiation message of any length            muxer.limit_negotiation
    decode a thousand addresses in one message          identify.bound_messages
    greet a round trip before it proposes               muxer.negotiate_at_once
    keep any number of streams, and unread bytes        muxer.bound_all
    keep a connection that comes as its peer is removed Host.disconnect, Host._members_only
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import trio
from libp2p import new_host
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.host.ping import ID as PING
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.rcmgr.connection_limits import ConnectionLimits
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from vpnd import why
from vpnd.adapter import binding
from vpnd.adapter.addresses import Endpoint, expand_wildcards, literal, parse_endpoint
from vpnd.adapter.arrivals import Pace, Places, Rate
from vpnd.adapter.dial import (
    DialError,
    NotAdmitted,
    Patience,
    asking,
    connect,
    dial_secured,
    dial_session,
    either,
    first,
)
from vpnd.adapter.door import OpenTcp
from vpnd.adapter.framing import measure
from vpnd.adapter.guards import Count, HandedOver, InboundGate, Notifee, StreamHandler, contained
from vpnd.adapter.guests import ENROL, QUESTIONS, Asking, Desk
from vpnd.adapter.handoff import Detached, NotDetachable, detach
from vpnd.adapter.identify import bound_messages
from vpnd.adapter.meeting import Ends
from vpnd.adapter.muxer import SESSION_MUXERS, bound_all, limit_negotiation, negotiate_at_once, offered
from vpnd.adapter.noise import MembersOnlyNoise, UnknownPeer, ed25519_only
from vpnd.adapter.punch import FreshTcp, WayStream
from vpnd.adapter.reach import Observed, Reaching
from vpnd.adapter.transport import WatchfulTcp, close_now, raw_of
from vpnd.config.live import Live
from vpnd.errors import VpndError
from vpnd.logs import Seldom
from vpnd.nat.messages import MEET, REACH
from vpnd.nat.paths import RelayAt
from vpnd.session import CHACHAPOLY, SUBNET_NODE, VPND

Result = TypeVar("Result")

#: Whether a peer, after it was asked at these addresses, knows this node better than when it turned it away.
Introduce = Callable[[Sequence[str], str], Awaitable[bool]]

#: Passes a session's socket on or not, at once and without waiting: the descriptor is closed when it returns.
TakeSession = Callable[[Detached], None]

#: "No limit" where libp2p insists on a number: its own bookkeeping of refusals leaks, ours does not.
UNLIMITED = 10**9


class Host:
    """One libp2p host. Use inside `running`; the rest is valid only there.

    `member_addresses()`: multiaddrs at which members are. `count` counts under names of vpnd.metrics, `connections` is
    told how many libp2p connections there are when one comes or goes. `speaks` is the protocol of a peer's sessions
    (vpnd.session).
    Owner: control's trio loop.
    """

    def __init__(
        self,
        keys: KeyPair,
        live: Live,
        *,
        is_member: Callable[[str], bool],
        member_addresses: Callable[[], Iterable[str]],
        count: Count,
        connections: Callable[[int], None],
        seldom: Seldom,
        speaks: Callable[[str], str] = lambda _: VPND,
    ) -> None:
        config = live.config
        p2p = config.p2p
        bound_messages()
        ed25519_only()
        limit_negotiation()
        negotiate_at_once()
        self._live = live
        self._count = count
        self._seldom = seldom
        self._is_member = is_member
        self._speaks = speaks
        self._take_session: TakeSession | None = None
        self._ciphers = offered(config.session.cipher)
        self._requested = binding.of_this_kernel([parse_endpoint(text) for text in p2p.listen])
        self._introduce: Introduce | None = None
        self._reached_at: tuple[str, ...] = ()
        membership = config.membership
        # What one member may hold is what may be under way from where members are.
        places = functools.partial(
            Places,
            reserved=p2p.max_sessions_per_peer + p2p.max_connections_per_peer,
            members=member_addresses,
            fresh_s=p2p.handshake_timeout,
            now_s=trio.current_time,
        )
        self._handshakes = places(p2p.max_inbound_handshakes)
        self._pace = Pace(live, self._handshakes.knows, trio.current_time)
        self.coming = Rate(trio.current_time)  # members' handshakes
        self.desk = Desk(
            is_member,
            self._refused,
            places=places(membership.max_guests),
            timeout_s=membership.guest_timeout,
            count=count,
        )
        # Segments that pass everywhere for what carries little, or came about by detours: what a middle with a smaller
        # MTU drops in silence is lost for good.
        watched = config.session.user_timeout, p2p.keepalive_interval, self._permits
        self._small_tcp = OpenTcp(live, self._permits, self._admits)
        self._tcp = WatchfulTcp(*watched)
        self.libp2p: Any = new_host(
            key_pair=keys,
            sec_opt={NOISE: MembersOnlyNoise(keys, self.desk.lets_in, self._refused, self._too_often)},
            # Yamux first: an ordinary dial proposes in this order.
            muxer_opt={TProtocol(YAMUX): Yamux, **self._other_muxers()},
            transports=[self._small_tcp],
            resource_manager=_unlimited_resources(),
            connection_config=ConnectionConfig(
                max_connections=UNLIMITED,
                min_connections=0,
                low_watermark=0,
                high_watermark=UNLIMITED,
                max_connections_per_peer=p2p.max_connections_per_peer,
                inbound_upgrade_timeout=p2p.handshake_timeout,
            ),
            addrs_factory=self._announce,
            enable_mDNS=False,
            enable_upnp=False,
        )
        self.swarm: Any = self.libp2p.get_network()
        InboundGate(
            self.swarm,
            places=self._handshakes,
            pace=self._pace,
            max_connections_per_peer=p2p.max_connections_per_peer,
            count=count,
            seldom=seldom,
        ).install()
        bound_all(
            self.swarm,
            p2p.max_streams_per_connection,
            p2p.max_unread_per_connection,
            lambda why: seldom.warn("connection", why),
            self._divert,
        )
        self.desk.install(self.swarm)
        tcp = FreshTcp(*watched, config.session.small_segment)
        self.ends = Ends(self.swarm, self._ciphers, tcp, self._addresses_with)
        self.reaching = Reaching(self.swarm, tcp.from_port, self._patience)
        self.desk.serve(REACH, self.reaching.serve_untrusted)

        def count_connections(conn: Any) -> None:
            connections(self.connections())

        self.swarm.register_notifee(Notifee(count_connections, count_connections))
        self._contain_handlers()

    def _contain_handlers(self) -> None:
        """Wrap what libp2p registered itself, and the negotiation in front of every handler."""
        for protocol, handler in list(self.libp2p.get_mux().handlers.items()):
            if protocol is not None and handler is not None:
                # A ping stream lives as long as the other side measures; each ping has a deadline of its own.
                deadline_s = math.inf if protocol == PING else self._live.config.p2p.stream_timeout
                self.serve(protocol, handler, deadline_s)
        self.swarm.set_stream_handler(self._contained(self._members_only(), math.inf))

    def _members_only(self) -> StreamHandler:
        """What the swarm does with a stream, unless it comes from who was a member only when the connection was made:
        that may be right behind the moment at which that peer's connections are closed."""
        stock = self.swarm.common_stream_handler

        async def handler(stream: Any) -> None:
            muxed = stream.muxed_conn
            if self._is_member(str(muxed.peer_id)):
                await stock(stream)
                return
            self._refused(str(muxed.peer_id))
            close_now(raw_of(muxed.secured_conn))

        return handler

    def _contained(self, handler: StreamHandler, deadline_s: float) -> StreamHandler:
        reset_s = self._live.config.p2p.stream_timeout
        return contained(
            handler, deadline_s=deadline_s, reset_s=reset_s, count=self._count, seldom=self._seldom
        )

    def serve(self, protocol: str, handler: StreamHandler, deadline_s: float) -> None:
        """Answer streams of `protocol`; no exception leaves the handler, and `deadline_s` ends it."""
        self.libp2p.set_stream_handler(TProtocol(protocol), self._contained(handler, deadline_s))

    def take_sessions(self, take: TakeSession) -> None:
        """From now on `take` gets every inbound data session of a member; until then they are closed."""
        self._take_session = take

    def introduce_by(self, introduce: Introduce) -> None:
        """From now on `introduce` is asked about each peer that closed after the handshake, before another dial."""
        self._introduce = introduce

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen; at the end everything is closed, within process.stop_timeout.

        Raises AlreadyRunningError or MachineError when the addresses cannot be had, all of them and alone.
        """
        binding.probe(self._requested)
        refused: VpndError | None = None
        async with self.libp2p.run([Multiaddr(endpoint.multiaddr()) for endpoint in self._requested]):
            try:
                await self.swarm.auto_connector.stop()
                try:
                    inodes = {os.fstat(each.fileno()).st_ino for each in self._listening()}
                    binding.check(self._requested, self._bound(), inodes)
                except VpndError as error:
                    refused = error
                else:
                    yield
            finally:
                # Shielded, or a cancellation from outside would leave port and connections open.
                with trio.move_on_after(self._live.config.process.stop_timeout) as scope:
                    scope.shield = True
                    await self.libp2p.close()
        # Not raised inside: it would come out of libp2p's nurseries in a group.
        if refused is not None:
            raise refused

    def listen_addresses(self) -> tuple[str, ...]:
        """Multiaddrs others can dial, without /p2p, the most useful first; none when the machine has no address."""
        return self._dialable(self._bound())

    def reached_at(self, endpoints: Sequence[Endpoint]) -> None:
        """Where others reach this node beside its own addresses: ports of a router's that lead here."""
        self._reached_at = tuple(endpoint.multiaddr() for endpoint in endpoints)

    def ports(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(endpoint.port for endpoint in self._bound()))

    def connections(self) -> int:
        """libp2p connections, which data sessions are not."""
        return len(self.swarm.get_connections())

    async def dial(self, address: str, peer_id: str, *, small: bool = False) -> Detached:
        """A new data session, with segments of session.small_segment or as large as they may be; see
        vpnd.adapter.dial.dial_session."""
        upgrader, target = self.swarm.upgrader, ID.from_string(peer_id)

        protocol = self._speaks(peer_id)
        muxers = {SESSION_MUXERS[cipher]: cipher for cipher in self._ciphers}
        if protocol == SUBNET_NODE:
            muxers = {YAMUX: CHACHAPOLY}

        async def dial() -> Detached:
            return await dial_session(
                self._small_tcp if small else self._tcp,
                upgrader,
                address,
                target,
                muxers,
                protocol,
                self._patience(),
            )

        return await (dial() if protocol == SUBNET_NODE else self._introduced(dial, (address,), peer_id))

    async def ask(
        self,
        addresses: Sequence[str],
        peer_id: str,
        request: bytes,
        max_answer: int,
        question: str = ENROL,
        relays: Sequence[RelayAt] = (),
    ) -> bytes:
        """The answer to one request, from the first address that gives one, or over one of `relays`, which are tried
        beside them after nat.meet_delay. Raises DialError."""
        upgrader, target = self.swarm.upgrader, ID.from_string(peer_id)

        async def at(address: str) -> bytes:
            tcp, patience, use = self._small_tcp, self._patience(), asking(request, max_answer)
            return await dial_secured(tcp, upgrader, address, target, [question], patience, use)

        async def over(relay: RelayAt) -> bytes:
            return await self.ends.ask(relay, peer_id, question, request, max_answer, self._patience())

        if not relays:
            return await first(at, addresses)
        return await either(
            lambda: first(at, addresses), lambda: first(over, relays), self._live.config.nat.meet_delay
        )

    async def converse(
        self,
        addresses: Sequence[str],
        peer_id: str,
        protocol: str,
        talk: Callable[[Any], Awaitable[Result]],
        within_s: float,
    ) -> Result:
        """What `talk` makes of a new connection with a member, over which nothing but `protocol` goes; from the first
        address where that works. Raises DialError."""
        upgrader, target = self.swarm.upgrader, ID.from_string(peer_id)
        patience = Patience(within_s, self._live.config.p2p.connect_timeout)

        async def at(address: str) -> Result:
            return await dial_secured(
                self._tcp, upgrader, address, target, [protocol], patience, lambda session, _: talk(session)
            )

        return await first(at, addresses)

    async def open_stream(self, addresses: Sequence[str], peer_id: str, protocol: str) -> Any:
        """A new stream with a member, on the libp2p connection there is or a new one. Who is not known as a member (it
        may be named in discovery.bootstrap) is first asked to show that it is one. Raises DialError."""
        target = ID.from_string(peer_id)
        if not self._is_member(peer_id):
            if self._introduce is not None:
                await self._introduce(addresses, peer_id)
            if not self._is_member(peer_id):
                raise DialError(f"{peer_id} is not known as a member, so it gets no streams")
        if not self.swarm.get_connections(target):

            async def at(address: str) -> Any:
                return await connect(self._small_tcp, self.swarm, address, target, self._patience())

            await self._introduced(lambda: first(at, addresses), addresses, peer_id)
            if not self._is_member(peer_id):  # removed meanwhile, and its other connections closed
                await self.disconnect(peer_id)
                raise DialError(f"{peer_id} is not a member any more")
        timeout_s = self._live.config.p2p.dial_timeout
        try:
            with trio.fail_after(timeout_s):
                return await self.libp2p.new_stream(target, [TProtocol(protocol)])
        except trio.TooSlowError:
            raise DialError(f"{peer_id} agreed to no stream within {timeout_s:g} s") from None
        except Exception as error:  # libp2p lets errors of parsers and ciphers through as they are
            raise DialError(f"{peer_id} agreed to no stream of {protocol}: {error}") from error

    async def _introduced(
        self, dial: Callable[[], Awaitable[Result]], addresses: Sequence[str], peer_id: str
    ) -> Result:
        """What `dial` gets; from a peer that turned this node away, what it gets once that knows better."""
        try:
            return await dial()
        except NotAdmitted:
            if self._introduce is None or not await self._introduce(addresses, peer_id):
                raise
        return await dial()

    async def where_seen(self, address: str, peer_id: str, port: int, source_port: int = 0) -> Observed:
        """Ask a member from where it sees this node come, and whether it can dial it at `port`. Raises DialError."""
        ask = functools.partial(self.reaching.ask, address, peer_id, port, source_port)
        return await self._introduced(ask, (address,), peer_id)

    async def ping(self, peer_id: str, addresses: Sequence[str], count: int) -> list[float | None]:
        """Round trips over a libp2p connection, in milliseconds; None for one that took too long. Raises DialError."""
        stream = await self.open_stream(addresses, peer_id, PING)
        return await measure(stream, count, self._live.config.p2p.dial_timeout)

    def _patience(self) -> Patience:
        return Patience(self._live.config.p2p.dial_timeout, self._live.config.p2p.connect_timeout)

    async def disconnect(self, peer_id: str) -> None:
        """Close the libp2p connections with a peer, within process.stop_timeout. Data sessions are not ours."""
        target = ID.from_string(peer_id)
        connections = list(self.swarm.get_connections(target))
        with trio.move_on_after(self._live.config.process.stop_timeout):
            # Not by the swarm's close_peer, which forgets a connection that comes meanwhile.
            for connection in connections:
                with contextlib.suppress(
                    Exception
                ):  # of libp2p, in great variety: the socket is closed below
                    await connection.close()
        # A peer that reads nothing does not let libp2p take its leave.
        for connection in {*connections, *self.swarm.get_connections(target)}:
            close_now(raw_of(connection.muxed_conn.secured_conn))

    def _bound(self) -> list[Endpoint]:
        """What the kernel gave us, in the order of the configuration; libp2p binds in any order."""
        bound = [parse_endpoint(str(address)) for address in self.libp2p.get_transport_addrs()]
        order = {endpoint.ip: place for place, endpoint in enumerate(self._requested)}
        return sorted(bound, key=lambda endpoint: (order.get(endpoint.ip, len(order)), endpoint.port))

    def _listening(self) -> list[Any]:
        return [each for door in self.swarm.listeners.values() for each in door.sockets]

    def _dialable(self, bound: Sequence[Endpoint]) -> tuple[str, ...]:
        own = (each.multiaddr() for each in self._own(bound))
        texts = (*self._live.config.p2p.announce, *self._reached_at, *own)
        return tuple(dict.fromkeys(texts))

    def _own(self, bound: Sequence[Endpoint]) -> list[Endpoint]:
        """The same with this machine's addresses in the place of wildcards."""
        network = self._live.config.network
        return expand_wildcards(bound, network.interface, (network.virtual_ip,))

    def _addresses_with(self, port: int) -> list[Endpoint]:
        """This machine's addresses, the most useful first, with a port."""
        wild = [Endpoint(ipaddress.ip_address(text), port) for text in ("0.0.0.0", "::")]
        return self._own(wild)

    def _announce(self, candidates: Sequence[Multiaddr]) -> list[Multiaddr]:
        bound = [parse_endpoint(str(address)) for address in candidates]
        return [Multiaddr(text) for text in self._dialable(bound)]

    def _permits(self, endpoint: Endpoint) -> bool:
        """Whether it may be dialed. What others say of where they are must not lead to services of this machine alone,
        or its link: loopback and link-local addresses are for who listens on one, or names it by hand."""
        ip = endpoint.ip
        if not (ip.is_loopback or ip.is_link_local):
            return True
        config = self._live.config
        by_hand = (address for peer in config.peers for address in peer.addresses)
        named = {place.ip for text in (*by_hand, *config.discovery.bootstrap) if (place := literal(text))}
        return ip in named or any(
            own.ip.is_loopback == ip.is_loopback and own.ip.is_link_local == ip.is_link_local
            for own in self._bound()
        )

    def _refused(self, peer_id: str) -> None:
        self._count("refused_unknown_peer")
        self._seldom.warn("unknown peer", f"refused {peer_id}: it is not a peer of this node")

    def _admits(self, source: str) -> bool:
        """Whether one more connection may come in from there, as which it is counted then."""
        if self._pace.admits(source):
            return True
        self._count("refused_connect_rate")
        self._seldom.warn("connects", f"too many connections a second: closed one from {source}")
        return False

    def _too_often(self, peer_id: str) -> bool:
        most = self._live.config.p2p.max_handshakes_per_peer
        if not self._is_member(peer_id) or self.coming.allows(peer_id, most):
            return False
        self._count("refused_handshake_rate")
        self._seldom.warn(
            "handshake rate", f"refused {peer_id}: more than {most} handshakes a minute", peer_id
        )
        return True

    def _other_muxers(self) -> dict[TProtocol, Any]:
        """For each cipher, and for questions, what libp2p calls when its muxer id is chosen."""
        sessions = {
            TProtocol(SESSION_MUXERS[cipher]): functools.partial(self._session_muxer, cipher)
            for cipher in self._ciphers
        }
        asked = (*QUESTIONS, MEET, REACH, why.PROTOCOL)
        questions = {TProtocol(one): functools.partial(Asking, one) for one in asked}
        return {**sessions, **questions}

    def _divert(self, connection: Any, peer_id: str) -> None:
        """A connection of a subnet node carries packets beside all else: it is a session."""
        if self._speaks(peer_id) == SUBNET_NODE:
            self._take_out(connection, peer_id, CHACHAPOLY, SUBNET_NODE)

    def _session_muxer(self, cipher: str, connection: Any, peer_id: ID) -> Any:
        """Called by libp2p where it would build a muxer."""
        self._take_out(connection, str(peer_id), cipher, VPND)

    def _take_out(self, connection: Any, peer_id: str, cipher: str, protocol: str) -> NoReturn:
        """Take an inbound session out, and end libp2p's part."""
        try:
            session = detach(connection, cipher, protocol)
        except NotDetachable as error:
            self._seldom.warn("detach", f"refused a session of {peer_id}: {error}", peer_id)
            raise
        stream = raw_of(connection).stream
        if isinstance(stream, WayStream) and not stream.take(peer_id):
            session.close()
            raise UnknownPeer(f"{peer_id} came to a meeting with somebody else")
        self._handshakes.member_from(raw_of(connection).source)
        try:
            if self._take_session is not None:
                self._take_session(session)
        finally:
            session.close()
        raise HandedOver


def _unlimited_resources() -> ResourceManager:
    return ResourceManager(
        limits=ResourceLimits(max_connections=UNLIMITED, max_streams=UNLIMITED),
        connection_limits=ConnectionLimits(),
        enable_metrics=False,
        enable_memory_limits=False,
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
        enable_rate_limiting=False,
    )
