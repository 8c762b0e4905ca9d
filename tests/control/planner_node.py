"""A planner with its book, as a test drives it."""

from __future__ import annotations

from typing import Any

from vpnd.config.live import Live
from vpnd.config.schema import P2P, CircuitBreaker, Config, Retry
from vpnd.control.book import Held, SessionBook
from vpnd.control.dialstate import NEVER, Dial
from vpnd.control.planner import Planner
from vpnd.discovery.registry import Member

STAGGER_S = 0.4
INITIAL_S = 1.0  # first wait, and the pace
CEILING_S = 4.0
RESET_S = 10.0


def member(peer_id: str, addresses: tuple[str, ...] = ("/ip4/192.0.2.1/tcp/4001",)) -> Member:
    return Member(peer_id=peer_id, name=peer_id, prefixes=(), addresses=addresses)


def settings(*, retry: dict[str, Any] | None = None, sessions: int = 64, **breaker: Any) -> Config:
    """Circuits that open after 100 failures, for 10 s, unless said otherwise."""
    return Config(
        p2p=P2P(dial_stagger=STAGGER_S, max_sessions_per_peer=sessions),
        retry=Retry(
            **{"max_attempts": 100, "initial_interval": INITIAL_S, "max_interval": CEILING_S} | (retry or {})
        ),
        circuit_breaker=CircuitBreaker(**{"failure_threshold": 100, "reset_timeout": RESET_S} | breaker),
    )


class Node:
    """Waits are always as long as they may be: 1 s, 2 s, 4 s, 4 s …"""

    def __init__(
        self, own_id: str, *members: Member, config: Config | None = None, met: tuple[str, ...] = ()
    ) -> None:
        """`met`: who can be reached by a meeting alone."""
        self.book = SessionBook(lambda bits: 0)
        self.live = Live(config or settings())
        self.planner = Planner(
            own_id,
            members,
            self.book,
            self.live,
            lambda low, high: high,
            met.__contains__,
            lambda member: member.peer_id in met,
        )
        self.flying: dict[tuple[str, int], Dial] = {}

    def due(self, now_s: float) -> list[tuple[str, int]]:
        """Start what is due: (peer, shard) of each dial."""
        dials = self.planner.take_due(now_s)
        self.flying.update({(dial.member.peer_id, dial.shard): dial for dial in dials})
        return [(dial.member.peer_id, dial.shard) for dial in dials]

    def fail(self, peer_id: str, shard: int, now_s: float, error: str = "refused") -> bool:
        """A dial under way fails."""
        return self.planner.dial_ended(self.flying.pop((peer_id, shard)), error, now_s)

    def succeed(self, peer_id: str, shard: int, now_s: float, *, up: bool = True) -> int:
        """A dial under way ends in a session."""
        session_id = self.enter(peer_id, shard, now_s, initiator=True)
        self.planner.dial_ended(self.flying.pop((peer_id, shard)), "", now_s)
        if up:
            self.up(session_id, shard)
        return session_id

    def enter(self, peer_id: str, shard: int, now_s: float, *, initiator: bool = False) -> int:
        """A session was made: by the peer, unless said otherwise."""
        session_id = self.book.new_id()
        self.book.add(Held(session_id, peer_id, shard, initiator, now_s))
        self.planner.session_added(peer_id)
        return session_id

    def up(self, session_id: int, shard: int = 0) -> None:
        held = self.book.up(session_id, shard)
        assert held is not None
        self.planner.session_up(held)

    def lose(self, session_id: int, shard: int, now_s: float, *, failed: bool = True) -> None:
        held = self.book.down(session_id, shard)
        assert held is not None
        self.planner.session_down(held, "gone", failed, now_s)

    def shard_left(self, shard: int, now_s: float = 0.0) -> None:
        self.book.shard_left(shard)
        self.planner.shard_left(shard, now_s)
        self.flying = {pair: dial for pair, dial in self.flying.items() if pair[1] != shard}

    def want(
        self, peer_id: str, now_s: float, *, shard: int = 0, sessions: int = 1, urgent: bool = True
    ) -> None:
        self.planner.wanted(peer_id, shard, sessions, urgent, now_s)

    def state(self, now_s: float = 0.0) -> str:
        return self.planner.report(now_s)[0].state

    def circuit(self) -> str:
        return self.planner.report(0.0)[0].circuit

    def next_s(self) -> float:
        return self.planner.next_due_s()

    def fail_on(self, times: int, now_s: float = 0.0) -> float:
        """So many dials for shard 0 of m, each as soon as it is due, fail at once; returns the moment of the last."""
        for _ in range(times):
            now_s = max(now_s, self.next_s())
            assert now_s < NEVER
            assert self.due(now_s) == [("m", 0)]
            self.fail("m", 0, now_s)
        return now_s
