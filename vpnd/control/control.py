"""Control: what it is made of, and what it does with what the supervisor tells it, the handlers of `main`'s table."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Sequence
from typing import NamedTuple

import trio

from vpnd import logs, why
from vpnd.adapter.host import Host
from vpnd.api import messages, parts
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.control.channels import TrioChannel
from vpnd.control.common import Common
from vpnd.control.discovering import Discovering
from vpnd.control.explaining import Explaining
from vpnd.control.membership import NetworkService
from vpnd.control.owning import Owning
from vpnd.control.reachability import Reachability
from vpnd.control.relaying import Relaying
from vpnd.control.requests import Requests
from vpnd.control.sessions import Sessions
from vpnd.control.traversal import Traversal
from vpnd.discovery.registry import Change, PeerRegistry
from vpnd.errors import ProtocolViolation
from vpnd.metrics import CounterPage, heartbeat_s
from vpnd.nat.messages import MEET, NAT

log = logging.getLogger(__name__)


class Base(NamedTuple):
    """What there is before control is. `nonce`: see vpnd.adapter.router.Router."""

    start: messages.ControlStart
    common: Common
    registry: PeerRegistry
    page: CounterPage
    host: Host
    supervisor: TrioChannel
    nonce: bytes


class Control:
    """One node's control. Owner: a trio loop; `run` once, with what it starts in `nursery`.

    The host must be running. `network` None: every peer is configured by hand. `owning` None: peers have the addresses
    they claim.
    """

    def __init__(
        self, base: Base, nursery: trio.Nursery, network: NetworkService | None, owning: Owning | None
    ) -> None:
        start, common, registry, page, host, supervisor, nonce = base
        self._live, self._registry, self._page = common.live, registry, page
        self._host, self._supervisor, self._nursery = host, supervisor, nursery
        self._network, self._owning = network, owning
        self._relaying = relaying = Relaying(
            common.live, registry, page, common.now_s, lambda: supervisor.tell(messages.RelayWanted())
        )
        host.serve(NAT, relaying.rendezvous.serve_stream, math.inf)
        host.desk.serve(MEET, relaying.rendezvous.serve_leg_untrusted, relaying.rendezvous.takes_guests)
        own = network.own if network is not None else None

        def own_networks() -> Sequence[str]:
            if own is not None:
                return own.addresses(common.now_ms()).subnets
            settings = common.live.config.network
            return (f"{settings.virtual_ip}/{settings.subnet}", *settings.routes)

        self._traversal = Traversal(
            start.peer_id,
            common,
            registry,
            host,
            nursery,
            without=own_networks,
            takes_guests=network.takes_guests if network is not None else lambda peer_id: False,
        )
        self._sessions = sessions = Sessions(start.peer_id, common, registry, page, owning, self._traversal)
        owner = owning.contract.owner if owning is not None else None
        self._discovering = None
        if network is not None:
            self._discovering = Discovering(
                network, common, registry, unreachable=sessions.unreachable, owner=owner
            )
        self._reachability = Reachability(
            common,
            registry,
            host,
            page,
            self._traversal,
            nonce=nonce,
            say_where=network.say_where if network is not None else lambda: None,
            invites=network.invites if network is not None else lambda: False,
        )
        if network is not None:
            network.call_over(self._traversal.relays_at, self._reachability.called_over)
        self._explaining = Explaining(common, registry, host, own, supervisor.tell)
        host.desk.serve(why.PROTOCOL, self._explaining.serve_untrusted)
        self._requests = Requests(
            common,
            network,
            registry,
            host,
            self._explaining,
            reachability=self._reachability,
            connected=sessions.connected,
            lookup=self._discovering.lookup if self._discovering is not None else None,
            owner=owner,
        )
        self._stop, self._retimed = trio.Event(), trio.Event()
        live = common.live
        registry.subscribe(self._members_changed)
        live.watch(lambda config: config.peers, lambda: registry.replace(live.config.peers))
        live.watch(lambda config: config.process.watchdog, lambda: self._retimed.set())
        live.watch(lambda config: config.log.level, lambda: logs.set_level(live.config.log.level))

    async def run(self) -> None:
        """Serve until the supervisor says Stop or is gone; what runs in the nursery is the caller's to end."""
        self._nursery.start_soon(self._serve_supervisor)
        self._nursery.start_soon(self._sessions.run, self._host)
        self._nursery.start_soon(self._traversal.run)
        self._nursery.start_soon(self._reachability.run)
        self._nursery.start_soon(self._beat)
        if self._network is not None:
            self._nursery.start_soon(self._network.run)
        if self._discovering is not None:
            self._nursery.start_soon(self._discovering.run, self._host)
        if self._owning is not None:
            self._nursery.start_soon(self._owning.run)
        await self._stop.wait()

    async def _beat(self) -> None:
        """Show the supervisor's watchdog that this loop runs."""
        while True:
            self._page.beat()
            self._retimed = trio.Event()
            with trio.move_on_after(heartbeat_s(self._live.config.process.watchdog)):
                await self._retimed.wait()

    async def _serve_supervisor(self) -> None:
        try:
            await self._supervisor.run(self._on_supervisor)
        except* ChannelClosed:
            log.info("the supervisor is gone")
        except* ProtocolViolation as group:
            log.error("stopping: %s", group.exceptions[0])
        self._stop.set()

    def _on_supervisor(self, message: messages.Message, descriptors: list[int]) -> None:
        match message:
            case messages.Stop():
                self._stop.set()
            case messages.ShardArrived(index=index):
                link = self._sessions.shard_arrived(index, socket.socket(fileno=descriptors.pop()))
                self._nursery.start_soon(self._sessions.serve_shard, link)
            case messages.ShardLeft(index=index):
                self._sessions.shard_left(index)
            case messages.RelayArrived():
                channel = Channel(socket.socket(fileno=descriptors.pop()), "control", "relay")
                self._nursery.start_soon(self._relaying.serve, channel)
            case messages.NetworkChanged(reason=reason):
                self._network_changed(reason)
            case messages.Reconfigure(config=config):
                self._live.take(config)
                self._sessions.settle()
            case messages.StatusRequest(serial=serial):
                self._tell_status(serial)
            case messages.NameSockets(udp=udp) if self._discovering is not None:
                self._discovering.names.sockets(udp, descriptors)
            case messages.Withheld(routes=routes) if self._network is not None:
                self._network.withhold(routes)
            case messages.WalkTold():
                self._explaining.told(message)
            case messages.Request():
                self._nursery.start_soon(self._carry_out, message)

    def _tell_status(self, serial: int) -> None:
        peers, owning = self._sessions.report(self._host.coming.refused), self._owning
        status = messages.ControlStatus(
            serial=serial,
            listen=self._host.listen_addresses(),
            peers=peers if owning is None else owning.annotated(peers),
            connections=self._host.connections(),
            network=self._network.report() if self._network is not None else None,
            reach=self._reachability.report(),
            warnings=() if owning is None else owning.warnings(),
        )
        for part in parts.split(status):
            self._supervisor.send(part)

    async def _carry_out(self, request: messages.Request) -> None:
        for part in parts.split(await self._requests.carry_out(request)):
            self._supervisor.tell(part)

    # --- what changes

    def _network_changed(self, reason: str) -> None:
        """Whatever hangs on the network as it was is begun anew."""
        log.info("the network changed: %s; dialing whoever lacks sessions", reason)
        self._page.add("network_changes")
        if self._network is not None:
            self._network.network_changed()
        if self._discovering is not None:
            self._discovering.network_changed()
        self._sessions.network_changed()
        self._traversal.network_changed()
        self._reachability.network_changed()

    def _members_changed(self, change: Change) -> None:
        self._traversal.members_changed()
        self._reachability.members_changed()
        self._relaying.members_changed()
        for member in change.removed:
            self._nursery.start_soon(self._part, member.peer_id)

    async def _part(self, peer_id: str) -> None:
        """Close the connections with who is no peer any more; a neighbour hears first why."""
        if self._network is not None:
            await self._network.farewell(peer_id)
        await self._host.disconnect(peer_id)
