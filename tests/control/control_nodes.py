"""Hosts inside the test's process, which keep what is handed over to them."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from libp2p.utils import encode_delim
from multiaddr import Multiaddr

from vpnd.adapter.handoff import Detached
from vpnd.adapter.host import Host
from vpnd.adapter.noise import peer_id_of
from vpnd.config.live import Live
from vpnd.config.schema import P2P, Config, Membership, Network, Process
from vpnd.config.schema import Session as SessionTable
from vpnd.logs import Seldom
from vpnd.session import Established

DEFAULTS = Membership()


class Node:
    """A host in this process that keeps what is handed over to it."""

    def __init__(
        self,
        *,
        listen: str = "/ip4/127.0.0.1/tcp/0",
        members: set[str] | None = None,
        cipher: str = "chachapoly",
        membership: Membership = DEFAULTS,
        **p2p: Any,
    ) -> None:
        keys = create_new_key_pair()
        self.peer_id = peer_id_of(keys)
        self.id = ID.from_string(self.peer_id)
        self.members = members  # None: everybody
        self.known: list[str] = []  # where members are
        self.counts: Counter[str] = Counter()
        self.connections = 0
        self.taken: list[Established] = []
        self.live = Live(
            Config(
                p2p=P2P(listen=(listen,), **{"dial_timeout": 2.0, "handshake_timeout": 2.0} | p2p),
                network=Network(interface="ctvpn0", virtual_ip="10.86.0.1"),
                session=SessionTable(user_timeout=7.0, cipher=cipher),
                process=Process(stop_timeout=2.0),
                membership=membership,
            )
        )
        self.host = Host(
            keys,
            self.live,
            is_member=lambda peer_id: self.members is None or peer_id in self.members,
            member_addresses=lambda: self.known,
            count=lambda name: self.counts.update((name,)),
            connections=self._told,
            seldom=Seldom(logging.getLogger("test"), self.live, trio.current_time),
        )
        self.host.take_sessions(self._take)

    def _take(self, detached: Detached) -> None:
        # The descriptor is ours only until we return; keep what can be looked at afterwards.
        self.taken.append(detached.session)
        self.options = options(detached.fd)

    def _told(self, number: int) -> None:
        self.connections = number

    @property
    def address(self) -> str:
        return self.host.listen_addresses()[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition("/")[2])

    async def connect(self, other: Node) -> Any:
        """An ordinary libp2p connection."""
        return await self.host.swarm.dial_addr(Multiaddr(other.address), other.id)


def options(fd: int) -> dict[str, int]:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return {
            "user_timeout_ms": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            "keepalive": sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            "keepalive_s": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
            "nodelay": sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
        }


@contextlib.asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node.host.running())
        yield


async def eventually(condition: Callable[[], bool], patience_s: float = 5.0) -> None:
    with trio.fail_after(patience_s):
        while not condition():
            await trio.sleep(0.01)


async def offered(node: Node, protocol: str) -> bool:
    """Whether a node agrees to a security protocol on a fresh connection."""
    stream = await trio.open_tcp_stream("127.0.0.1", node.port)
    async with stream:
        await stream.send_all(encode_delim(b"/multistream/1.0.0") + encode_delim(protocol.encode()))
        answer = b""
        with trio.move_on_after(2.0):
            while answer.count(b"\n") < 2:
                answer += await stream.receive_some(1024)
        return protocol.encode() in answer
