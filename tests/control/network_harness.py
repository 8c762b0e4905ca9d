"""Nodes of a network one can join: real control processes, each with a state directory and one shard."""

from __future__ import annotations

import json
import os
import pwd
import select
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from control_harness import PATIENCE_S, ControlProcess, FakeShard, Identity, config, free_port, receive_any

from vpnd.api import messages, parts
from vpnd.api.channel import ChannelClosed
from vpnd.api.reports import NetworkReport, OwnAddresses
from vpnd.config.schema import Config, Membership, Network

USER = "nobody"


class NetworkNode:
    """One node. As a context manager it cleans up; `start` may be called again after `stop` or `kill`."""

    def __init__(self, path: Path, name: str, **settings: Any) -> None:
        """`settings` of [membership]; `advertise`, `exit_node`, `accept_routes` are of [network]."""
        self.name = name
        self.identity = Identity()
        self.port = free_port()
        self.directory = path / name
        self.directory.mkdir(mode=0o700)
        os.chown(self.directory, pwd.getpwnam(USER).pw_uid, -1)
        of_network = {
            key: settings.pop(key) for key in ("advertise", "exit_node", "accept_routes") if key in settings
        }
        self.config: Config = msgspec.structs.replace(
            config(self.port),
            membership=Membership(**{"gossip_interval": 0.5, "join_timeout": 2.0} | settings),
            network=Network(**of_network),
        )
        self.environment: dict[str, str] = {}
        self.process: ControlProcess | None = None
        self.shard = FakeShard(0)
        self.peers: dict[str, messages.PeerKnown] = {}
        self.sessions: dict[str, int] = {}  # peer id -> sessions handed over
        self.forgotten: list[str] = []  # peer ids that were peers, and are told to be none any more
        self.own: OwnAddresses | None = None
        self.routes: messages.RoutesKnown | None = None

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    def moves(self) -> None:
        """The node listens at another port from its next start on."""
        self.port = free_port()
        p2p = msgspec.structs.replace(self.config.p2p, listen=(f"/ip4/127.0.0.1/tcp/{self.port}",))
        self.config = msgspec.structs.replace(self.config, p2p=p2p)

    def launch(self, token: str = "") -> ControlProcess:
        """Start without waiting until it is ready."""
        network = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.process = ControlProcess(
                self.identity,
                self.config,
                network=network,
                name=self.name,
                token=token,
                environment=self.environment,
            )
        finally:
            os.close(network)
        return self.process

    def start(self, token: str = "") -> NetworkNode:
        """Start, wait until it is ready, and give it a shard."""
        self.launch(token)
        return self.arrive()

    def arrive(self, patience_s: float = PATIENCE_S) -> NetworkNode:
        """The rest of `start`, for one of several that were launched at once."""
        ready = self.control.ready(patience_s)
        assert ready.own is not None
        self.own = ready.own
        self.shard = FakeShard(0)
        self.peers.clear()
        self.sessions.clear()
        self.control.channel.send(messages.ShardArrived(index=0), (self.shard.theirs.fileno(),))
        self.shard.theirs.close()
        return self

    @property
    def control(self) -> ControlProcess:
        assert self.process is not None
        return self.process

    @property
    def address(self) -> str:
        """Its IPv4 address in the VPN."""
        assert self.own is not None
        return self.own.addresses[0]

    def pump(self, seconds: float = 0.0) -> None:
        """Take in what control says, for so long. Raises AssertionError, with what it has logged, when it has ended or
        has cut its shard off."""
        try:
            self._pump(seconds)
        except ChannelClosed as error:
            ended = self.control.process.poll()
            self.kill()
            said = self.control.stderr()
            raise AssertionError(
                f"{self.name}: {error}; it ended with {ended}, having said:\n{said}"
            ) from error

    def _pump(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            left = max(0.0, until - time.monotonic())
            channels = {self.shard.channel.fileno(): self._shard_said, self.control.channel.fileno(): None}
            ready = select.select(list(channels), [], [], left)[0]
            if not ready:
                return
            for fd in ready:
                if channels[fd] is not None:
                    self._shard_said(*receive_any(self.shard.channel))
                else:
                    self._supervisor_said(receive_any(self.control.channel)[0])

    def _shard_said(self, message: Any, descriptors: list[int]) -> None:
        if isinstance(message, messages.PeerKnown):
            self.peers[message.peer_id] = message
        elif isinstance(message, messages.PeerForgotten):
            self.peers.pop(message.peer_id, None)
            self.forgotten.append(message.peer_id)
        elif isinstance(message, messages.SessionHandover):
            peer_id = message.session.peer_id
            self.sessions[peer_id] = self.sessions.get(peer_id, 0) + 1
            self.shard.channel.send(messages.SessionUp(session_id=message.session_id, peer_id=peer_id))
            for fd in descriptors:
                os.close(fd)

    def _supervisor_said(self, message: Any) -> Any:
        if isinstance(message, messages.OwnChanged):
            self.own = message.own
        elif isinstance(message, messages.RoutesKnown):
            self.routes = message
        return message

    def _answer(self, kind: type) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            message = self._supervisor_said(receive_any(self.control.channel)[0])
            if isinstance(message, kind):
                return message
        raise AssertionError("no answer came")

    def ask(self, command: str, **arguments: Any) -> messages.Answer:
        """A command of the user."""
        self.control.channel.send(messages.Request(serial=7, command=command, arguments=arguments))
        said: list[messages.Answer] = [self._answer(messages.Answer)]
        while said[-1].more:
            said.append(self._answer(messages.Answer))
        assert {part.serial for part in said} == {7}
        return parts.joined(said)

    def do(self, command: str, **arguments: Any) -> Any:
        """A command that succeeds, its result."""
        answer = self.ask(command, **arguments)
        assert not answer.error, answer.error
        return json.loads(answer.result)

    def status(self) -> messages.ControlStatus:
        self.control.channel.send(messages.StatusRequest(serial=1))
        status: messages.ControlStatus = self._answer(messages.ControlStatus)
        return status

    def report(self) -> NetworkReport:
        report = self.status().network
        assert report is not None
        return report

    def members(self) -> set[str]:
        """Names of the members it knows."""
        return {row["name"] for row in self.do("members")}

    def invite(self, **arguments: Any) -> str:
        return str(self.do("invite", **arguments)["token"])

    def knows(self, *others: NetworkNode) -> bool:
        """Whether its shard knows exactly these peers, and has sessions with them."""
        self.pump()
        wanted = {other.peer_id for other in others}
        return self.peers.keys() == wanted and wanted <= self.sessions.keys()

    def reaches(self, other: NetworkNode) -> bool:
        """Whether its shard was given a session with that one."""
        self.pump()
        return other.peer_id in self.sessions

    def stop(self) -> None:
        assert self.control.stop() == 0

    def kill(self) -> None:
        self.control.process.kill()
        self.control.process.wait()

    def __enter__(self) -> NetworkNode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.__exit__(kind, error, trace)
