"""Nodes that gossip over a network in memory: messages arrive hop by hop, in rounds."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable

from membership_world import NOW, directory

from vpnd.membership.gossip import Gossip, Outcome
from vpnd.membership.statements import Statement, parse_untrusted

_parsed: dict[bytes, Statement] = {}


def parse_once(wire: bytes) -> Statement:
    """Signatures are verified once for all nodes of a test; what is measured is the exchange."""
    if wire not in _parsed:
        _parsed[wire] = parse_untrusted(wire)
    return _parsed[wire]


class Net:
    def __init__(self, nodes: Iterable[str], *, push_bytes: int = 1 << 14, seed: int = 1) -> None:
        self.dice = random.Random(seed)
        self.push_bytes = push_bytes
        self.interval_ms = 5000
        self.request_ms = 2000
        self.presence_ms = 1000
        self.now_ms = NOW
        self.directories = {node: directory(parse_once) for node in nodes}
        self.gossips = {node: self.gossip(node) for node in self.directories}
        self.way: deque[tuple[str, str, bytes]] = deque()
        self.messages = self.bytes = self.hops = 0
        self.refused: list[str] = []
        self.received: Counter[str] = Counter()

    def gossip(self, node: str) -> Gossip:
        return Gossip(
            self.directories[node],
            interval_ms=self.interval_ms,
            push_bytes=self.push_bytes,
            request_ms=self.request_ms,
            presence_ms=self.presence_ms,
            choose=self.dice.choice,
        )

    def connect(self, one: str, other: str) -> None:
        self._send(other, self.gossips[other].connected(one, self.now_ms, dialed=False))
        self._send(one, self.gossips[one].connected(other, self.now_ms, dialed=True))

    def publish(self, node: str, *statements: Statement) -> None:
        self._send(node, self.gossips[node].publish(statements, self.now_ms))

    def deliver(self, sender: str, receiver: str, data: bytes) -> None:
        self.received[receiver] += 1
        self._send(receiver, self.gossips[receiver].receive_untrusted(sender, data, self.now_ms))

    def run(self) -> None:
        """Until no message is on its way; `hops` counts how often everything that was sent had arrived."""
        while self.way:
            self.hops += 1
            for _ in range(len(self.way)):
                self.deliver(*self.way.popleft())

    def tick(self, node: str) -> None:
        self._send(node, self.gossips[node].tick(self.now_ms))

    def round(self) -> None:
        """One interval: every node compares with one neighbour."""
        self.now_ms += self.interval_ms
        for node in self.gossips:
            self.tick(node)
        self.run()

    def equal(self) -> bool:
        return len({held.index.root() for held in self.directories.values()}) == 1

    def _send(self, node: str, outcome: Outcome) -> None:
        self.refused += outcome.refused
        for receiver, data in outcome.send:
            self.messages += 1
            self.bytes += len(data)
            self.way.append((node, receiver, data))
