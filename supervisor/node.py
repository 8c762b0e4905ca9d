"""The supervisor: the only process with root's rights, and the one that everything else of a node hangs on.

    talks to      over                            what comes, and who serves it
    ------------  ------------------------------  --------------------------------------------------------
    kernel        TUN descriptor                  Pump.read_tun
    kernel        netlink                         Watch
    shards        channel                         Child (Ready, Failed), Fleet (ShardStatus)
    control       channel                         Child (Ready, Failed), Fleet (ControlStatus)
    commands      status socket                   StatusServer: status, stop, reload, scale
    Prometheus    HTTP, if metrics.listen is set  Exporter

Rights kept: the TUN descriptor (it moves the packets), CAP_NET_ADMIN (it takes its addresses and routes
back), root's signals (it kills and restarts children of another user). It parses nothing that comes from
the network: records are checked by the shards.

Start order: what may be refused without a trace first (lock, overlap), then device, children, addresses and
routes, last the line that says it works. Stop is the reverse. A failing start takes back what it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

from supervisor import report
from supervisor.fleet import Fleet
from supervisor.network import overlap
from supervisor.network.routes import NetworkSetup
from supervisor.network.tun import Tun
from supervisor.network.watch import Watch
from supervisor.pump import Pump
from supervisor.statusd import StatusServer
from vpnd.api import messages
from vpnd.config import fields, live, load
from vpnd.config.schema import Config
from vpnd.errors import AlreadyRunningError, ConfigError, MachineError, VpndError
from vpnd.identity import Identity
from vpnd.packet.capability import Offload
from vpnd.packet.offload import UdpCoalescer
from vpnd.packet.ring import RingBroken

log = logging.getLogger("supervisor")


class Node:
    """One running node. Owner: the loop it was started on. `start`, then `stop`, once each.

    `config` is complete: node.name and network.virtual_ip are filled in (vpnd.config.load.complete). `reread` gives the
    configuration to change to at the command `reload`, complete as well, or raises VpndError; `reloaded` is told every
    configuration that came into force.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        reread: Callable[[], Config],
        reloaded: Callable[[Config], None],
    ) -> None:
        self._config, self._identity = config, identity
        self._reread, self._reloaded = reread, reloaded
        self.name, self.virtual_ip = config.node.name, config.network.virtual_ip
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
        self._lock()
        subnet = ipaddress.ip_network(f"{self.virtual_ip}/{network.subnet}", strict=False)
        routes = [ipaddress.ip_network(route) for route in network.routes]
        if not network.allow_overlap:
            overlap.check([subnet, *routes], network.interface)
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
            },
        )
        self._undo.push_async_callback(self._server.stop)
        await self._server.start()
        self._undo.push_async_callback(self._fleet.stop)
        await self._fleet.start()
        self._watch = Watch(self.tun.name, network, self._network_changed)
        self._undo.callback(self._watch.close)
        setup = NetworkSetup(config.retry)
        self._undo.callback(setup.undo)
        setup.apply(
            self.tun.name, network.mtu, self.virtual_ip, network.subnet, network.routes, network.queue_length
        )
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

    def _lock(self) -> None:
        """One daemon per state directory. The lock goes with its descriptor, however we end."""
        path = self.path("vpnd.lock")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MachineError(f"{path}: {error.strerror}; choose another --state-dir") from error
        self._undo.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunningError(
                f"a vpnd is running in {path.parent}: stop it with `vpnd stop`, or choose another --state-dir"
            ) from None

    def _make_fleet(self) -> Fleet:
        config = self._config
        identity_fd = os.open(self.path(config.p2p.identity_file), os.O_RDONLY | os.O_CLOEXEC)
        self._undo.callback(os.close, identity_fd)
        start = messages.ControlStart(
            config=config, node_name=self.name, peer_id=self._identity.peer_id, virtual_ip=self.virtual_ip
        )
        return Fleet(config, start, identity_fd, self.tun, self._pump)

    # --- packets

    def _read_tun(self) -> None:
        try:
            self._pump.read_tun()
        except RingBroken as error:
            self._fleet.kill_broken(str(error))
        except OSError as error:
            self._end(f"{self.tun.name}: {error.strerror}")

    def _age_flows(self) -> None:
        if not self.stopped.done():
            self._pump.flows.age()
            self._loop.call_later(self._config.worker.idle_timeout, self._age_flows)

    # --- changes

    async def reload_again(self) -> dict[str, Any]:
        """Read the configuration again and take over what can be; see `reload`."""
        return await self.reload(self._reread())

    async def reload(self, wanted: Config) -> dict[str, Any]:
        """Take over what vpnd.config.live allows of a complete configuration; what happened, ready for JSON.

        Raises ConfigError, and nothing is changed, when it does not go together with what stays as it is.
        """
        if not self._ready:
            raise VpndError("the node is not running; try again when it is ready")
        shards = self._config.worker.shards
        change = live.compare(_with_shards(self._config, self._fleet.scaled_to or shards), wanted)
        config = _with_shards(change.config, shards)
        try:
            # Our own name and address are what they were: only their company is judged.
            load.complete(config, self._identity.peer_id, self.name)
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
        self._config = config
        self._pump.flows.most = config.worker.max_flows
        self._server.timeout_s = config.status.timeout
        self._watch.settings = config.network
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
        return self._report(control, told)

    def counters(self) -> dict[str, Any]:
        """The report without asking anybody: counters only."""
        return self._report(None, {})

    def _report(
        self, control: messages.ControlStatus | None, shards: Mapping[int, messages.ShardStatus | None]
    ) -> dict[str, Any]:
        network = self._config.network
        result = report.build(
            node={
                "name": self.name,
                "peer_id": self._identity.peer_id,
                "virtual_ip": self.virtual_ip,
                "subnet": str(ipaddress.ip_network(f"{self.virtual_ip}/{network.subnet}", strict=False)),
                "shards": self._fleet.count,
                "uptime_s": time.monotonic() - self._started_s,
                "warnings": [],
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
            control_status=control,
            shard_statuses=shards,
        )
        result["ready"] = result["ready"] and self._ready
        return result

    async def _on_stop(self) -> dict[str, Any]:
        self._loop.call_soon(self._end, "stopped by command")
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


def _difference(difference: live.Difference) -> dict[str, Any]:
    return {"key": difference.key, "old": difference.old, "new": difference.new}


def _with_shards(config: Config, shards: int) -> Config:
    return msgspec.structs.replace(config, worker=msgspec.structs.replace(config.worker, shards=shards))
