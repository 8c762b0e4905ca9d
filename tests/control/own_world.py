"""One node's part in a network inside the test's process: its clock is the test's, or trio's made-up one."""

from __future__ import annotations

import functools
import hashlib
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vpnd import peerid
from vpnd.adapter.dial import DialError
from vpnd.config.live import Live
from vpnd.config.schema import Config, Discovery, Membership, Network
from vpnd.control.common import Common
from vpnd.control.founding import Founding
from vpnd.control.state import OwnNetwork
from vpnd.logs import Seldom
from vpnd.membership.authority import Authority, Wish
from vpnd.membership.directory import Merged
from vpnd.membership.statements import Presence, Statement, sign
from vpnd.membership.store import Store

#: When all begins, in milliseconds since 1970.
BEGUN_MS = 1_700_000_000_000


def key_of(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


@functools.cache
def peer_id_of(name: str) -> str:
    return peerid.from_public_key(key_of(name).public_key().public_bytes_raw())


def on_a_made_up_clock(main: Callable[[], Awaitable[None]]) -> None:
    """Waiting costs nothing: trio's clock jumps to whatever is due next."""
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def trio_ms() -> int:
    """The wall clock of a test on trio's clock. It runs inside `on_a_made_up_clock` only."""
    return BEGUN_MS + round(trio.current_time() * 1000)


class NobodyAnswers:
    """A host without a network. `asked`, `dialed`: peer ids and when, in seconds of trio's clock."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []
        self.dialed: list[tuple[float, str]] = []
        self.desk = self

    def open(self, *_: object) -> None:
        """The desk's: nobody comes."""

    def introduce_by(self, introduce: object) -> None:
        """Nobody turns anybody away."""

    def serve(self, *_: object) -> None:
        """Nobody comes."""

    def listen_addresses(self) -> tuple[str, ...]:
        return ("/ip4/192.0.2.1/tcp/4001",)

    async def ask(
        self, addresses: object, peer_id: str, request: bytes, most: int, *, relays: object
    ) -> bytes:
        self.asked.append((trio.current_time(), peer_id))
        raise DialError("nobody is there")

    async def open_stream(self, addresses: object, peer_id: str, protocol: str) -> Any:
        self.dialed.append((trio.current_time(), peer_id))
        raise DialError("nobody is there")


class OwnWorld:
    """The node "me", which has made a network. Others are let in by its authority.

    `membership`: settings of [membership].
    """

    def __init__(
        self,
        path: Path,
        *,
        now_ms: Callable[[], int] = lambda: BEGUN_MS,
        network: Network | None = None,
        discovery: Discovery | None = None,
        **membership: Any,
    ) -> None:
        self.config = Config(
            membership=Membership(**membership),
            network=network or Network(),
            discovery=discovery or Discovery(),
        )
        self.counts: Counter[str] = Counter()
        self.now_ms = now_ms
        self.dice = random.Random(7)
        self.store = Store(path / "network")

    def count(self, name: str) -> None:
        self.counts[name] += 1

    def common(self, live: Live | None = None) -> Common:
        live = live or Live(self.config)
        seldom = Seldom(logging.getLogger("test"), live, trio.current_time)
        return Common(live, self.count, seldom, trio.current_time, self.now_ms, self.dice)

    def founding(self) -> Founding:
        return Founding(
            self.store, self.common(), peer_id=peer_id_of("me"), node_name="me", identity=key_of("me")
        )

    async def enter(self) -> OwnNetwork:
        self.own = await self.founding().enter(NobodyAnswers(), "")
        return self.own

    @property
    def authority(self) -> Authority:
        assert self.own.authority is not None
        return self.own.authority

    def merge(self, *statements: Statement, at_ms: int | None = None) -> Merged:
        wires = [statement.wire for statement in statements]
        return self.own.directory.merge(wires, self.now_ms() if at_ms is None else at_ms)

    def enrol(self, name: str, **wish: Any) -> Statement:
        """Let in, and known to be somewhere."""
        statement = self.authority.enrol(peer_id_of(name), Wish(name=name, **wish), self.now_ms())
        assert not self.merge(statement, self.presence(name, **wish)).refused
        return statement

    def presence(self, name: str, later_ms: int = 0, routes: tuple[str, ...] = (), **_: Any) -> Statement:
        body = Presence(
            self.own.network.id,
            peer_id=peer_id_of(name),
            addresses=("/ip4/192.0.2.9/tcp/4001",),
            sequence_ms=self.now_ms() + later_ms,
            routes=routes,
        )
        return sign(key_of(name), body)
