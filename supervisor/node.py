"""The supervisor: the only process with root's rights, and the one that everything else of a node hangs on.

    talks to      over                            what comes, and who serves it
    ------------  ------------------------------  --------------------------------------------------------
    kernel        TUN descriptor                  Reading, Pump.read_tun
    kernel        netlink                         Watch
    shards        channel                         Child: Ready, Failed; Questions: ShardStatus, ProbeAnswer
    control       channel                         Child: Ready, Failed; Questions: ControlStatus, Answer;
                                                  Overlay, through Fleet: OwnChanged, RoutesKnown;
                                                  Walking: WalkWanted
    commands      status socket                   StatusServer: status, stop, reload, scale, probe, why;
                                                  requests: invite …
    relay         channel, once it is wanted      Child: Ready, Failed; RelayChild gives it a channel to control
    exporter      channel, if metrics.listen      Child: Ready, Failed; Exporter: StatusWanted
    page          channel, if web.listen          the same

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

from supervisor import report, requests, statedir
from supervisor.export import EXPORTER, PAGE, Exporter
from supervisor.fleet import Fleet, Scaling
from supervisor.logfile import LogFile
from supervisor.network import hosts, killswitch
from supervisor.network.machine import Machine
from supervisor.network.tun import Tun
from supervisor.network.watch import Watch
from supervisor.overlay import Overlay
from supervisor.pacing import Pacing, Reading
from supervisor.pump import Pump
from supervisor.questions import Argument
from supervisor.slots import ControlSlot
from supervisor.statusd import Command, StatusServer
from supervisor.walking import Walking
from supervisor.watchdog import Watchdog
from vpnd.api import messages
from vpnd.config import changes, fields, load
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.errors import ConfigError, VpndError
from vpnd.mode import Mode
from vpnd.packet.offload import UdpCoalescer
from vpnd.packet.record import Offload
from vpnd.peerid import Identity
from vpnd.printable import many
from vpnd.status import NodePart, Status

log = logging.getLogger("supervisor")

#: Why a node ends that does what it was told.
STOPPED = "stopped by command"
LEFT = "left the network by command"
MOVED = "joined another network by command"
#: Told by a signal, or by the program it is part of.
ENDED = "stopped"


async def start_node(
    config: Config,
    mode: Mode,
    token: str,
    identity: Identity,
    reread: Callable[[], Config],
    reloaded: Callable[[Config], None],
    *,
    alone: bool,
    stopped: asyncio.Future[str],
) -> Node:
    """Bring a node up. Raises a VpndError; nothing is left on the machine then, nor when it is cancelled.

    `config` is complete: node.name, and of a static node network.virtual_ip, are filled in (vpnd.config.load.complete).
    `mode` is how it knows its peers, `token` what it joins a network with, if it is new in it. `reread` gives the
    configuration to change to at the command `reload`, complete as well, or raises VpndError; `reloaded` is told every
    configuration that came into force. `alone`: see Pacing. `stopped` gets the reason for which it wants to end, also
    while it starts.
    """
    undo = contextlib.AsyncExitStack()
    try:
        undo.callback(os.close, statedir.lock(config))
        live = Live(config)
        machine = Machine(live, in_network=mode.in_network)
        overlay = Overlay(live, mode, machine, joining=bool(token))
        overlay.check_before()
        # Below this line the machine is changed.
        network = config.network
        tun = Tun.open(network.interface, network.mtu, network.offloads)
        undo.callback(tun.close)
        undo.callback(killswitch.claim(config).close)

        async def give_back_machine() -> None:
            # not MOVED: it is started again at once, and nothing is to leave past an exit node in between
            asked = stopped.done() and stopped.result() in (STOPPED, LEFT, ENDED)
            await machine.close(deliberate=asked)

        undo.push_async_callback(give_back_machine)
        machine.hold()
        merging = network.coalesce_udp and Offload.USO4 in tun.offloads
        pump = Pump(tun.fd, live, UdpCoalescer() if merging else None)
        control = ControlSlot(live, identity.peer_id, token, in_network=overlay.in_network)
        fleet = Fleet(live, control, overlay, tun, pump)
        undo.callback(fleet.close)
        machine.withheld_changed = fleet.tell_withheld
        usage = report.Usage(live, fleet)
        undo.callback(usage.close)
        node = Node(
            live, identity.peer_id, machine, overlay, tun, pump, fleet, usage, reread, reloaded, stopped, undo
        )
        server = StatusServer(
            str(Path(config.state_dir, config.status.socket)),
            live,
            {**node.commands(), **requests.handlers(node, live)},
            [
                *killswitch.cleanup_commands(config, in_network=mode.in_network),
                *hosts.cleanup_commands(config),
            ],
        )
        undo.push_async_callback(server.stop)
        await server.start()
        undo.push_async_callback(fleet.stop)
        await fleet.start()
        undo.callback(Watch(tun.name, live, node.network_changed, machine.own_changed).close)
        undo.push_async_callback(overlay.close)
        overlay.establish(tun.name, fleet.control.own)
        overlay.open_network()
        if config.dns.hosts_file and mode.in_network:
            named = hosts.HostsFile(live, node.members, lambda: overlay.own)
            undo.push_async_callback(named.close)
        fleet.tell_own()
        pacing = Pacing(live, alone=alone)
        reading = Reading(live, tun.fd, pump, pacing, broken=fleet.kill_broken, gone=node.device_gone)
        undo.callback(reading.close)
        undo.callback(LogFile(live).close)
        if config.metrics.listen:
            exporter = Exporter(EXPORTER, live, fleet.priorities, fleet.nursery, node.told)
            undo.push_async_callback(exporter.stop)
            await exporter.start()
            fleet.others.append(exporter.child)
        if config.web.listen:
            page = Exporter(
                PAGE, live, fleet.priorities, fleet.nursery, node.told, statedir.page_token(config)
            )
            undo.push_async_callback(page.stop)
            await page.start()
            fleet.others.append(page.child)
        undo.callback(Watchdog(live, lambda: (*fleet.children, *fleet.others)).close)
        await node.hear_control()
        node.ready = True
        return node
    except BaseException:
        await undo.aclose()
        raise


class Node:
    """A node that is starting, and from the moment it is `ready` a running one; `start_node` makes it, `stop` ends it.

    Owner: the loop it was started on. `undo` takes everything down in reverse order.
    """

    def __init__(
        self,
        live: Live,
        peer_id: str,
        machine: Machine,
        overlay: Overlay,
        tun: Tun,
        pump: Pump,
        fleet: Fleet,
        usage: report.Usage,
        reread: Callable[[], Config],
        reloaded: Callable[[Config], None],
        stopped: asyncio.Future[str],
        undo: contextlib.AsyncExitStack,
    ) -> None:
        self._live, self._peer_id, self._machine = live, peer_id, machine
        self._overlay, self.tun, self._pump, self._fleet = overlay, tun, pump, fleet
        self._usage = usage
        self.told = report.Shared(self.status).told
        self._scaling = Scaling(fleet)
        self._walking = Walking(live, fleet, pump, self.status)
        self._walks: set[asyncio.Task[None]] = set()
        fleet.walk_wanted = self._walk_wanted
        self._reread, self._reloaded = reread, reloaded
        self.stopped, self._undo = stopped, undo
        self.name = live.config.node.name
        self.ready = False
        self._last_told: messages.ControlStatus | None = None
        self._started_s = time.monotonic()

    @property
    def in_network(self) -> bool:
        """See Overlay."""
        return self._overlay.in_network

    # --- what is asked of it

    def commands(self) -> dict[str, Command]:
        """For the status server; those that control carries out are in supervisor.requests."""
        return {
            "status": self._on_status,
            "stop": self._on_stop,
            "reload": lambda request: self.reload_again(),
            "scale": lambda request: self.scale(request.get("shards")),
            "log-level": self._on_log_level,
            "probe": self._on_probe,
            "why": self._walking.asked,
        }

    async def _on_status(self, request: Mapping[str, Any]) -> msgspec.Raw:
        max_age_s = request.get("max_age_s", 0)
        if not isinstance(max_age_s, int | float) or not max_age_s >= 0:
            raise ConfigError("max_age_s: must be a number of seconds")
        return msgspec.Raw(await self.told(max_age_s))

    async def _on_log_level(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """In all processes, until the next reload, or the end of the node. Raises ConfigError."""
        level, config = request.get("level"), self._live.config
        known = fields.tables()["log"]["level"].choices
        if level not in known:
            raise ConfigError(f"log level {level}: must be one of {', '.join(known)}")
        log_settings = msgspec.structs.replace(config.log, level=level)
        self._live.take(msgspec.structs.replace(config, log=log_settings))
        self._reloaded(self._live.config)
        return {"before": config.log.level, "level": level}

    async def _on_stop(self, request: Mapping[str, Any]) -> dict[str, Any]:
        asyncio.get_running_loop().call_soon(self._end, STOPPED)
        return {"stopping": True, "pid": os.getpid()}

    async def _on_probe(self, request: Mapping[str, Any]) -> dict[str, Any]:
        config = self._live.config
        patience_s = config.health.timeout + config.status.timeout
        return await requests.probe(request, self._fleet, self._pump, patience_s)

    def _walk_wanted(self, wanted: messages.WalkWanted) -> None:
        """One at a time: control asks for the next when it has been told."""
        if not self._walks:
            walk = asyncio.get_running_loop().create_task(self._walking.asked_by_peer(wanted))
            self._walks.add(walk)
            walk.add_done_callback(self._walks.discard)

    async def request(self, command: str, arguments: dict[str, Argument], timeout_s: float) -> bytes:
        """See requests.Asked."""
        fleet = self._fleet
        return await fleet.questions.request(fleet.control, command, arguments, timeout_s)

    async def members(self) -> bytes:
        """Who is in the network, as control tells it."""
        return await self.request("members", {}, self._live.config.status.timeout)

    def left(self) -> None:
        """See requests.Asked: control has forgotten the network, so there is nothing to run for."""
        self._end(LEFT)

    def moved(self) -> None:
        """See requests.Asked: control has joined another network, and everything begins anew with its addresses."""
        self._end(MOVED)

    # --- changes

    async def reload_again(self) -> dict[str, Any]:
        """Read the configuration again and take over what can be; see `reload`."""
        return await self.reload(self._reread())

    async def reload(self, wanted: Config) -> dict[str, Any]:
        """Take over what vpnd.config.changes allows of a complete configuration; what happened, ready for JSON.

        Raises ConfigError, and nothing is changed, when it does not go together with what stays as it is.
        """
        if not self.ready:
            raise VpndError("the node is not running; try again when it is ready")
        shards = self._live.config.worker.shards
        change = changes.compare(_with_shards(self._live.config, self._shards_before(wanted)), wanted)
        config = _with_shards(change.config, shards)
        try:
            # Our own name and address are what they were: only their company is judged.
            load.complete(config, self._peer_id, self.name, in_network=self.in_network)
        except ConfigError as error:
            kept = ", ".join(difference.key for difference in change.needs_restart)
            raise ConfigError(
                f"{error}\nthis holds while the node is not restarted with its new {kept}"
            ) from None
        self._live.take(config)
        self._machine.look()
        self._reloaded(config)
        log.info(
            "reloaded: %s changed, %s added, %d removed, %s kept until a restart",
            many(len(change.applied), "setting"), many(len(change.peers_added), "peer"), len(change.peers_removed),
            many(len(change.needs_restart), "setting"),
        )  # fmt: skip
        return {
            "applied": [_difference(each) for each in change.applied],
            "needs_restart": [{**_difference(each), "remedy": each.remedy} for each in change.needs_restart],
            "peers_added": [{"name": peer.name, "peer_id": peer.peer_id} for peer in change.peers_added],
            "peers_removed": [{"name": peer.name, "peer_id": peer.peer_id} for peer in change.peers_removed],
        }

    def _shards_before(self, wanted: Config) -> int:
        """worker.shards as it is in force. What `vpnd scale` has made of it is no difference from what it was made of,
        nor from what means so many."""
        asked = wanted.worker.shards
        if asked == self._live.config.worker.shards or self._fleet.shards_of(wanted) == self._fleet.count:
            return asked
        return self._fleet.count

    async def scale(self, shards: object) -> dict[str, Any]:
        """Change the number of shards, and return when it is done; see Fleet.scale. Raises VpndError."""
        limits = fields.tables()["worker"]["shards"]
        if type(shards) is not int or not 1 <= shards <= limits.most_value:
            raise ConfigError(f"shards = {shards}: must be a number from 1 to {limits.most_value:g}")
        if not self.ready:
            raise VpndError("the node is not running; try again when it is ready")
        return await self._scaling.scale(shards)

    def network_changed(self, reason: str, addresses: tuple[str, ...]) -> None:
        """See Watch."""
        log.info("the network changed: %s", reason)
        self._machine.look()
        self._fleet.broadcast(messages.NetworkChanged(reason=reason, addresses=addresses))

    # --- status and end

    async def hear_control(self) -> None:
        """Have control say what this node is: it is not ready before that is known (`_report`)."""
        patience_s = self._live.config.process.ready_timeout
        self._last_told = await self._fleet.questions.ask(self._fleet.control, patience_s)

    async def status(self, patience_s: float = 0.0) -> Status:
        """See supervisor.report. A child that does not answer within `patience_s`, or half of status.timeout, is
        reported without what only it knows."""
        patience_s = patience_s or self._live.config.status.timeout / 2
        fleet, present = self._fleet, self._fleet.present
        ask = fleet.questions.ask
        control, *shards = await asyncio.gather(
            ask(fleet.control, patience_s), *(ask(shard, patience_s) for _, shard in present)
        )
        last_told = self._last_told = control or self._last_told
        peers = await report.peer_rows(self._live.config, control, last_told, shards, fleet.slots)
        overlay = self._overlay
        return report.build(
            node=NodePart(
                name=self.name,
                peer_id=self._peer_id,
                mode="network" if self.in_network else "static",
                virtual_ip=overlay.virtual_ip,
                addresses=overlay.own.addresses,
                subnet=overlay.subnet,
                shards=fleet.count,
                exit_node=self._live.config.network.exit_node,
                exit_peer=self._machine.exit_peer,
                uptime_s=time.monotonic() - self._started_s,
                warnings=(
                    *overlay.warnings,
                    *fleet.priorities.warnings,
                    *(last_told.warnings if last_told is not None else ()),
                ),
            ),
            tun=self.tun,
            pump=self._pump,
            fleet=fleet,
            usage=self._usage,
            own=overlay.own,
            control_status=control,
            last_told=last_told,
            shard_statuses={slot.index: said for (slot, _), said in zip(present, shards, strict=True)},
            peers=peers,
            ready=self.ready and last_told is not None,
            ailments=self._machine.ailments,
        )

    def device_gone(self, reason: str) -> None:
        """The TUN device cannot be read any more: there is nothing to run for."""
        self._end(f"{self.tun.name} is gone ({reason}): start the node again")

    def _end(self, reason: str) -> None:
        if not self.stopped.done():
            self.stopped.set_result(reason)

    async def stop(self) -> None:
        """Take everything down in reverse order: TUN reading, addresses and routes, children, status socket,
        device, lock. Whoever sees the socket gone may start the next."""
        self.ready = False
        self._end(ENDED)
        await self._scaling.stop()
        await self._undo.aclose()


def _difference(difference: changes.Difference) -> dict[str, Any]:
    return {"key": difference.key, "old": difference.old, "new": difference.new}


def _with_shards(config: Config, shards: int) -> Config:
    return msgspec.structs.replace(config, worker=msgspec.structs.replace(config.worker, shards=shards))
