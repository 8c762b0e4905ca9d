"""Data sessions with peers: planned, dialed or accepted, and given to the shards, which say what becomes of them.

Decisions are made in `book` and `planner`; here and in `dialer` they are carried out.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections import defaultdict
from collections.abc import Callable

import trio
from msgspec.structs import replace

from vpnd.adapter.handoff import Detached
from vpnd.adapter.host import Host
from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.api.reports import PeerReport
from vpnd.control.book import Held, SessionBook
from vpnd.control.channels import ShardLink, TrioChannel, greeting, news, tell
from vpnd.control.common import Common
from vpnd.control.dialer import Dialer
from vpnd.control.dialstate import CircuitChange
from vpnd.control.membership import SOURCE
from vpnd.control.owning import Owning
from vpnd.control.planner import Planner
from vpnd.control.segments import Segments
from vpnd.control.traversal import Traversal
from vpnd.discovery.registry import Change, Member, PeerRegistry
from vpnd.errors import ProtocolViolation
from vpnd.metrics import CounterPage
from vpnd.nat.paths import DIRECT, PUNCHED, RELAYED
from vpnd.printable import span
from vpnd.resilience import Circuit

log = logging.getLogger(__name__)


class Sessions:
    """Owner: control's trio loop; `run` once.

    `page` gets the counts. `seldom` logs what others can cause. `owning` None: peers have the addresses they claim.
    """

    def __init__(
        self,
        own_id: str,
        common: Common,
        registry: PeerRegistry,
        page: CounterPage,
        owning: Owning | None,
        traversal: Traversal,
    ) -> None:
        self._registry, self._page, self._owning = registry, page, owning
        self._live, self._seldom, self._now_s = common.live, common.seldom, common.now_s
        self._book = SessionBook(secrets.randbits)
        uniform = common.dice.uniform
        self._planner = Planner(
            own_id,
            registry.members(),
            self._book,
            self._live,
            uniform,
            traversal.can_meet,
            traversal.dials_at_once,
        )
        self._links: dict[int, ShardLink] = {}  # by index of the shard
        self._segments = Segments(self._live, self._now_s)
        self._dialer = Dialer(
            self._planner,
            self._live,
            traversal,
            count=page.add,
            measured=page.measured,
            now_s=self._now_s,
            small=self._segments.small,
        )
        self._show_circuits()
        traversal.subscribe(self._relays_changed)
        traversal.on_chance(lambda: self._dialer.begin_anew(both=True))
        registry.subscribe(self._members_changed)

    async def run(self, host: Host) -> None:
        """Take what comes in, and dial, until cancelled."""
        host.take_sessions(self._take)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._segments.run, host, self)
            await self._dialer.run(host, self)

    def report(self, refused: Callable[[str], int]) -> tuple[PeerReport, ...]:
        """`refused`: how many handshakes of a peer were."""
        paths: defaultdict[str, list[str]] = defaultdict(list)
        for held in self._book.sessions():
            paths[held.peer_id].append(self._path(held))
        reports = self._planner.report(self._now_s())
        return tuple(
            replace(report, paths=tuple(paths[report.peer_id]), refused=refused(report.peer_id))
            for report in reports
        )

    def _path(self, held: Held) -> str:
        """How a session reaches its peer; for one that is relayed, what comes next."""
        path = held.path
        if path.kind != RELAYED:
            return f"direct {path.address}" + (" (punched)" if path.kind == PUNCHED else "")
        via = f"relayed via {self._name(path.relay)}"
        improving = self._dialer.improving(held.peer_id, held.shard) if held.initiator else None
        if improving is None:
            return via
        wait = span(max(0.0, improving.next_s - self._now_s()))
        if not improving.tries:
            return f"{via} (next punch in {wait})"
        times = "once" if improving.tries == 1 else f"{improving.tries} times"
        return f"{via} (punch failed {times}: {improving.why}; next try in {wait})"

    def unreachable(self) -> list[str]:
        """Peer ids of those without a session that could not be dialed, or whose addresses nobody knows."""
        return self._planner.unreachable()

    def connected(self, peer_id: str) -> bool:
        """Whether packets flow in at least one session with the peer."""
        return self._book.connected(peer_id)

    # --- peers

    def _members_changed(self, change: Change) -> None:
        now_s = self._now_s()
        for member in change.removed:
            log.info("%s is no longer a peer", member.name)
            self._planner.member_removed(member.peer_id)
        for before, after in change.changed:
            # A member says where it is as often as it likes; what the contract says has been logged.
            often = after.source == SOURCE or self._owning is not None
            level = logging.DEBUG if often else logging.INFO
            log.log(level, "peer %s has other settings now", before.name)
            self._planner.member_changed(after)
            if after.addresses != before.addresses:
                for shard in self._links:
                    self._dialer.found(after.peer_id, shard, news=True)
        for member in change.added:
            log.info("%s is a peer now", member.name)
            self._planner.member_added(member, now_s)
        self._tell(news(change))
        self._show_circuits()
        self.settle()

    def network_changed(self) -> None:
        """The machine has other addresses or routes: dialing begins anew. Sessions are looked after by their shards."""
        self._planner.network_changed()
        self._segments.network_changed()
        self._dialer.begin_anew(both=True)
        self.settle()

    def _relays_changed(self) -> None:
        """There is another way to peers that cannot be dialed."""
        self._planner.relays_changed()
        self._dialer.begin_anew()
        self.settle()

    def settle(self) -> None:
        """Act on what has changed. After everything the planner is told."""
        self.announce()
        self._dialer.replan()

    # --- shards, as they come and go

    def shard_arrived(self, index: int, sock: socket.socket) -> ShardLink:
        """A shard has come, perhaps again. Serve what is returned."""
        self.shard_left(index)
        link = ShardLink(index, TrioChannel(Channel(sock, "control", "shard")))
        self._links[index] = link
        return link

    async def serve_shard(self, link: ShardLink) -> None:
        """A shard, until it has left."""

        def handler(message: messages.Message, _: list[int]) -> None:
            self._on_shard(link, message)

        try:
            with link.scope:
                governed: tuple[str, ...] = ()
                if self._owning is not None:
                    await self._owning.settled()
                    governed = self._owning.ownership.governed
                link.greet(greeting(self._registry.members(), self._planner.circuits(), governed))
                await link.channel.run(handler)
        except* ChannelClosed:
            log.debug("shard %d is gone", link.index)
        except* ProtocolViolation as group:
            log.error("shard %d is cut off: %s", link.index, group.exceptions[0])
        finally:
            link.channel.close()
        if self._links.get(link.index) is link:
            self.shard_left(link.index)

    def shard_left(self, index: int) -> None:
        """Forget a shard, if it is there: the supervisor says it is gone, or its channel has ended."""
        link = self._links.pop(index, None)
        if link is not None:
            link.scope.cancel()
            self._book.shard_left(index)
            self._planner.shard_left(index, self._now_s())
            self.settle()

    def _tell(self, told: list[messages.Message], whom: set[int] | None = None) -> None:
        links = [link for index, link in self._links.items() if whom is None or index in whom]
        for index in tell(links, told):
            self.shard_left(index)

    def _on_shard(self, link: ShardLink, message: messages.Message) -> None:
        if self._links.get(link.index) is not link:
            return  # said before it was replaced
        now_s = self._now_s()
        match message:
            case messages.SessionsHeld():
                self._shard_ready(link, message, now_s)
            case messages.SessionUp(session_id=session_id):
                if held := self._book.up(session_id, link.index):
                    self._segments.over(session_id, up=True)
                    self._planner.session_up(held)
            case messages.SessionDown(session_id=session_id, reason=reason, failed=failed):
                if held := self._book.down(session_id, link.index):
                    if self._segments.over(session_id, up=False):  # says nothing about the peer
                        self._planner.session_added(held.peer_id)
                    else:
                        self._planner.session_down(held, reason, failed, now_s)
                        if failed:
                            self._doubt(held.peer_id, link.index)
            case messages.SessionWanted(peer_id=peer_id, sessions=sessions, urgent=urgent):
                self._planner.wanted(peer_id, link.index, sessions, urgent, now_s)
            case messages.SessionsDoubted(peer_id=peer_id):
                self._doubt(peer_id, link.index)
            case messages.SegmentsStuck(peer_id=peer_id):
                self._segments.stuck(peer_id, self._name(peer_id))
            case messages.OwnerWanted(address=address) if self._owning is not None:
                self._owning.wanted(address)
        self.settle()

    def _shard_ready(self, link: ShardLink, message: messages.SessionsHeld, now_s: float) -> None:
        for held in message.sessions:
            # From before a restart of control; they were up, or the shard would have given them up by now.
            mine = Held(
                held.session_id, held.peer_id, link.index, held.initiator, now_s, up=True, path=held.path
            )
            self._book.add(mine)
            self._dialer.found(held.peer_id, link.index)
        link.ready = True
        self._planner.shard_ready(link.index, now_s)

    # --- sessions

    def _take(self, detached: Detached) -> None:
        """An inbound session of a member: give it to the shard that needs it most, or to none."""
        peer_id = detached.session.peer_id
        if self._registry.find(peer_id) is None:  # a member no more, since its handshake
            self._page.add("refused_unknown_peer")
            return
        if not self._room(peer_id):
            self._page.add("refused_session_limit")
            self._seldom.warn(
                "session limit", f"{self._name(peer_id)} wants more sessions than it may have", peer_id
            )
            return
        ready = [index for index, link in self._links.items() if link.takes_sessions]
        shard = self._book.shard_for(
            peer_id,
            {shard: self._planner.wanted_by(peer_id, shard) for shard in ready},
            detached.session.path,
        )
        if shard is not None and self._hand_over(detached, shard):
            self._page.add("sessions_accepted")
            self._dialer.found(peer_id, shard)
            self._doubt(peer_id, shard)
        else:
            self._page.add("refused_no_shard")

    def _doubt(self, peer_id: str, shard: int) -> None:
        """What a shard has learned is news to the others."""
        self._tell([messages.SessionsDoubted(peer_id=peer_id)], self._book.others(peer_id, shard))

    def keeps_up(self, shard: int) -> bool:
        link = self._links.get(shard)
        return link is not None and link.takes_sessions

    def dialed(self, detached: Detached, shard: int) -> int:
        """See dialer.Taker. 0 when inbound sessions have taken its place meanwhile, or the shard cannot take it."""
        return self._hand_over(detached, shard) if self._room(detached.session.peer_id) else 0

    def dialed_directly(self, peer_id: str, since_s: float) -> tuple[Member | None, set[int]]:
        """See segments.Taker."""
        held = [held for held in self._book.of_peer(peer_id) if held.since_s >= since_s]
        shards = {each.shard for each in held if each.up and each.initiator and each.path.kind == DIRECT}
        return self._registry.find(peer_id), {shard for shard in shards if self.keeps_up(shard)}

    def best(self, peer_id: str, shard: int) -> Held | None:
        """See dialer.Taker."""
        return self._book.best(peer_id, shard)

    def _room(self, peer_id: str) -> bool:
        return self._book.count(peer_id) < self._live.config.p2p.max_sessions_per_peer

    def _hand_over(self, detached: Detached, shard: int) -> int:
        """Send a session to a shard, which gets a duplicate of the socket: its id; 0 when it cannot take it."""
        link = self._links.get(shard)
        if link is None or not link.takes_sessions:
            return 0
        session_id, session = self._book.new_id(), detached.session
        try:
            message = messages.SessionHandover(session_id=session_id, session=session)
            link.channel.send(message, (detached.fd,))
        except ChannelClosed:
            self.shard_left(shard)
            return 0
        since_s, path = self._now_s(), session.path
        self._book.add(Held(session_id, session.peer_id, shard, session.initiator, since_s, path=path))
        self._planner.session_added(session.peer_id)
        self.settle()
        return session_id

    def _name(self, peer_id: str) -> str:
        member = self._registry.find(peer_id)
        return member.name if member is not None else peer_id

    # --- circuits

    def announce(self) -> None:
        """Say which circuits have changed: in the log, in the counters, to the shards."""
        changes = self._planner.take_circuit_changes()
        for change in changes:
            self._circuit_changed(change)
        if changes:
            self._show_circuits()
            self._tell(
                [messages.PeerCircuit(peer_id=change.member.peer_id, state=change.new) for change in changes]
            )

    def _circuit_changed(self, change: CircuitChange) -> None:
        # From probe to probe of a peer that stays away nothing is new.
        level = logging.INFO if Circuit.CLOSED in (change.old, change.new) else logging.DEBUG
        why = f": {change.why}" if change.why else ""
        log.log(level, "the circuit of %s is %s%s", change.member.name, change.new, why)
        if change.old is Circuit.CLOSED:
            self._page.add("circuits_opened")
        elif change.new is Circuit.CLOSED:
            self._page.add("circuits_closed")

    def _show_circuits(self) -> None:
        states = list(self._planner.circuits().values())
        self._page.set("circuits_open", states.count(Circuit.OPEN))
        self._page.set("circuits_half_open", states.count(Circuit.HALF_OPEN))
