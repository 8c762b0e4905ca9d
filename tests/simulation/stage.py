"""Two or three nodes for a test that says itself what happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from msgspec import structs

from shards.session.link import Link
from simulation.network import Connection
from simulation.node import Node
from simulation.world import World
from vpnd.config.schema import P2P, Carrier, Config

#: How finely `Stage.until` looks.
STEP_S = 0.005
Settings = dict[str, dict[str, Any]]


def changed(config: Config, settings: Settings) -> Config:
    """A configuration with some settings of some tables changed."""
    tables = {name: structs.replace(getattr(config, name), **values) for name, values in settings.items()}
    return structs.replace(config, **tables)


class Stage:
    """A world that has begun. Times are from its beginning."""

    def __init__(self, world: World) -> None:
        self.world, self.begun_s = world, world.loop.now_s
        self.a, self.b = world.nodes["a"], world.nodes["b"]

    @property
    def now_s(self) -> float:
        return self.world.loop.now_s - self.begun_s

    def run(self, seconds: float) -> None:
        self.world.loop.run_until(self.world.loop.now_s + seconds)
        self.world.check()

    def until(self, holds: Callable[[], object], within_s: float) -> float:
        """Run until something holds: how long it took."""
        since_s = self.now_s
        while not holds():
            assert self.now_s - since_s < within_s, "it did not happen in time"
            self.world.loop.run_until(self.world.loop.now_s + STEP_S)
        self.world.check()
        return self.now_s - since_s

    def links(self, node: Node | None = None) -> list[Link]:
        return list((node or self.a).plane.links.values())

    def connection(self) -> Connection:
        """The oldest one that is open."""
        return next(each for each in self.world.network.connections if each.open())

    def connection_of(self, link: Link) -> Connection:
        """What a session of `a` goes over."""
        return self.a.connections[link.session_id]

    def cut(self, cut: bool = True) -> None:
        self.world.network.set_cut("a", "b", cut)

    def block_tcp(self, blocked: bool = True) -> None:
        """Datagrams pass."""
        self.world.network.set_cut("a", "b", blocked, tcp_alone=True)

    def send(self, port: int = 1, count: int = 1, size: int = 100, *, back: bool = False) -> None:
        one, other = (self.b, self.a) if back else (self.a, self.b)
        self.world.send(one, other, port, count, size)

    def burst(self, ports: Iterable[int], packets: int, size: int = 1400) -> None:
        """`packets` of each port, all in one batch, by turns."""
        self.world.send_many(self.a, self.b, [port for _ in range(packets) for port in ports], size)

    def flood(self, seconds: float, packets: int = 30, flows: int = 1) -> None:
        """`packets` of 1400 bytes each hundredth of a second, from port 100 on by turns."""
        for step in range(round(seconds * 100)):
            self.send(100 + step % flows, packets, 1400)
            self.run(0.01)

    def reload(self, node: Node, **settings: dict[str, Any]) -> None:
        node.configure(changed(node.live.config, settings))


@contextmanager
def stage(
    *,
    names: str = "ab",
    delay_s: float = 0.001,
    rate: float = 1e8,
    up: bool = True,
    **settings: dict[str, Any],
) -> Iterator[Stage]:
    """All nodes have these settings, and streams alone unless those say otherwise; `up`: wait until everybody has a
    session with everybody."""
    world = World(Random(7), delay_s=delay_s, rate=rate)
    config = Config(p2p=P2P(dial_stagger=0.1), carrier=Carrier(choice="streams"))
    config = changed(config, settings)
    with world.loop.running():
        for name in names:
            world.add(name, config)
        world.introduce()
        played = Stage(world)
        if up:
            everybody = len(names) - 1
            played.until(lambda: all(_reached(node) == everybody for node in world.nodes.values()), 2.0)
        yield played


def _reached(node: Node) -> int:
    return sum(bool(peer.pool.usable()) for peer in node.plane.peers)
