"""VPNService, the embeddable daemon, and the foreground run of the command line, which is nothing but one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import uvloop

from supervisor.node import Node
from vpnd import logs
from vpnd.config import load
from vpnd.config.schema import Config
from vpnd.errors import PrivilegeError, VpndError
from vpnd.identity import Identity, load_or_create

log = logging.getLogger("supervisor")


class VPNService:
    """A node inside your own asyncio program.

        async with VPNService(config) as service:
            print(await service.status())

    `config` is checked when it is made (vpnd.config.load). Needs root and Linux. The children are processes
    of their own; the TUN and the rings are served by the loop that `start` ran on, so keep that loop free
    of long callbacks. Use one instance for one life: start, stop.
    """

    def __init__(self, config: Config, identity: Identity | None = None) -> None:
        self._config, self._identity = config, identity
        self._node: Node | None = None

    async def start(self) -> None:
        """Return when packets flow through the device. Raises a VpndError that says what to do; nothing is left."""
        if os.geteuid() != 0:
            raise PrivilegeError("starting a node needs root: run it with sudo")
        config = self._config
        identity = self._identity or load_or_create(Path(config.state_dir, config.p2p.identity_file))
        config = load.complete(config, identity.peer_id, socket.gethostname())
        node = Node(config, identity)
        starting = asyncio.ensure_future(node.start())
        try:
            both: set[asyncio.Future[Any]] = {starting, node.stopped}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not starting.done():  # `vpnd stop` came, or our caller was cancelled: what was done is undone
                starting.cancel()
                await asyncio.wait({starting})
        if starting.cancelled():
            raise VpndError(f"{node.stopped.result()} while starting")
        starting.result()
        self._node = node

    async def stop(self) -> None:
        """Take the node down; nothing of it is left on the machine. Idempotent."""
        node, self._node = self._node, None
        if node is not None:
            await node.stop()

    async def status(self) -> dict[str, Any]:
        """What `vpnd status --json` prints. Raises VpndError when the node is not running."""
        return await self._running().status()

    async def wait_stopped(self) -> str:
        """Wait until the node wants to end (`vpnd stop`, or the device is gone): why. Then call `stop`."""
        return await asyncio.shield(self._running().stopped)

    def _running(self) -> Node:
        if self._node is None:
            raise VpndError("the node is not running: call start() first")
        return self._node

    async def __aenter__(self) -> VPNService:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def run_foreground(config: Config, identity: Identity, announce: Callable[[str], None]) -> int:
    """Run a node until SIGINT, SIGTERM or `vpnd stop`: the exit code. `announce` gets the lines for the user.

    Raises a VpndError when the node cannot start.
    """
    logs.configure(config.log.level, "supervisor")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(VPNService(config, identity), announce))


async def _run(service: VPNService, announce: Callable[[str], None]) -> int:
    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    signalled: asyncio.Future[str] = loop.create_future()

    def on_signal(number: int) -> None:
        if not signalled.done():
            signalled.set_result(signal.Signals(number).name)
        if not started and this is not None:
            this.cancel()

    started = False
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await service.start()
        started = True
    except asyncio.CancelledError:
        log.info("%s while starting; nothing is left behind", signalled.result())
        return 128 + signal.Signals[signalled.result()].value
    for line in welcome(await service.status()):
        announce(line)
    ended = loop.create_task(service.wait_stopped())
    await asyncio.wait([signalled, ended], return_when=asyncio.FIRST_COMPLETED)
    reason = signalled.result() if signalled.done() else ended.result()
    ended.cancel()
    log.info("stopping: %s", reason)
    await service.stop()
    return 0 if signalled.done() or reason == "stopped by command" else 1


def welcome(status: dict[str, Any]) -> list[str]:
    """The lines a new user sees when the node is ready."""
    node, tun = status["node"], status["tun"]
    peers = [f"{peer['name']} ({peer['virtual_ip']})" for peer in status["peers"]]
    lines = [
        f"vpnd is ready: {node['name']} is {node['virtual_ip']} in {node['subnet']} on {tun['interface']}, "
        f"{len(status['shards'])} shards",
        f"  peer id    {node['peer_id']}",
        *(f"  listens on {address}/p2p/{node['peer_id']}" for address in node["listen"]),
    ]
    if peers:
        lines.append(f"  peers      {', '.join(peers)}")
        lines.append(f"  next       ping {status['peers'][0]['virtual_ip']}, or `vpnd status`")
    else:
        lines.append("  next       name another node under [[peers]] in the configuration; see README.md")
    return lines
