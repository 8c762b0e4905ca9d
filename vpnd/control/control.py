"""What control does with what it is told: the handlers of `main`'s table.

Decisions are made in `book` and `planner`; here and in `dialer` they are carried out.
"""

from __future__ import annotations

import contextlib
import logging
import random
import secrets
import socket
from collections.abc import Callable

import trio

from vpnd.adapter.handoff import Detached
from vpnd.adapter.host import Host
from vpnd.adapter.logs import Seldom
from vpnd.api import messages, parts
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.config.schema import Config
from vpnd.control.book import SessionBook
from vpnd.control.channels import TrioChannel
from vpnd.control.circuits import Circuits
from vpnd.control.dialer import Dialer
from vpnd.control.discovering import Discovering
from vpnd.control.links import ShardLink, ShardLinks, greeting, news
from vpnd.control.membership import SOURCE, NetworkService
from vpnd.control.owning import Owning
from vpnd.control.planner import Planner
from vpnd.control.requests import Requests
from vpnd.discovery.registry import Change, CompositeRegistry
from vpnd.errors import ProtocolViolation
from vpnd.metrics import CounterPage

log = logging.getLogger(__name__)


class Control:
    """One node's control. Owner: a trio loop, `run`.

    `page` gets its counts. `seldom` logs what others can cause; shared with the host. `network` None: every peer is
    configured by hand. `owning` None: peers have the addresses they claim.
    """

    def __init__(
        self,
        config: Config,
        own_id: str,
        registry: CompositeRegistry,
        page: CounterPage,
        seldom: Seldom,
        now_s: Callable[[], float],
        *,
        network: NetworkService | None = None,
        owning: Owning | None = None,
        now_ms: Callable[[], int],
    ) -> None:
        self._config = config
        self._registry = registry
        self._page = page
        self._now_s = now_s
        self._seldom = seldom
        self._book = SessionBook(secrets.randbits)
        uniform = random.SystemRandom().uniform
        self._planner = Planner(own_id, registry.members(), self._book, config, uniform)
        self._links = ShardLinks()
        self._dialer = Dialer(
            self._planner,
            config,
            keeps_up=self._keeps_up,
            hand_over=self._dialed,
            announce=lambda: self._circuits.announce(),
            count=page.add,
            now_s=now_s,
        )
        self._circuits = Circuits(self._planner, page, self._tell)
        self._network, self._owning = network, owning
        owner = owning.contract.owner if owning is not None else None
        self._discovering: Discovering | None = None
        if network is not None:
            self._discovering = Discovering(
                network,
                config,
                registry,
                unreachable=self._planner.unreachable,
                count=page.add,
                now_ms=now_ms,
                owner=owner,
            )
        self._requests = Requests(
            config,
            network,
            registry,
            connected=self._book.connected,
            listen=lambda: self._host.listen_addresses(),
            ping=lambda *of: self._host.ping(*of),
            now_ms=now_ms,
            lookup=self._discovering.lookup if self._discovering is not None else None,
            owner=owner,
        )
        self._stop = trio.Event()

    async def run(self, host: Host, supervisor: TrioChannel) -> None:
        """Serve until the supervisor says Stop or is gone. `host` must be running."""
        self._host = host
        self._supervisor = supervisor
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._serve_supervisor)
            nursery.start_soon(self._dialer.run, host)
            if self._network is not None:
                nursery.start_soon(self._network.run, host, self.members_changed, self._to_supervisor)
            if self._discovering is not None:
                nursery.start_soon(self._discovering.run, host)
            if self._owning is not None:
                nursery.start_soon(self._owning.run, self._registry, self.members_changed)
            await self._stop.wait()
            nursery.cancel_scope.cancel()
        self._links.close()

    def is_member(self, peer_id: str) -> bool:
        """Whether the host may let that peer in."""
        return self._registry.find(peer_id) is not None

    # --- supervisor

    async def _serve_supervisor(self) -> None:
        try:
            await self._supervisor.run(self._on_supervisor)
        except* ChannelClosed:
            log.info("the supervisor is gone")
        except* ProtocolViolation as group:
            log.error("stopping: %s", group.exceptions[0])
        self._stop.set()

    def _on_supervisor(self, message: messages.Message, descriptors: list[int]) -> None:
        if isinstance(message, messages.Stop):
            self._stop.set()
        elif isinstance(message, messages.ShardArrived):
            self._shard_arrived(message.index, socket.socket(fileno=descriptors.pop()))
        elif isinstance(message, messages.ShardLeft):
            self._shard_left(message.index)
        elif isinstance(message, messages.NetworkChanged):
            self._network_changed(message)
        elif isinstance(message, messages.Reconfigure):
            self._reconfigure(message.config)
        elif isinstance(message, messages.StatusRequest):
            self._tell_status(message.serial)
        elif isinstance(message, messages.NameSockets) and self._discovering is not None:
            self._discovering.names.sockets(message.udp, descriptors)
        elif isinstance(message, messages.Request):
            self._nursery.start_soon(self._carry_out, message)

    def _tell_status(self, serial: int) -> None:
        peers, owning = self._planner.report(self._now_s()), self._owning
        status = messages.ControlStatus(
            serial=serial,
            listen=self._host.listen_addresses(),
            peers=peers if owning is None else owning.annotated(peers),
            connections=self._host.connections(),
            network=self._network.report() if self._network is not None else None,
            warnings=() if owning is None else owning.warnings(),
        )
        for part in parts.split(status):
            self._supervisor.send(part)

    async def _carry_out(self, request: messages.Request) -> None:
        for part in parts.split(await self._requests.carry_out(request)):
            self._to_supervisor(part)

    def _to_supervisor(self, message: messages.Message) -> None:
        if isinstance(message, messages.OwnChanged):
            if self._discovering is not None:
                self._discovering.own_changed(message.own)
            if self._owning is not None:
                self._owning.own_changed(message.own)
        # its end is noticed where it is listened to
        with contextlib.suppress(ChannelClosed):
            self._supervisor.send(message)

    def _network_changed(self, message: messages.NetworkChanged) -> None:
        """Whatever hangs on the network as it was is begun anew. Sessions are looked after by their shards."""
        log.info("the network changed: %s; dialing whoever lacks sessions", message.reason)
        self._page.add("network_changes")
        if self._network is not None:
            self._network.network_changed()
        if self._discovering is not None:
            self._discovering.network_changed()
        self._planner.network_changed()
        self._dialer.cancel(lambda dial: True)
        self._settle()

    def _reconfigure(self, config: Config) -> None:
        self._config = config
        logging.getLogger().setLevel(config.log.level.upper())
        self._seldom.interval_s = config.log.refusal_interval
        self._host.configure(config)
        self._dialer.configure(config)
        self._planner.configure(config)
        if self._network is not None:
            self._network.configure(config)
        self.members_changed(self._registry.replace(config.peers))

    def members_changed(self, change: Change) -> None:
        """The registry has other members than before, and gives other answers already."""
        now_s = self._now_s()
        for member in change.removed:
            log.info("%s is no longer a peer", member.name)
            self._planner.member_removed(member.peer_id)
            self._nursery.start_soon(self._part, member.peer_id)
        for before, after in change.changed:
            # A member says where it is as often as it likes; what the contract says has been logged.
            often = after.source == SOURCE or self._owning is not None
            level = logging.DEBUG if often else logging.INFO
            log.log(level, "peer %s is set otherwise", before.name)
            self._planner.member_changed(after)
        for member in change.added:
            log.info("%s is a peer now", member.name)
            self._planner.member_added(member, now_s)
        if self._discovering is not None:
            self._discovering.members_changed()
        gone = {member.peer_id for member in change.removed}
        moved = {after.peer_id for before, after in change.changed if before.addresses != after.addresses}
        self._dialer.cancel(lambda dial: dial.member.peer_id in gone | moved)
        self._tell(news(change))
        self._circuits.show()
        self._settle()

    async def _part(self, peer_id: str) -> None:
        """Close the connections with who is no peer any more; a neighbour hears first why."""
        if self._network is not None:
            await self._network.farewell(peer_id)
        await self._host.disconnect(peer_id)

    # --- shards, as they come and go

    def _shard_arrived(self, index: int, sock: socket.socket) -> None:
        self._shard_left(index)
        link = ShardLink(index, TrioChannel(Channel(sock, "control", "shard")))
        self._links.add(link)
        self._nursery.start_soon(self._serve_shard, link)

    def _shard_left(self, index: int) -> None:
        """Forget a shard, if it is there: the supervisor says it is gone, or its channel has ended."""
        link = self._links.remove(index)
        if link is not None:
            link.scope.cancel()
            self._book.shard_left(index)
            self._planner.shard_left(index)
            # What they would bring is for a shard that is no more; its successor gets dials of its own.
            self._dialer.cancel(lambda dial: dial.shard == index)
            self._settle()

    def _tell(self, told: list[messages.Message], whom: set[int] | None = None) -> None:
        for index in self._links.tell(told, whom):
            self._shard_left(index)

    def _keeps_up(self, shard: int) -> bool:
        link = self._links.get(shard)
        return link is not None and link.takes_sessions

    # --- shards

    async def _serve_shard(self, link: ShardLink) -> None:
        def handler(message: messages.Message, _: list[int]) -> None:
            self._on_shard(link, message)

        with link.scope:
            governed: tuple[str, ...] = ()
            if self._owning is not None:
                await self._owning.settled()
                governed = self._owning.ownership.governed
            try:
                link.greet(greeting(self._registry.members(), self._planner.circuits(), governed))
                await link.channel.run(handler)
            except* ChannelClosed:
                log.debug("shard %d is gone", link.index)
            except* ProtocolViolation as group:
                log.error("shard %d is cut off: %s", link.index, group.exceptions[0])
        link.channel.close()
        if self._links.current(link):
            self._shard_left(link.index)

    def _on_shard(self, link: ShardLink, message: messages.Message) -> None:
        if not self._links.current(link):
            return  # said before it was replaced
        now_s = self._now_s()
        if isinstance(message, messages.SessionsHeld):
            self._shard_ready(link, message, now_s)
        elif isinstance(message, messages.SessionUp):
            if held := self._book.up(message.session_id, link.index):
                self._planner.session_up(held)
        elif isinstance(message, messages.SessionDown):
            if held := self._book.down(message.session_id, link.index):
                self._planner.session_down(held, message.reason, message.failed, now_s)
        elif isinstance(message, messages.SessionWanted):
            self._planner.wanted(message.peer_id, link.index, message.sessions, message.urgent, now_s)
        elif isinstance(message, messages.OwnerWanted) and self._owning is not None:
            self._owning.wanted(message.address)
        self._settle()

    def _shard_ready(self, link: ShardLink, message: messages.SessionsHeld, now_s: float) -> None:
        for session_id, peer_id, initiator in message.sessions:
            # From before a restart of control; they were up, or the shard would have given them up by now.
            self._book.add(session_id, peer_id, link.index, initiator, now_s, up=True)
        link.ready = True
        self._planner.shard_ready(link.index, now_s)

    # --- sessions

    def take_session(self, detached: Detached) -> None:
        """An inbound session of a member: give it to the shard that needs it most, or to none."""
        peer_id = detached.session.peer_id
        if not self.is_member(peer_id):  # no more, since its handshake
            self._page.add("refused_unknown_peer")
            return
        if not self._room(peer_id):
            self._page.add("refused_session_limit")
            self._seldom.warn("session limit", f"{self._name(peer_id)} wants more sessions than it may have")
            return
        ready = self._links.taking_sessions()
        shard = self._book.shard_for(
            peer_id, {shard: self._planner.wanted_by(peer_id, shard) for shard in ready}
        )
        if shard is not None and self._hand_over(detached, shard):
            self._page.add("sessions_accepted")
            self._tell([messages.PeerDialed(peer_id=peer_id)], self._book.others(peer_id, shard))
        else:
            self._page.add("refused_no_shard")

    def _dialed(self, detached: Detached, shard: int) -> bool:
        """A dial for a shard was answered. False when inbound sessions have taken its place meanwhile, or the shard
        cannot take it."""
        return self._room(detached.session.peer_id) and self._hand_over(detached, shard)

    def _room(self, peer_id: str) -> bool:
        return self._book.count(peer_id) < self._config.p2p.max_sessions_per_peer

    def _hand_over(self, detached: Detached, shard: int) -> bool:
        """Send a session to a shard, which gets a duplicate of the socket. False when it cannot take it."""
        link = self._links.get(shard)
        if link is None or not link.takes_sessions:
            return False
        session_id, session = self._book.new_id(), detached.session
        try:
            message = messages.SessionHandover(session_id=session_id, session=session)
            link.channel.send(message, (detached.fd,))
        except ChannelClosed:
            self._shard_left(shard)
            return False
        self._book.add(session_id, session.peer_id, shard, session.initiator, self._now_s())
        self._planner.session_added(session.peer_id)
        self._settle()
        return True

    # --- what follows from what the planner was told

    def _settle(self) -> None:
        """Act on what has changed. After everything the planner is told."""
        self._circuits.announce()
        self._dialer.replan()

    def _name(self, peer_id: str) -> str:
        member = self._registry.find(peer_id)
        return member.name if member is not None else peer_id
