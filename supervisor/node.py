"""The supervisor: the only process with root's rights, and the one that everything else of a node hangs on.

    talks to      over                            what comes, and who serves it
    ------------  ------------------------------  --------------------------------------------------------
    kernel        TUN descriptor                  Pump.read_tun
    kernel        netlink                         Watch
    shards        channel                         Child (Ready, Failed), Fleet (ShardStatus, ProbeAnswer)
    control       channel                         Child (Ready, Failed), Fleet (ControlStatus, Answer);
                                                  Node: OwnChanged, RoutesKnown
    commands      status socket                   StatusServer: status, stop, reload, scale, probe; requests: invite …
    Prometheus    HTTP, if metrics.listen is set  Exporter

Rights kept: the TUN descriptor (it moves the packets), CAP_NET_ADMIN (it takes its addresses and routes
back), root's signals (it kills and restarts children of another user). It parses nothing that comes from
the network: records are checked by the shards.

Start order: what may be refused without a trace first (lock, overlap), then device, children, addresses and
routes, last the line that says it works. Stop is the reverse. A failing start takes back what it did. A member of
a network learns its addresses from control, so they come after the children either way; a network that was made
or joined stays even if what comes after it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

from supervisor import probing, report, requests, statedir
from supervisor.fleet import Argument, Fleet
from supervisor.network import announced, policy
from supervisor.network.announced import AnnouncedRoutes
from supervisor.network.names import Names
from supervisor.network.tun import Tun
from supervisor.network.watch import Watch
from supervisor.overlay import Overlay
from supervisor.pacing import Pacing
from supervisor.pump import Pump
from supervisor.statusd import StatusServer
from vpnd.api import messages
from vpnd.api.reports import OwnAddresses
from vpnd.config import changes, fields, load
from vpnd.config.schema import Config
from vpnd.errors import ChildError, ConfigError, VpndError
from vpnd.identity import Identity
from vpnd.mode import Mode
from vpnd.packet.capability import Offload
from vpnd.packet.offload import UdpCoalescer
from vpnd.packet.ring import RingBroken

log = logging.getLogger("supervisor")

#: Why a node ends that does what it was told.
STOPPED = "stopped by command"
LEFT = "left the network by command"


class Node:
    """One running node. Owner: the loop it was started on. `start`, then `stop`, once each.

    `config` is complete: node.name, and of a static node network.virtual_ip, are filled in (vpnd.config.load.complete).
    `mode` is how it knows its peers, `token` what it joins a network with, if it is new in it. `reread` gives the
    configuration to change to at the command `reload`, complete as well, or raises VpndError; `reloaded` is told every
    configuration that came into force. `alone`: see Pacing.
    """

    def __init__(
        self,
        config: Config,
        mode: Mode,
        token: str,
        identity: Identity,
        reread: Callable[[], Config],
        reloaded: Callable[[Config], None],
        *,
        alone: bool,
    ) -> None:
        self._config, self._mode, self._token, self._identity = config, mode, token, identity
        self._reread, self._reloaded = reread, reloaded
        self._alone = alone
        self.name = config.node.name
        self._overlay = Overlay(config, mode, joining=bool(token))
        self._names: Names | None = None
        self._announced: AnnouncedRoutes | None = None
        self._known = messages.RoutesKnown(routes=())
        self._last_told: messages.ControlStatus | None = None
        self.stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._undo = contextlib.AsyncExitStack()
        self._started_s = time.monotonic()
        self._process = psutil.Process()
        self._ready = False

    async def start(self) -> None:
        """Bring everything up. Raises a VpndError; nothing is left on the machine then."""
        try:
            await self._start()
        except BaseException:
            await self._undo.aclose()
            raise

    async def _start(self) -> None:
        config, network = self._config, self._config.network
        self._undo.callback(os.close, statedir.lock(config))
        self._overlay.check_before()
        # Below this line the machine is changed.
        self.tun = Tun.open(network.interface, network.mtu, network.offloads)
        self._undo.callback(self.tun.close)
        merging = network.coalesce_udp and Offload.USO4 in self.tun.offloads
        self._pump = Pump(self.tun.fd, config, UdpCoalescer() if merging else None)
        self._fleet = self._make_fleet()
        self._undo.callback(self._fleet.close)
        self._server = StatusServer(
            str(self.path(config.status.socket)),
            config.status.timeout,
            {
                "status": lambda _: self.status(),
                "stop": lambda _: self._on_stop(),
                "reload": lambda _: self.reload_again(),
                "scale": self._on_scale,
                "probe": self._on_probe,
                **requests.handlers(self, config.status.timeout),
            },
            policy.cleanup_commands(network.route_table, network.rule_priority),
        )
        self._undo.push_async_callback(self._server.stop)
        await self._server.start()
        self._undo.push_async_callback(self._fleet.stop)
        await self._fleet.start()
        self._watch = Watch(self.tun.name, network, self._network_changed)
        self._undo.callback(self._watch.close)
        self._undo.callback(self._overlay.undo)
        self._establish()
        self._pacing = Pacing(config.process, alone=self._alone)
        self._undo.callback(self._pacing.end)
        self._loop.add_reader(self.tun.fd, self._read_tun)
        self._undo.callback(self._loop.remove_reader, self.tun.fd)
        self._age_flows()
        if config.metrics.listen:
            from supervisor.export import Exporter  # 44 ms of start-up that only those pay who want it

            exporter = Exporter(config.metrics.listen, self.counters)
            self._undo.callback(exporter.close)
        self._ready = True

    def path(self, name: str) -> Path:
        """A path of the configuration: relative ones are in the state directory."""
        return Path(self._config.state_dir, name)

    def _make_fleet(self) -> Fleet:
        config = self._config
        identity_fd = os.open(self.path(config.p2p.identity_file), os.O_RDONLY | os.O_CLOEXEC)
        self._undo.callback(os.close, identity_fd)
        network_fd = None
        if self.in_network:
            network_fd = statedir.open_network(config)
            self._undo.callback(os.close, network_fd)
        start = messages.ControlStart(
            config=config,
            node_name=self.name,
            peer_id=self._identity.peer_id,
            virtual_ip="" if self.in_network else config.network.virtual_ip,
            token=self._token,
        )
        own = self._overlay.prefixes
        return Fleet(config, start, identity_fd, network_fd, own, self.tun, self._pump, self)

    # --- what the node is in the VPN

    @property
    def in_network(self) -> bool:
        """Whether it is a member of a network; otherwise its peers are configured."""
        return self._mode.in_network

    def _establish(self) -> None:
        """Control and shards are up: put addresses and routes on the device."""
        own = self._fleet.control.own
        if self.in_network and own is None:
            raise ChildError("control does not say what this node is in its network")
        self._overlay.establish(self.tun.name, own)
        self._fleet.set_own(self._overlay.prefixes)
        if self.in_network:
            self._names = Names(self.tun.name, self._config.dns)
            self._undo.push_async_callback(self._names.close)
            self._announced = announced.open_for(self.tun.name, self._config)
            self._undo.push_async_callback(self._announced.close)
            self._announced.apply(self._known)
            self._tell_names()

    def _tell_names(self) -> None:
        """Control answers DNS on our addresses."""
        if self._names is not None:
            self._names.apply(self._overlay.own)
            self._names.give(self._fleet.control.send)
        if self._announced is not None:
            self._announced.advertise(self._overlay.own.advertised)

    def control_up(self, own: OwnAddresses | None) -> None:
        """See ControlListener. The first time the rest is not there yet, which `_establish` waits for."""
        if self._ready and own is not None:
            self.own_changed(own)

    def own_changed(self, own: OwnAddresses) -> None:
        """See ControlListener."""
        if self._ready:
            self._overlay.change(own)
            self._fleet.set_own(self._overlay.prefixes)
            self._tell_names()

    def routes_known(self, known: messages.RoutesKnown) -> None:
        """See ControlListener."""
        self._known = known
        if self._announced is not None:
            self._announced.apply(known)

    async def request(self, command: str, arguments: dict[str, Argument], timeout_s: float) -> bytes:
        """See requests.Asked."""
        return await self._fleet.request(command, arguments, timeout_s)

    def left(self) -> None:
        """See requests.Asked: control has forgotten the network, so there is nothing to run for."""
        self._end(LEFT)

    # --- packets

    def _read_tun(self) -> None:
        try:
            self._pacing.after_read(self._pump.read_tun())
        except RingBroken as error:
            self._fleet.kill_broken(str(error))
        except OSError as error:
            self._end(f"{self.tun.name}: {error.strerror}")

    def _age_flows(self) -> None:
        if not self.stopped.done():
            self._pump.flows.age()
            self._aging = self._loop.call_later(self._config.worker.idle_timeout, self._age_flows)

    # --- changes

    async def reload_again(self) -> dict[str, Any]:
        """Read the configuration again and take over what can be; see `reload`."""
        return await self.reload(self._reread())

    async def reload(self, wanted: Config) -> dict[str, Any]:
        """Take over what vpnd.config.changes allows of a complete configuration; what happened, ready for JSON.

        Raises ConfigError, and nothing is changed, when it does not go together with what stays as it is.
        """
        if not self._ready:
            raise VpndError("the node is not running; try again when it is ready")
        shards = self._config.worker.shards
        change = changes.compare(_with_shards(self._config, self._fleet.scaled_to or shards), wanted)
        config = _with_shards(change.config, shards)
        try:
            # Our own name and address are what they were: only their company is judged.
            load.complete(config, self._identity.peer_id, self.name, in_network=self.in_network)
        except ConfigError as error:
            kept = ", ".join(difference.key for difference in change.needs_restart)
            raise ConfigError(
                f"{error}\nthis holds while the node is not restarted with its new {kept}"
            ) from None
        self._take_over(config)
        log.info(
            "reloaded: %d settings changed, %d peers added, %d removed, %d settings need a restart",
            len(change.applied), len(change.peers_added), len(change.peers_removed), len(change.needs_restart),
        )  # fmt: skip
        return {
            "applied": [_difference(each) for each in change.applied],
            "needs_restart": [{**_difference(each), "remedy": each.remedy} for each in change.needs_restart],
            "peers_added": [{"name": peer.name, "peer_id": peer.peer_id} for peer in change.peers_added],
            "peers_removed": [{"name": peer.name, "peer_id": peer.peer_id} for peer in change.peers_removed],
        }

    def _take_over(self, config: Config) -> None:
        if config == self._config:
            return
        before, self._config = self._config, config
        if config.worker.idle_timeout != before.worker.idle_timeout:
            self._aging.cancel()
            self._aging = self._loop.call_later(config.worker.idle_timeout, self._age_flows)
        self._pump.flows.most = config.worker.max_flows
        self._pacing.configure(config.process)
        self._server.timeout_s = config.status.timeout
        self._watch.configure(config.network)
        self._overlay.configure(config)
        self._fleet.reconfigure(config)
        self._reloaded(config)

    async def _on_scale(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return await self.scale(request.get("shards"))

    async def scale(self, shards: object) -> dict[str, Any]:
        """Change the number of shards, and return when it is done; see Fleet.scale. Raises VpndError."""
        limits = fields.tables()["worker"]["shards"]
        if type(shards) is not int or not 1 <= shards <= limits.most_value:
            raise ConfigError(f"shards = {shards}: must be a number from 1 to {limits.most_value:g}")
        if not self._ready:
            raise VpndError("the node is not running; try again when it is ready")
        return await self._fleet.scale(shards)

    def _network_changed(self, reason: str, addresses: tuple[str, ...]) -> None:
        log.info("the network changed: %s", reason)
        if self._announced is not None:
            self._announced.look_again()
        self._fleet.broadcast(messages.NetworkChanged(reason=reason, addresses=addresses))

    # --- status and end

    async def status(self) -> dict[str, Any]:
        """The status report; see supervisor.report. A child that does not answer within half of status.timeout is
        reported without what only it knows."""
        patience_s = self._config.status.timeout / 2
        present = self._fleet.present
        children = (self._fleet.control, *(shard for _, shard in present))
        control, *shards = await asyncio.gather(*(self._fleet.ask(child, patience_s) for child in children))
        told = {slot.index: status for (slot, _), status in zip(present, shards, strict=True)}
        self._last_told = control or self._last_told
        return self._report(control, told)

    def counters(self) -> dict[str, Any]:
        """The report without asking anybody: counters only."""
        return self._report(None, {})

    def _report(
        self, control: messages.ControlStatus | None, shards: Mapping[int, messages.ShardStatus | None]
    ) -> dict[str, Any]:
        overlay = self._overlay
        parts = (part for part in (self._names, self._announced) if part is not None)
        told = control or self._last_told
        result = report.build(
            node={
                "name": self.name,
                "peer_id": self._identity.peer_id,
                "mode": "network" if self.in_network else "static",
                "virtual_ip": overlay.virtual_ip,
                "addresses": overlay.own.addresses,
                "subnet": overlay.subnet,
                "shards": self._fleet.count,
                "uptime_s": time.monotonic() - self._started_s,
                "warnings": [
                    *overlay.warnings,
                    *self._fleet.priorities.warnings,
                    *(line for part in parts for line in part.warnings),
                    *(told.warnings if told is not None else ()),
                ],
            },
            supervisor={
                "pid": os.getpid(),
                "cpu_percent": self._process.cpu_percent(),
                "rss_bytes": self._process.memory_info().rss,
            },
            config=self._config,
            tun=self.tun,
            pump=self._pump,
            fleet=self._fleet,
            own=overlay.own,
            control_status=control,
            last_told=self._last_told,
            shard_statuses=shards,
        )
        result["ready"] = result["ready"] and self._ready
        return result

    async def _on_probe(self, request: Mapping[str, Any]) -> dict[str, Any]:
        patience_s = self._config.health.timeout + self._config.status.timeout
        return await probing.measure(request, self._fleet, self._pump, patience_s)

    async def _on_stop(self) -> dict[str, Any]:
        self._loop.call_soon(self._end, STOPPED)
        return {"stopping": True, "pid": os.getpid()}

    def _end(self, reason: str) -> None:
        if not self.stopped.done():
            self.stopped.set_result(reason)

    async def stop(self) -> None:
        """Take everything down in reverse order: TUN reading, addresses and routes, children, status socket,
        device, lock. Whoever sees the socket gone may start the next."""
        self._ready = False
        self._end("stopped")
        await self._undo.aclose()


def _difference(difference: changes.Difference) -> dict[str, Any]:
    return {"key": difference.key, "old": difference.old, "new": difference.new}


def _with_shards(config: Config, shards: int) -> Config:
    return msgspec.structs.replace(config, worker=msgspec.structs.replace(config.worker, shards=shards))
