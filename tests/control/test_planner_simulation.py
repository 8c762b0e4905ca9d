"""A simulated node: what must hold whatever happens, in whatever order."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from planner_node import CEILING_S, INITIAL_S, RESET_S, STAGGER_S, Node, member, settings

from vpnd.control.planner import NEVER

SHARDS = range(3)
LIMIT = 6


class Simulation:
    """Chance plays the world; what the planner does is checked at every step."""

    def __init__(self, rng: random.Random, own_id: str) -> None:
        self.rng = rng
        self.node = Node(
            own_id,
            member("m"),
            member("n", ()),
            config=settings(
                failure_threshold=rng.randint(1, 4),
                success_threshold=rng.randint(1, 2),
                sessions=LIMIT,
                retry={"max_attempts": rng.randint(1, 6)},
            ),
        )
        self.now_s = 0.0
        self.shards: set[int] = set()
        self.wanted: dict[int, int] = {}
        self.last: dict[tuple[str, int], float] = {}
        self.opened_s = -NEVER
        self.circuit = "closed"

    def watch(self) -> None:
        """Take in the changes of circuits: they follow each other without a gap."""
        for change in self.node.planner.take_circuit_changes():
            if change.member.peer_id == "m":
                assert change.old == self.circuit
                self.circuit = change.new
                if change.new == "open":
                    self.opened_s = self.now_s
        assert self.node.planner.circuits().get("m", "closed") == self.circuit

    def dial(self) -> None:
        """Start what is due, and check that it may be."""
        node = self.node
        before, connected = set(node.flying), node.book.connected("m")
        blocked = self.circuit == "open" and self.now_s < self.opened_s + RESET_S
        trial = node.book.on_trial("m")
        probing = self.circuit == "half_open" and (before or trial) and node.planner.next_due_s() == NEVER
        taken = node.due(self.now_s)
        for pair in taken:
            assert pair not in before and pair[0] == "m" and pair[1] in self.shards
            assert node.book.count_of(*pair) < self.wanted.get(pair[1], 1)
            assert self.now_s - self.last.get(pair, -NEVER) >= INITIAL_S
            self.last[pair] = self.now_s
        assert not (taken and blocked and not connected), "a dial while the circuit is open"
        assert not (taken and probing)
        self.watch()
        if self.circuit != "closed" and not connected:
            assert len(taken) <= 1 and not (taken and before), "two probes at once"
            assert not (taken and self.circuit == "open")
        assert not taken or node.book.count("m") + len(node.flying) <= LIMIT
        assert node.book.count("m") <= LIMIT

    def succeed(self, pair: tuple[str, int], *, up: bool) -> None:
        """A dial gets through; as in control its session is given up if inbound ones have taken its place."""
        if self.node.book.count("m") < LIMIT:
            self.node.succeed(*pair, self.now_s, up=up)
        else:
            self.node.planner.dial_ended(self.node.flying.pop(pair), "", self.now_s)

    def step(self) -> None:
        node, rng, now_s = self.node, self.rng, self.now_s
        shard = rng.choice(SHARDS)
        what = rng.choice(
            (
                "arrive",
                "leave",
                "fail",
                "fail",
                "succeed",
                "up",
                "down",
                "inbound",
                "want",
                "network",
                "reload",
            )
        )
        flying = sorted(node.flying)
        held = sorted(node.book.sessions(), key=lambda one: one.session_id)
        if what == "arrive" and shard not in self.shards:
            self.shards.add(shard)
            node.planner.shard_ready(shard, now_s)
        elif what == "leave" and shard in self.shards:
            self.shards.discard(shard)
            node.shard_left(shard)
            self.wanted.pop(shard, None)
            self.last = {pair: at_s for pair, at_s in self.last.items() if pair[1] != shard}
        elif what == "fail" and flying:
            node.fail(*rng.choice(flying), now_s)
        elif what == "succeed" and flying:
            self.succeed(rng.choice(flying), up=rng.random() < 0.5)
        elif what == "up" and held:
            one = rng.choice(held)
            node.up(one.session_id, one.shard)
        elif what == "down" and held:
            one = rng.choice(held)
            node.lose(one.session_id, one.shard, now_s, failed=rng.random() < 0.7)
        elif what == "inbound" and shard in self.shards and node.book.count("m") < LIMIT:
            node.enter(rng.choice("mn"), shard, now_s)
        elif what == "want":
            sessions = rng.randint(0, 4)
            node.want("m", now_s, shard=shard, sessions=sessions, urgent=rng.random() < 0.5)
            if shard in self.shards:
                self.wanted[shard] = sessions
        elif what == "network" and rng.random() < 0.2:
            node.planner.network_changed()
            node.flying.clear()
            self.last.clear()
        elif what == "reload" and rng.random() < 0.1:
            node.planner.member_removed("m")
            node.planner.member_added(member("m"), now_s)
            node.flying.clear()
            self.wanted.clear()
            self.last.clear()
            node.planner.take_circuit_changes()
            self.circuit = "closed"
        self.watch()

    def recover(self) -> None:
        """From now on every dial succeeds: within the longest wait every shard has what it wants."""
        node = self.node
        for pair in sorted(node.flying):
            self.succeed(pair, up=True)
        for one in list(node.book.sessions()):
            if not one.up:
                node.up(one.session_id, one.shard)
        until_s = self.now_s + max(CEILING_S, RESET_S) + STAGGER_S + len(SHARDS) * 4 * INITIAL_S
        while node.next_s() <= until_s:
            self.now_s = max(self.now_s, node.next_s())
            for pair in node.due(self.now_s):
                node.succeed(*pair, self.now_s)
        lacking = [s for s in self.shards if node.book.count_of("m", s) < self.wanted.get(s, 1)]
        assert not lacking or node.book.count("m") >= LIMIT
        assert node.next_s() == NEVER


@given(st.randoms(use_true_random=False), st.sampled_from(("a", "z")))
def test_no_rule_is_broken_and_a_reachable_peer_is_reached(rng: random.Random, own_id: str) -> None:
    simulation = Simulation(rng, own_id)
    for _ in range(100):
        simulation.now_s += rng.choice((0.0, 0.01, 0.3, 2.0, 11.0))
        simulation.dial()
        simulation.step()
    simulation.recover()


@given(st.randoms(use_true_random=False))
def test_two_nodes_that_want_more_do_not_outdo_each_other(rng: random.Random) -> None:
    """Both want two sessions from one shard each; each dial reaches the other side's book after a moment."""
    nodes = {"a": Node("a", member("z")), "z": Node("z", member("a"))}
    now_s = 0.0
    arriving: list[tuple[float, str, str]] = []
    for name, node in nodes.items():
        node.planner.shard_ready(0, now_s)
        node.want({"a": "z", "z": "a"}[name], now_s, sessions=2, urgent=False)
    while now_s < 30.0:
        for entry in [entry for entry in arriving if entry[0] <= now_s]:
            arriving.remove(entry)
            _, dialer, other = entry
            nodes[dialer].succeed(other, 0, now_s)
            nodes[other].up(nodes[other].enter(dialer, 0, now_s))
        for name, node in nodes.items():
            for peer_id, _ in node.due(now_s):
                arriving.append((now_s + rng.uniform(0.0, STAGGER_S / 2), name, peer_id))
        now_s += 0.05
    assert not arriving
    assert nodes["a"].book.count("z") == nodes["z"].book.count("a") == 2
