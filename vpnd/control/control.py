"""What control does with what it is told: the handlers of `main`'s table, and the dials.

Decisions are made in `book` and `planner`; here they are carried out.
"""

from __future__ import annotations

import logging
import random
import secrets
import socket
from collections.abc import Callable

import trio

from vpnd.adapter.dial import DialError, dial_any
from vpnd.adapter.handoff import Detached
from vpnd.adapter.host import Host
from vpnd.adapter.logs import Seldom
from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.config.schema import Config
from vpnd.control.book import SessionBook
from vpnd.control.channels import TrioChannel
from vpnd.control.planner import NEVER, Planner
from vpnd.discovery.registry import Member, Registry
from vpnd.errors import ProtocolViolation
from vpnd.resilience import Backoff

log = logging.getLogger(__name__)


class ShardLink:
    """Control's side of one shard. `ready`: it has told what it holds and takes sessions."""

    def __init__(self, index: int, channel: TrioChannel) -> None:
        self.index = index
        self.channel = channel
        self.ready = False
        self.scope = trio.CancelScope()

    @property
    def takes_sessions(self) -> bool:
        """False also while the shard does not read what it was sent."""
        return self.ready and not self.channel.backlog


class Control:
    """One node's control. `count` adds one to a counter of vpnd.metrics. Owner: a trio loop, `run`."""

    def __init__(
        self,
        config: Config,
        own_id: str,
        registry: Registry,
        count: Callable[[str], None],
        now_s: Callable[[], float],
    ) -> None:
        self._config = config
        self._registry = registry
        self._count = count
        self._now_s = now_s
        self._seldom = Seldom(log, config.log.refusal_interval, now_s)
        self._book = SessionBook(secrets.randbits)
        uniform = random.SystemRandom().uniform
        retry = config.retry
        self._planner = Planner(
            own_id,
            registry.members(),
            self._book,
            lambda: Backoff(retry.initial_interval, retry.max_interval, retry.multiplier, uniform),
            dial_stagger_s=config.p2p.dial_stagger,
            min_interval_s=retry.initial_interval,
        )
        self._links: dict[int, ShardLink] = {}
        self._changed = trio.Event()
        self._stop = trio.Event()

    async def run(self, host: Host, supervisor: TrioChannel) -> None:
        """Serve until the supervisor says Stop or is gone. `host` must be running."""
        self._host = host
        self._supervisor = supervisor
        self._dial_slots = trio.CapacityLimiter(self._config.p2p.max_dials)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._serve_supervisor)
            nursery.start_soon(self._run_dials)
            await self._stop.wait()
            nursery.cancel_scope.cancel()
        for link in list(self._links.values()):
            link.channel.close()

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

    def _on_supervisor(self, message: messages.Any, descriptors: list[int]) -> None:
        if isinstance(message, messages.Stop):
            self._stop.set()
        elif isinstance(message, messages.ShardArrived):
            if len(descriptors) != 1:
                raise ProtocolViolation(f"ShardArrived with {len(descriptors)} descriptors")
            self._shard_arrived(message.index, socket.socket(fileno=descriptors.pop()))
        elif isinstance(message, messages.ShardLeft):
            self._shard_left(message.index)
        elif isinstance(message, messages.StatusRequest):
            self._supervisor.send(
                messages.ControlStatus(
                    serial=message.serial,
                    listen=self._host.listen_addresses(),
                    peers=self._planner.report(self._now_s()),
                    connections=self._host.connections(),
                )
            )
        else:
            raise ProtocolViolation(f"{type(message).__name__} came a second time")

    def _shard_arrived(self, index: int, sock: socket.socket) -> None:
        self._shard_left(index)
        link = ShardLink(index, TrioChannel(Channel(sock, "control", "shard")))
        self._links[index] = link
        self._nursery.start_soon(self._serve_shard, link)
        try:
            for member in self._registry.members():
                link.channel.send(
                    messages.PeerKnown(peer_id=member.peer_id, name=member.name, prefixes=member.prefixes)
                )
            link.channel.send(messages.PeersComplete())
        except ChannelClosed:
            self._shard_left(index)

    def _shard_left(self, index: int) -> None:
        """Forget a shard, if it is there: the supervisor says it is gone, or its channel has ended."""
        link = self._links.pop(index, None)
        if link is not None:
            link.scope.cancel()
            self._book.shard_left(index)
            self._planner.shard_left(index)
            self._replan()

    # --- shards

    async def _serve_shard(self, link: ShardLink) -> None:
        def handler(message: messages.Any, _: list[int]) -> None:
            self._on_shard(link, message)

        with link.scope:
            try:
                await link.channel.run(handler)
            except* ChannelClosed:
                log.debug("shard %d is gone", link.index)
            except* ProtocolViolation as group:
                log.error("shard %d is cut off: %s", link.index, group.exceptions[0])
        link.channel.close()
        if self._links.get(link.index) is link:
            self._shard_left(link.index)

    def _on_shard(self, link: ShardLink, message: messages.Any) -> None:
        if self._links.get(link.index) is not link:
            return  # said before it was replaced
        now_s = self._now_s()
        if isinstance(message, messages.SessionsHeld):
            if link.ready:
                raise ProtocolViolation("SessionsHeld came a second time")
            self._shard_ready(link, message, now_s)
        elif not link.ready:
            raise ProtocolViolation(f"{type(message).__name__} came before SessionsHeld")
        elif isinstance(message, messages.SessionUp):
            if held := self._book.up(message.session_id, link.index):
                self._planner.session_up(held.peer_id)
        elif isinstance(message, messages.SessionDown):
            if held := self._book.down(message.session_id, link.index):
                self._planner.session_down(held, message.reason, now_s)
        elif isinstance(message, messages.SessionWanted):
            self._planner.wanted(message.peer_id, now_s)
        self._replan()

    def _shard_ready(self, link: ShardLink, message: messages.SessionsHeld, now_s: float) -> None:
        for session_id, peer_id, initiator in message.sessions:
            # From before a restart of control; they were up, or the shard would have given them up by now.
            self._book.add(session_id, peer_id, link.index, initiator, up=True)
        link.ready = True
        self._planner.shard_ready(link.index, now_s)

    # --- sessions

    def take_session(self, session: Detached) -> None:
        """An inbound session of a member: give it to the shard that needs it most, or to none."""
        peer_id = session.peer_id
        if self._book.count(peer_id) >= self._config.p2p.max_sessions_per_peer:
            self._count("refused_session_limit")
            self._seldom.warn("session limit", f"{self._name(peer_id)} wants more sessions than it may have")
            return
        ready = [index for index, link in self._links.items() if link.takes_sessions]
        shard = self._book.shard_for(peer_id, ready)
        if shard is not None and self._hand_over(session, shard):
            self._count("sessions_accepted")
        else:
            self._count("refused_no_shard")

    def _hand_over(self, session: Detached, shard: int) -> bool:
        """Send a session to a shard, which gets a duplicate of the socket. False when it cannot take it."""
        link = self._links.get(shard)
        if link is None or not link.takes_sessions:
            return False
        session_id = self._book.new_id()
        message = messages.SessionHandover(
            session_id=session_id,
            peer_id=session.peer_id,
            initiator=session.initiator,
            cipher=session.cipher,
            send_key=session.send_key,
            send_nonce=session.send_nonce,
            receive_key=session.receive_key,
            receive_nonce=session.receive_nonce,
            leftover=session.leftover,
        )
        try:
            link.channel.send(message, (session.fd,))
        except ChannelClosed:
            self._shard_left(shard)
            return False
        self._book.add(session_id, session.peer_id, shard, session.initiator)
        self._planner.session_added(session.peer_id)
        self._replan()
        return True

    # --- dials

    def _replan(self) -> None:
        self._changed.set()

    async def _run_dials(self) -> None:
        while True:
            self._changed = trio.Event()
            for member, shard in self._planner.take_due(self._now_s()):
                self._nursery.start_soon(self._dial, member, shard)
            wait_s = self._planner.next_due_s() - self._now_s()
            with trio.move_on_after(max(0.0, wait_s) if wait_s < NEVER else NEVER):
                await self._changed.wait()

    async def _dial(self, member: Member, shard: int) -> None:
        """One dial, from plan to session or failure. Whatever goes wrong stays in here."""
        peer_id = member.peer_id
        error = ""
        try:
            async with self._dial_slots:
                link = self._links.get(shard)
                if link is not None and not link.takes_sessions:
                    raise DialError(f"shard {shard} does not keep up with its messages")
                self._count("dials")
                session = await dial_any(
                    lambda address: self._host.dial(address, peer_id),
                    member.addresses,
                    self._config.p2p.address_stagger,
                )
            try:
                # A shard that has left meanwhile is nobody's failure: its successor gets a dial of its own.
                if self._hand_over(session, shard):
                    self._count("sessions_dialed")
            finally:
                session.close()
        except DialError as failure:
            error = str(failure)
        except Exception as failure:
            log.exception("dialing %s failed in an unforeseen way", member.name)
            error = f"{type(failure).__name__}: {failure}"
        if error:
            self._count("dial_failures")
        if self._planner.dial_ended(peer_id, shard, error, self._now_s()):
            log.info("no session with %s: %s", member.name, error)
        self._replan()

    def _name(self, peer_id: str) -> str:
        member = self._registry.find(peer_id)
        return member.name if member is not None else peer_id
