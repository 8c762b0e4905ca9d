"""What happens in one run, drawn from a seed: traffic, faults, changes; then calm, and what must hold then."""

from __future__ import annotations

import functools
from collections.abc import Callable
from random import Random

from msgspec import structs

from simulation.network import Connection
from simulation.node import Node
from simulation.packets import ORDERED_FROM
from simulation.world import SMALL_PORTS, World
from vpnd.config.schema import (
    P2P,
    Carrier,
    CircuitBreaker,
    Config,
    Health,
    Multiplexer,
    Retry,
    Session,
    StreamPool,
    Worker,
)

BULK_PORTS = (100, 101, ORDERED_FROM, ORDERED_FROM + 1)
#: Soon, for a packet of a small flow between two nodes nothing is wrong with.
SOON_S = 2.0
CHECK_S = 0.05
#: Everything is noticed, given up, dialed again and closed in so long after the end: without faults, with.
CALM_S = {False: 2.0, True: 8.0}
#: And in so much more a packet is there.
ARRIVAL_S = 1.0
#: Nothing much is going on then.
CALM_INTERVAL_S = 0.4
FOREVER_S = 1e6
NO_LIMIT_BYTES = 1 << 50
MANY_PACKETS = 1 << 16


def settings(random: Random) -> Config:
    """A configuration in which everything happens within seconds."""
    least = random.randint(1, 3)
    sessions = random.randint(1, 2)
    return Config(
        p2p=P2P(dial_stagger=random.choice((0.0, 0.05)), connect_timeout=0.3, max_sessions_per_peer=16),
        worker=Worker(
            buffer_size=random.choice((32, MANY_PACKETS)),
            pending_bytes=1 << 30,
            pending_timeout=random.choice((1.0, 3.0)),
            cleanup_interval=0.5,
            idle_timeout=random.choice((2.0, 60.0)),
        ),
        session=Session(
            window_bytes=1 << 18,
            send_buffer_bytes=1 << 17,
            receive_buffer_bytes=1 << 17,
            queue_bytes=random.choice((1 << 17, 1 << 20)),
            not_sent_lowat_bytes=random.choice((1 << 14, 1 << 18)),
            quantum_bytes=random.choice((1 << 11, 1 << 16)),
            max_age=random.choice((1.0, 3.0, FOREVER_S)),
            max_bytes=random.choice((1 << 20, NO_LIMIT_BYTES)),
            user_timeout=random.choice((1.0, 15.0)),
            negotiate_timeout=1.0,
            close_timeout=1.0,
            drain_timeout=2.0,
        ),
        stream_pool=StreamPool(
            min_streams_per_peer=least,
            max_streams_per_peer=random.randint(max(least, sessions), 6),
            idle_timeout=random.choice((0.3, 2.0)),
            cleanup_interval=random.choice((0.05, 0.3)),
        ),
        multiplexer=Multiplexer(
            min_sessions=sessions,
            max_sessions=random.randint(sessions, 3),
            auto_scaling_interval=random.choice((0.05, 0.25)),
            busy_bytes=random.choice((1 << 12, 1 << 16, 1 << 21)),
        ),
        health=Health(
            interval=random.choice((0.3, 1.5)),
            idle_interval=0.9,
            timeout=0.4,
            max_consecutive_failures=random.randint(1, 3),
            urgent_timeout=0.3,
            warm_interval=1.0,
        ),
        retry=Retry(initial_interval=0.1, max_interval=0.5, max_attempts=random.randint(1, 5)),
        carrier=Carrier(
            choice=random.choice(("streams", "auto", "datagrams")),
            least_rtt=random.choice((0.0, 0.03)),
            probe_interval=0.1,
            probe_timeout=0.3,
            stall_timeout=random.choice((0.2, 0.5)),
            retry_interval=0.5,
        ),
        circuit_breaker=CircuitBreaker(failure_threshold=random.randint(1, 4), reset_timeout=0.5),
    )


#: In a datagram.
MOST_RECORDS = 20


class Run:
    """One run. `faulty`: whether anything bad happens at all; without, nothing may be lost or late."""

    def __init__(self, seed: int, *, faulty: bool) -> None:
        self.random = random = Random(seed)
        self.world = World(
            random,
            delay_s=random.choice((0.0001, 0.002, 0.02, 0.05)),
            rate=random.choice((1e6, 5e6, 2e7)),
            buffer=random.choice((1 << 15, 1 << 17)),
        )
        self._config = settings(random)
        self._faulty, self._interrupted = faulty, False
        self._small_buffers = self._config.worker.buffer_size < MANY_PACKETS
        self._ends_s = 0.0
        self._acts: list[Callable[[], None]] = [self.begin_small, self.begin_bulk] * 3 + [self.burst] * 4
        self._acts += [self.notice_network, self.reload, self.rotate, self.rotate, self.announce]
        if faulty:
            self._acts += [self.block_tcp] * 3
            self._acts += [self.cut, self.cut, self.reset, self.vanish, self.pause, self.roam, self.forget]

    def play(self) -> World:
        """All of it; AssertionError when something does not hold."""
        world, random = self.world, self.random
        with world.loop.running():
            network = world.network
            network.udp_jitter, network.udp_doubled = random.choice((0.0, 2.0)), random.choice((0.0, 0.05))
            network.udp_loss = random.choice((0.0, 0.05)) if self._faulty else 0.0
            for name in "abc"[: random.randint(2, 3)]:
                world.add(name, self._config)
            world.introduce()
            begun_s = world.loop.now_s
            self._ends_s = begun_s + random.uniform(1.0, 5.0)
            self._check()
            for _ in range(random.randint(5, 30)):
                at_s = random.uniform(begun_s, self._ends_s)
                world.loop.call_at(at_s, random.choice(self._acts))
            world.loop.run_until(self._ends_s)
            self._calm_down()
        return world

    def _check(self) -> None:
        self.world.check()
        calm = self.world.loop.now_s >= self._ends_s
        self.world.loop.call_later(CALM_INTERVAL_S if calm else CHECK_S, self._check)

    def _calm_down(self) -> None:
        """Nothing goes wrong any more, and no session is replaced any more."""
        world = self.world
        world.network.udp_loss = 0.0
        for node in world.nodes.values():
            for other in world.nodes.values():
                if node is not other:
                    world.network.set_cut(node.name, other.name, False)
                    world.network.set_cut(node.name, other.name, False, tcp_alone=True)
                    node.know(world.member(other))
            self._change(
                node,
                session={"max_age": FOREVER_S, "max_bytes": NO_LIMIT_BYTES},
                stream_pool={"cleanup_interval": CALM_INTERVAL_S, "idle_timeout": CALM_INTERVAL_S},
                multiplexer={"auto_scaling_interval": CALM_INTERVAL_S},
            )
        calm_s = CALM_S[self._faulty]
        world.loop.run_until(self._ends_s + calm_s)
        for node in world.nodes.values():
            self._change(node, stream_pool={"idle_timeout": FOREVER_S})
        for node in world.nodes.values():
            for other in world.nodes.values():
                if node is not other:
                    world.send(node, other, SMALL_PORTS[0], 1, 0)
        world.loop.run_until(self._ends_s + calm_s + ARRIVAL_S)
        for node in world.nodes.values():
            for other in world.nodes.values():
                if node is not other:
                    arrived = world.last_arrived(node, other, SMALL_PORTS[0])
                    assert arrived, (
                        f"{node.name} does not reach {other.name} though nothing is wrong any more"
                    )
        assert world.slowest_s <= SOON_S, f"a packet between healthy nodes took {world.slowest_s:.2f} s"
        world.conclude()
        if not self._faulty:
            self._nothing_was_lost()

    def _nothing_was_lost(self) -> None:
        """Of a run without faults: the only packets that did not arrive were more than the queues may hold, or
        waited for too long in one."""
        world = self.world
        assert not world.given_up
        for node in world.nodes.values():
            drops = {reason for reason, count in node.plane.counts.drops.items() if count}
            allowed = {"flow_full", "queue_full", "queue_delay"}
            if self._small_buffers:
                allowed.add("no_session")  # more than worker.buffer_size came before the first session
            if self._interrupted:
                allowed |= {"no_session", "circuit_open"}  # the first dials were, which may open a circuit
            assert drops <= allowed, f"{node.name} dropped packets: {drops - allowed}"
        arrived = sum(node.plane.counts.packets_to_tun for node in world.nodes.values())
        dropped = sum(sum(node.plane.counts.drops.values()) for node in world.nodes.values())
        over = sum(node.plane.counts.datagrams_over for node in world.nodes.values())
        assert 0 <= world.packets - arrived - dropped <= over * MOST_RECORDS

    # --- who

    def _pair(self) -> tuple[Node, Node]:
        one, other = self.random.sample(sorted(self.world.nodes), 2)
        return self.world.nodes[one], self.world.nodes[other]

    def _trouble(self, *pairs: tuple[Node, Node]) -> None:
        for one, other in pairs:
            self.world.troubled.add(frozenset((one.name, other.name)))

    def _all_of(self, node: Node) -> list[tuple[Node, Node]]:
        return [(node, other) for other in self.world.nodes.values() if other is not node]

    # --- traffic

    def burst(self) -> None:
        """Many packets at once, of one bulk flow."""
        source, destination = self._pair()
        port = self.random.choice(BULK_PORTS)
        size = self.random.choice((60, 1400, 1400, 30_000))
        count = self.random.randint(1, 60 if size < 2000 else 12)
        self.world.note(f"{source.name} → {destination.name}: {count} packets of {size} bytes")
        self.world.send(source, destination, port, count, size)

    def begin_small(self) -> None:
        """A flow that sends a little at a time."""
        self._go_on(self._pair(), self.random.choice(SMALL_PORTS), 2, 100, self.random.randint(1, 100))

    def begin_bulk(self) -> None:
        """A flow that has much to send."""
        size = self.random.choice((100, 1400))
        self._go_on(self._pair(), self.random.choice(BULK_PORTS), 20, size, self.random.randint(1, 100))

    def _go_on(self, pair: tuple[Node, Node], port: int, most: int, size: int, left: int) -> None:
        random = self.random
        self.world.send(*pair, port, random.randint(1, most), size)
        wait_s = random.choice((0.0, 0.001, 0.01, 0.05)) * random.random()
        if left and self.world.loop.now_s + wait_s < self._ends_s:
            self.world.loop.call_later(wait_s, self._go_on, pair, port, most, size, left - 1)

    # --- changes that cost nothing

    def notice_network(self) -> None:
        """The machine says its network changed; nothing has."""
        node, _ = self._pair()
        self.world.note(f"{node.name}: network changed")
        self._interrupted |= bool(node.dials)
        node.network_changed()

    def reload(self) -> None:
        """Other settings."""
        node, _ = self._pair()
        self.world.note(f"{node.name}: other settings")
        config = settings(self.random)
        self._small_buffers |= config.worker.buffer_size < MANY_PACKETS
        node.configure(config)

    def announce(self) -> None:
        """A peer has another network behind it from now on, or no longer."""
        node, other = self._pair()
        if member := node.members.get(other.name):
            base, *more = member.prefixes
            prefixes = (base,) if more else (base, f"10.87.{other.source & 0xFF}.0/24")
            self.world.note(f"{node.name}: {other.name} has {prefixes}")
            node.know(structs.replace(member, prefixes=prefixes))

    def rotate(self) -> None:
        """Replace sessions now."""
        node, _ = self._pair()
        before = node.live.config.session.max_age
        self._change(node, session={"max_age": 1.0})
        self.world.loop.call_later(0.5, self._change_age, node, before)

    def _change_age(self, node: Node, age_s: float) -> None:
        if self.world.loop.now_s < self._ends_s:
            self._change(node, session={"max_age": age_s})

    def _change(self, node: Node, **tables: dict[str, object]) -> None:
        config = node.live.config
        changed = {name: structs.replace(getattr(config, name), **values) for name, values in tables.items()}
        node.configure(structs.replace(config, **changed))

    # --- faults

    def cut(self) -> None:
        """Two nodes do not hear each other for a while."""
        one, other = self._pair()
        self._trouble((one, other))
        self.world.network.set_cut(one.name, other.name, True)
        wait_s = self.random.choice((0.05, 0.5, 2.0))
        self.world.note(f"{one.name} | {other.name} for {wait_s} s")
        self.world.loop.call_later(wait_s, self.world.network.set_cut, one.name, other.name, False)

    def block_tcp(self) -> None:
        """TCP does not pass between two nodes for a while, datagrams do."""
        one, other = self._pair()
        self._trouble((one, other))
        network, wait_s = self.world.network, self.random.choice((0.05, 0.5, 2.0))
        network.set_cut(one.name, other.name, True, tcp_alone=True)
        self.world.note(f"no TCP between {one.name} and {other.name} for {wait_s} s")
        again = functools.partial(network.set_cut, one.name, other.name, False, tcp_alone=True)
        self.world.loop.call_later(wait_s, again)

    def _connection(self) -> Connection | None:
        open_ones = [connection for connection in self.world.network.connections if connection.open()]
        if not open_ones:
            return None
        connection = self.random.choice(open_ones)
        one, other = connection.nodes
        self._trouble((self.world.nodes[one], self.world.nodes[other]))
        return connection

    def reset(self) -> None:
        if connection := self._connection():
            self.world.note(f"reset of {connection.nodes}")
            connection.reset()

    def vanish(self) -> None:
        if connection := self._connection():
            self.world.note(f"{connection.nodes} is half-open")
            connection.vanish()

    def pause(self) -> None:
        if connection := self._connection():
            end, seconds = self.random.randrange(2), self.random.choice((0.2, 1.0, 3.0))
            self.world.note(f"{connection.nodes[end]} of {connection.nodes} is not read for {seconds} s")
            connection.pause(end, seconds)

    def roam(self) -> None:
        """A node is somewhere else; the others learn of it a moment later."""
        node, _ = self._pair()
        self._trouble(*self._all_of(node))
        for connection in self.world.network.connections:
            if node.name in connection.pair and connection.open():
                connection.vanish()
        node.place = f"198.51.100.{self.random.randrange(1, 255)}"
        self.world.note(f"{node.name} is at {node.place}")
        node.network_changed()
        for other in self.world.nodes.values():
            if node.name in other.members:
                self.world.loop.call_later(self.random.uniform(0.0, 1.0), self._learn, other, node)

    def _learn(self, node: Node, other: Node) -> None:
        if other.name in node.members:
            node.know(self.world.member(other))

    def forget(self) -> None:
        """A peer is removed, and comes back, perhaps."""
        node, other = self._pair()
        self._trouble((node, other))
        self.world.note(f"{node.name} forgets {other.name}")
        node.forget(other.name)
        if self.random.random() < 0.5:
            self.world.loop.call_later(self.random.uniform(0.0, 1.0), self._remember, node, other)

    def _remember(self, node: Node, other: Node) -> None:
        self.world.note(f"{node.name} knows {other.name}")
        node.know(self.world.member(other))


def play(seed: int) -> World:
    """The run of a seed; those of even seeds are without faults."""
    return Run(seed, faulty=bool(seed % 2)).play()
