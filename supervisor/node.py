"""The supervisor: the only process with root's rights, and the one that everything else of a node hangs on.

    talks to      over                            what comes, and who serves it
    ------------  ------------------------------  --------------------------------------------------------
    kernel        TUN descriptor                  Pump.read_tun
    shards        channel                         Child (Ready, Failed), _on_answer (ShardStatus)
    control       channel                         Child (Ready, Failed), _on_answer (ControlStatus)
    commands      status socket                   StatusServer: status, stop
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
import itertools
import logging
import os
import time
from pathlib import Path
from typing import Any

import psutil

from supervisor import report
from supervisor.children import Child, State
from supervisor.network import overlap
from supervisor.network.routes import NetworkSetup
from supervisor.network.tun import Tun
from supervisor.pump import Pump
from supervisor.slots import Slot
from supervisor.statusd import StatusServer
from vpnd.api import channel, messages
from vpnd.config.schema import Config
from vpnd.errors import AlreadyRunningError, MachineError
from vpnd.identity import Identity
from vpnd.metrics import CONTROL_COUNTERS, create_page
from vpnd.packet.capability import Offload
from vpnd.packet.offload import UdpCoalescer
from vpnd.packet.ring import RingBroken

log = logging.getLogger("supervisor")

#: Shards when worker.shards is 0: one per CPU, but no more than this; a flow uses one of them.
MOST_AUTOMATIC_SHARDS = 4


class Node:
    """One running node. Owner: the loop it was started on. `start`, then `stop`, once each.

    `config` is complete: node.name and network.virtual_ip are filled in (vpnd.config.load.complete).
    """

    def __init__(self, config: Config, identity: Identity) -> None:
        self._config, self._identity = config, identity
        self.name, self.virtual_ip = config.node.name, config.network.virtual_ip
        self.stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._undo = contextlib.AsyncExitStack()
        self._started_s = time.monotonic()
        self._serials = itertools.count(1)
        self._answers: dict[tuple[str, int], asyncio.Future[Any]] = {}
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
        self._make_children()
        server = StatusServer(
            str(self.path(config.status.socket)),
            config.status.timeout,
            {"status": self.status, "stop": self._on_stop},
        )
        self._undo.push_async_callback(server.stop)
        await server.start()
        await self._start_children()
        setup = NetworkSetup()
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

    # --- children

    def _make_children(self) -> None:
        config = self._config
        count = config.worker.shards or min(len(os.sched_getaffinity(0)), MOST_AUTOMATIC_SHARDS)
        self._control_page, page_fd = create_page(CONTROL_COUNTERS, "vpnd-counters-control")
        self._undo.callback(self._control_page.close)
        self._undo.callback(os.close, page_fd)
        identity_fd = os.open(self.path(config.p2p.identity_file), os.O_RDONLY | os.O_CLOEXEC)
        self._undo.callback(os.close, identity_fd)
        control_start = messages.ControlStart(
            config=config,
            node_name=self.name,
            peer_id=self._identity.peer_id,
            virtual_ip=self.virtual_ip,
        )

        def begin_control() -> tuple[messages.Message, tuple[int, ...]]:
            os.lseek(identity_fd, 0, os.SEEK_SET)  # the offset is shared with the children before
            return control_start, (identity_fd, page_fd)

        self.control = Child(
            "control",
            "vpnd.control",
            "control",
            config.process,
            begin_control,
            self._control_up,
            self._control_down,
            self._on_control,
        )
        self.slots: list[Slot] = []
        self.shards: list[Child] = []
        for index in range(count):
            self._make_shard(index)

    async def _start_children(self) -> None:
        """All at once; the slowest is control, which loads libp2p."""
        self._undo.push_async_callback(self._stop_children)
        try:
            async with asyncio.TaskGroup() as group:
                for child in (self.control, *self.shards):
                    group.create_task(child.start())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def _make_shard(self, index: int) -> None:
        own = (str(ipaddress.ip_network(self.virtual_ip)),)
        slot = Slot(index, self._config, self._pump)
        self._undo.callback(slot.close)
        shard = Child(
            f"shard {index}",
            "shards",
            "shard",
            self._config.process,
            lambda: slot.begin(own, self.tun),
            lambda child: self._shard_up(slot, child),
            lambda child: self._shard_down(slot, child),
            lambda message: self._on_answer(f"shard {index}", message),
        )
        self.slots.append(slot)
        self.shards.append(shard)

    async def _stop_children(self) -> None:
        await asyncio.gather(*(shard.stop() for shard in self.shards))
        await self.control.stop()

    def _shard_up(self, slot: Slot, shard: Child) -> None:
        slot.up()
        self._introduce(slot.index, shard)

    def _shard_down(self, slot: Slot, shard: Child) -> None:
        slot.ended()
        self._no_answers(shard)
        self.control.send(messages.ShardLeft(index=slot.index))

    def _control_up(self, control: Child) -> None:
        for index, shard in enumerate(self.shards):
            if shard.state is State.UP:
                self._introduce(index, shard)

    def _control_down(self, control: Child) -> None:
        """Sessions go on without it; shards see their channels close."""
        self._no_answers(control)

    def _introduce(self, index: int, shard: Child) -> None:
        """Give control and a shard the two ends of a channel of their own."""
        if self.control.state is not State.UP:
            return
        controls, shards = channel.pair()
        with controls, shards:
            self.control.send(messages.ShardArrived(index=index), (controls.fileno(),))
            shard.send(messages.ControlArrived(), (shards.fileno(),))

    # --- packets

    def _read_tun(self) -> None:
        try:
            self._pump.read_tun()
        except RingBroken as error:
            self._pump_broken(str(error))
        except OSError as error:
            self._end(f"{self.tun.name}: {error.strerror}")

    def _pump_broken(self, reason: str) -> None:
        """A shard wrote nonsense into the header of the ring to it: find out which one."""
        for slot, shard in zip(self.slots, self.shards, strict=True):
            if slot.port is not None and slot.port.to_shard.broken():
                slot.ended()
                shard.kill(reason)

    def _age_flows(self) -> None:
        if not self.stopped.done():
            self._pump.flows.age()
            self._loop.call_later(self._config.worker.idle_timeout, self._age_flows)

    # --- status and end

    def _on_control(self, message: messages.Any) -> None:
        self._on_answer("control", message)

    def _on_answer(self, who: str, message: messages.Any) -> None:
        if isinstance(message, messages.ControlStatus | messages.ShardStatus):
            answer = self._answers.pop((who, message.serial), None)
            if answer is not None and not answer.done():
                answer.set_result(message)

    def _no_answers(self, child: Child) -> None:
        """It is gone: nobody need wait for what it was asked."""
        for (who, _), answer in self._answers.items():
            if who == child.title and not answer.done():
                answer.set_result(None)

    async def _ask(self, child: Child, timeout_s: float) -> Any:
        if child.state is not State.UP:
            return None
        key = child.title, next(self._serials)
        answer = self._answers[key] = self._loop.create_future()
        child.send(messages.StatusRequest(serial=key[1]))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            return None
        finally:
            self._answers.pop(key, None)

    async def status(self) -> dict[str, Any]:
        """The status report; see supervisor.report. A child that does not answer within half of status.timeout is
        reported without what only it knows."""
        patience_s = self._config.status.timeout / 2
        asked = (self._ask(child, patience_s) for child in (self.control, *self.shards))
        control_status, *shard_statuses = await asyncio.gather(*asked)
        return self._report(control_status, shard_statuses)

    def counters(self) -> dict[str, Any]:
        """The report without asking anybody: counters only."""
        return self._report(None, [None] * len(self.shards))

    def _report(
        self, control: messages.ControlStatus | None, shards: list[messages.ShardStatus | None]
    ) -> dict[str, Any]:
        network = self._config.network
        result = report.build(
            node={
                "name": self.name,
                "peer_id": self._identity.peer_id,
                "virtual_ip": self.virtual_ip,
                "subnet": str(ipaddress.ip_network(f"{self.virtual_ip}/{network.subnet}", strict=False)),
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
            slots=self.slots,
            shards=self.shards,
            control=self.control,
            control_page=self._control_page,
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
