"""VPNService, the embeddable daemon, and the foreground run of the command line, which is nothing but one."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
import uvloop

from supervisor import requests
from supervisor.node import LEFT, MOVED, STOPPED, Node, start_node
from supervisor.notify import READY, STOPPING, Notifier, in_a_line
from vpnd import logs, privileges
from vpnd.config import load, reference
from vpnd.config.schema import Config
from vpnd.errors import AlreadyRunningError, PrivilegeError, VpndError
from vpnd.mode import Mode, decide, identity_of
from vpnd.peerid import Identity
from vpnd.printable import many, printable, wrapped
from vpnd.status import NOT_IN, Peer, Status, known_as

log = logging.getLogger("supervisor")


class VPNService:
    """A node inside your own asyncio program.

        async with VPNService() as service:
            print(await service.status())

    Without `config` it is what `vpnd start` would run: VPND_CONFIG, VPND_STATE_DIR and their defaults. `config` is
    checked when it is made (vpnd.config.load). Needs root and Linux. The children are processes of their own; the TUN
    and the rings are served by the loop that `start` ran on, so keep that loop free of long callbacks. Use one instance
    for one life: start, stop. docs/embedding.md has a whole program.

    Without [[peers]] and network.virtual_ip in `config` the node is in a network (vpnd.mode): the one its state
    directory holds, else the one `join`, a token, lets it into, else one that it makes.

    `reread` is called for the configuration to change to when somebody says `vpnd reload`; it may raise VpndError.
    Without it that command is refused, and the program calls `reload`. `reloaded` is told each configuration that came
    into force.
    """

    def __init__(
        self,
        config: Config | None = None,
        identity: Identity | None = None,
        *,
        join: str = "",
        reread: Callable[[], Config] | None = None,
        reloaded: Callable[[Config], None] = lambda config: None,
    ) -> None:
        """Raises ConfigError where there is no `config`, and what the environment names cannot be used."""
        if config is None:
            config = load.load_with_origins(None, None, {}, os.environ).config
        self._config, self._identity, self._join = config, identity, join
        self._mode = Mode.STATIC
        self._given_reread, self._reloaded = reread, reloaded
        self._host_name = socket.gethostname()
        self._starting = False
        self._node: Node | None = None

    async def start(self) -> None:
        """Return when packets flow through the device. Raises a VpndError that says what to do; nothing is left."""
        if self._starting or self._node is not None:
            raise AlreadyRunningError("this service is running already")
        self._starting = True
        try:
            await self._start()
        finally:
            self._starting = False

    async def _start(self) -> None:
        if os.geteuid() != 0:
            raise PrivilegeError("starting a node needs root: run it with sudo")
        config = self._config
        identity = self._identity or identity_of(config)
        self._identity = identity
        self._mode = decide(config, joining=bool(self._join))
        stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        starting = asyncio.ensure_future(
            start_node(
                self._complete(config),
                self._mode,
                self._join,
                identity,
                self._reread,
                self._reloaded,
                alone=self._given_reread is not None,
                stopped=stopped,
            )
        )
        try:
            both: set[asyncio.Future[Any]] = {starting, stopped}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not starting.done():  # `vpnd stop` came, or our caller was cancelled: what was done is undone
                starting.cancel()
                await asyncio.wait({starting})
        if starting.cancelled():
            raise VpndError(f"{stopped.result()} while starting")
        self._node = starting.result()

    async def stop(self) -> None:
        """Take the node down; nothing of it is left on the machine. Idempotent."""
        node, self._node = self._node, None
        if node is not None:
            await node.stop()

    async def status(self) -> Status:
        """What `vpnd status --json` prints; vpnd.status says what its fields mean. Raises VpndError when the node is
        not running."""
        return await self._running().status()

    async def reload(self, config: Config | None = None) -> dict[str, Any]:
        """Take over what can be without a restart (see vpnd.config.changes); what `vpnd reload --json` prints.

        Without `config`: what `reread` gives. Raises VpndError, ConfigError with every problem; the node then goes
        on as it was.
        """
        node = self._running()
        if config is None:
            return await node.reload_again()
        # Its fields may have been set by hand: read it as a file would be.
        load.from_mapping(tomllib.loads(reference.as_toml(config)), Path(config.state_dir))
        return await node.reload(self._complete(config))

    async def scale(self, shards: int) -> dict[str, Any]:
        """Have so many shards, 1 to 64; what `vpnd scale --json` prints. Returns when it is done.

        Raises VpndError while another change is under way, ChildError when a new shard does not get ready; the number
        is then what it was.
        """
        return await self._running().scale(shards)

    async def events(self, every_s: float = 1.0) -> AsyncIterator[PeerEvent]:
        """What becomes of peers, beginning with those that are connected: without end, while the node runs.

        The status is looked at every `every_s`: what comes and goes in between is not told.
        """
        before: dict[str, Peer] = {}
        while True:
            now = {peer.peer_id: peer for peer in (await self.status()).peers if peer.state == "connected"}
            for event in peer_events(before, now):
                yield event
            before = now
            await asyncio.sleep(every_s)

    async def invite(
        self,
        *,
        name: str | None = None,
        uses: int = 1,
        expires_s: float | None = None,
        ip: str | None = None,
        routes: Sequence[str] = (),
    ) -> str:
        """A token that lets a machine join; see `vpnd invite`. Raises RefusedError if this node is no authority."""
        answer = await self._ask(
            "invite", name=name, uses=uses, expires_s=expires_s, ip=ip, routes=",".join(routes) or None
        )
        return str(answer["token"])

    async def members(self) -> list[dict[str, Any]]:
        """Who is in the network: the rows of `vpnd members --json`."""
        return list(await self._ask("members"))

    async def remove(self, who: str) -> None:
        """Throw a member out, by name, virtual IP or peer id. Raises RefusedError if this is no authority."""
        await self._ask("remove", who=who)

    async def ping(self, who: str, count: int = 1) -> list[float]:
        """Round trips to a peer's control, in milliseconds, without lost ones. Raises VpndError when all are lost."""
        rows = await self._ask("ping", who=who, count=count)
        trips = [row["rtt_ms"] for row in rows if row["rtt_ms"] is not None]
        if not trips:
            raise VpndError(f"{who} does not answer: {rows[-1]['error'] or 'no ping came back in time'}")
        return trips

    async def _ask(self, command: str, **arguments: object) -> Any:
        """What control answers; it may dial for it."""
        node, settings = self._running(), self._config
        timeout_s = settings.status.timeout + settings.p2p.dial_timeout + settings.discovery.dht_timeout
        return msgspec.json.decode(await requests.carry_out(node, command, arguments, timeout_s))

    def _complete(self, config: Config) -> Config:
        assert self._identity is not None
        in_network = self._mode.in_network
        user = privileges.existing(config.process.user)
        process = msgspec.structs.replace(config.process, user=user)
        config = msgspec.structs.replace(config, process=process)
        return load.complete(config, self._identity.peer_id, self._host_name, in_network=in_network)

    def _reread(self) -> Config:
        if self._given_reread is None:
            raise VpndError("this node is part of another program, which alone can change its configuration")
        return self._complete(self._given_reread())

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


class PeerEvent(NamedTuple):
    """`kind`: "up" (its first session), "down" (its last one is gone; `peer` is as it was before), or "path"."""

    kind: str
    peer: Peer


def peer_events(before: Mapping[str, Peer], now: Mapping[str, Peer]) -> Iterator[PeerEvent]:
    """What lies between two looks at the connected peers, by peer id."""
    for peer_id, peer in before.items():
        if peer_id not in now:
            yield PeerEvent("down", peer)
    for peer_id, peer in now.items():
        if peer_id not in before:
            yield PeerEvent("up", peer)
        elif set(before[peer_id].paths) != set(peer.paths):
            yield PeerEvent("path", peer)


def run_foreground(
    config: Config,
    identity: Identity,
    join: str,
    announce: Callable[[str], None],
    reread: Callable[[], Config],
) -> int:
    """Run a node until SIGINT, SIGTERM or `vpnd stop`: the exit code. `announce` gets the lines for the user; when it
    raises BrokenPipeError the node ends.

    `join`: a token to join a network with, or empty. `vpnd join` starts the node again, in this process.
    `reread` gives the configuration to change to at SIGHUP and `vpnd reload`. Raises a VpndError when the node cannot
    start.
    """
    logs.configure(config.log, "supervisor")
    notifier = Notifier(os.environ)
    token = join
    while True:
        service = VPNService(
            config,
            identity,
            join=token,
            reread=reread,
            reloaded=lambda config: logs.set_level(config.log.level),
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(_run(service, announce, notifier))
        if code is not None:
            return code
        config, token = reread(), ""


async def _run(service: VPNService, announce: Callable[[str], None], notifier: Notifier) -> int | None:
    """The exit code; None: to be started again, in another network."""
    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    signalled: asyncio.Future[str] = loop.create_future()

    def on_signal(number: int) -> None:
        if not signalled.done():
            signalled.set_result(signal.Signals(number).name)
        if not started and this is not None:
            this.cancel()

    started = False
    hung_up = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    try:
        await service.start()
        started = True
    except asyncio.CancelledError:
        log.info("%s while starting; nothing is left behind", signalled.result())
        return 128 + signal.Signals[signalled.result()].value
    status = await service.status()
    notifier.tell(READY, in_a_line(status))
    try:
        for line in welcome(status):
            announce(line)
    except BrokenPipeError:
        # who started it has what it wanted to read, and no other way to end it
        log.error("nobody reads standard output any more; stopping")
        await service.stop()
        return 1
    reloading = loop.create_task(_reload_at(hung_up, service, notifier))
    beating = loop.create_task(notifier.beat(service.status))
    ended = loop.create_task(service.wait_stopped())
    await asyncio.wait([signalled, ended], return_when=asyncio.FIRST_COMPLETED)
    reason = signalled.result() if signalled.done() else ended.result()
    ended.cancel()
    reloading.cancel()
    beating.cancel()
    log.info("stopping: %s", reason)
    again = not signalled.done() and reason == MOVED
    if again:
        notifier.reloading()
    else:
        notifier.tell(STOPPING)
    await service.stop()
    if again:
        return None
    return 0 if signalled.done() or reason in (STOPPED, LEFT) else 1


async def _reload_at(hung_up: asyncio.Event, service: VPNService, notifier: Notifier) -> None:
    """`vpnd reload` at every SIGHUP; one that came while the node started counts as well."""
    while True:
        await hung_up.wait()
        hung_up.clear()
        notifier.reloading()
        try:
            await service.reload()
        except VpndError as error:
            for line in str(error).split("\n"):
                log.error("not reloaded: %s", printable(line))
        notifier.tell(READY)


def welcome(status: Status) -> list[str]:
    """The lines a new user sees when the node is ready."""
    node = status.node
    rows = [
        ("", f"vpnd is ready: {known_as(status)}"),
        ("addresses", f"{' and '.join(node.addresses)} in {node.subnet} on {status.tun.interface}"),
        ("peer id", node.peer_id),
        ("listens on", " ".join(node.listen) or "nowhere"),
        ("shards", f"{len(status.shards)}"),
        *_company(status),
    ]
    return [line for name, text in rows for line in _row(name, text)]


def _row(name: str, text: str) -> list[str]:
    begun = f"  {name:10} " if name else ""
    return f"{begun}{wrapped(text, len(begun) or 2, len(begun))}".split("\n")


def _company(status: Status) -> Iterator[tuple[str, str]]:
    """Whom the node knows, and what to do next."""
    network = status.network
    if network is not None:
        role = "; this node may let others in" if network.authority else ""
        yield "network", f"{network.name}, {many(network.members or 1, 'member')}{role}"
        yield from (("note", warning) for warning in status.node.warnings)
        if network.state in NOT_IN:
            yield "next", f"the membership of this node is {network.state}; see `vpnd status`"
        elif network.authority and not status.peers:
            yield "next", "`vpnd invite` prints a token; on the other machine: vpnd start --join TOKEN"
        else:
            yield "next", "`vpnd peers`, `vpnd status`, or ping a member"
    elif status.peers:
        yield "peers", ", ".join(f"{peer.name} ({peer.virtual_ip})" for peer in status.peers)
        yield "next", f"ping {status.peers[0].virtual_ip}, or `vpnd status`"
    else:
        yield "next", "name another node under [[peers]] in the configuration; see docs/joining.md"
