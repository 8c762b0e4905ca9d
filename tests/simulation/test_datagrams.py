"""Datagrams beside sessions: which flows go there, and what becomes of them when the way ends, narrows, fills up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from shards.plane import STALL_LOOKS
from simulation.packets import ORDERED_FROM
from simulation.stage import Stage, stage

UDP, TCP = 1, ORDERED_FROM


@contextmanager
def datagrams(choice: str = "auto", *, alive: bool = True, **more: Any) -> Iterator[Stage]:
    """Two nodes with datagrams beside their session, which have found each other if `alive`."""
    carrier = {"choice": choice, "least_rtt": 0.0} | more.pop("carrier", {})
    with stage(carrier=carrier, **more) as on:
        if alive:
            on.until(lambda: all(usable(node) for node in (on.a, on.b)), 3.0)
            on.run(0.5)  # and the size of what passes
        yield on


def usable(node: Any) -> bool:
    return any(link.beside is not None and link.beside.usable for link in node.plane.links.values())


def came(on: Stage, port: int) -> tuple[int, int]:
    """Of a flow from a to b: packets that came, those in datagrams among them."""
    flow = "a", "b", port
    return len(on.world._arrived[flow]), on.world.in_datagrams[flow]


@pytest.mark.setting("carrier.choice", "carrier.streams", "carrier.datagrams")
@pytest.mark.parametrize(
    ("choice", "rules", "udp", "tcp"),
    [
        ("auto", {}, 1, 0),
        ("datagrams", {}, 1, 1),
        ("auto", {"streams": ("udp",)}, 0, 0),
        ("auto", {"streams": ("udp",), "datagrams": (f"udp/{UDP}",)}, 1, 0),
        ("auto", {"datagrams": (f"tcp/{TCP}",), "streams": (f"udp/{UDP}",)}, 0, 1),
    ],
)
def test_which_flows_go_in_datagrams(choice: str, rules: dict[str, Any], udp: int, tcp: int) -> None:
    with datagrams(choice, carrier=rules, alive=choice != "streams") as on:
        for port in (UDP, TCP):
            on.send(port, count=10)
        on.run(0.5)
        assert came(on, UDP) == (10, 10 * udp)
        assert came(on, TCP) == (10, 10 * tcp)
        on.world.conclude()


def test_nothing_is_different_with_a_peer_that_takes_none() -> None:
    with datagrams() as on:
        (link,) = on.links()
        assert link.beside is not None
    with stage() as on:
        on.send(UDP)
        on.run(0.2)
        assert on.links()[0].beside is None and came(on, UDP) == (1, 0)


@pytest.mark.setting("carrier.least_rtt")
@pytest.mark.parametrize(("delay_s", "there"), [(0.0015, 0), (0.005, 20)])
def test_on_a_short_way_streams_are_as_good(delay_s: float, there: int) -> None:
    with datagrams(carrier={"least_rtt": 0.004}, alive=False, delay_s=delay_s) as on:
        on.run(2.0)
        on.send(UDP, count=20)
        on.run(0.5)
        assert came(on, UDP) == (20, there)


@pytest.mark.parametrize("blocked", ["there", "back"])
@pytest.mark.parametrize("choice", ["auto", "datagrams"])
def test_all_flows_are_on_streams_within_a_second_when_datagrams_no_longer_pass(
    choice: str, blocked: str
) -> None:
    with datagrams(choice, delay_s=0.01) as on:
        sender = on.a if blocked == "there" else on.b
        for _ in range(20):
            on.send(UDP)
            on.send(TCP)
            on.run(0.02)
        sender.udp.blocked = True
        before = on.world._numbers[("a", "b", UDP)]
        for _ in range(50):
            on.send(UDP)
            on.send(TCP)
            on.run(0.02)
        on.run(0.3)
        for port in (UDP, TCP):
            arrived = on.world._arrived[("a", "b", port)]
            assert set(range(before + 49, before + 50)) <= arrived
        # and back again when they do
        sender.udp.blocked = False
        on.until(lambda: usable(on.a), 6.0)
        on.run(1.0)
        there = came(on, UDP)[1]
        for _ in range(10):
            on.send(UDP)
            on.send(TCP)
            on.run(0.02)
        on.run(0.2)
        assert came(on, UDP)[1] == there + 10
        on.world.conclude()


def test_a_flow_whose_packets_are_too_large_for_the_path_goes_on_a_stream() -> None:
    with datagrams(alive=False) as on:
        for node in (on.a, on.b):
            node.udp.most = 1250
        on.run(3.0)
        assert usable(on.a)
        on.send(UDP, size=1000)
        on.send(UDP + 1, size=1400)
        on.run(0.2)
        on.send(UDP + 1, size=100)
        on.run(0.2)
        assert came(on, UDP) == (1, 1) and came(on, UDP + 1) == (2, 0)
        on.world.conclude()


def test_a_full_socket_makes_packets_wait_their_turn_and_loses_none() -> None:
    with datagrams() as on:
        on.a.udp.room = 0
        for port in (UDP, UDP + 1, UDP + 2):
            on.send(port, count=20, size=1000)
        on.run(0.05)
        assert came(on, UDP) == (0, 0) and on.a.plane.queued() > 0
        on.a.udp.drain()
        on.run(0.2)
        assert [came(on, port) for port in (UDP, UDP + 1, UDP + 2)] == [(20, 20)] * 3
        on.world.conclude()


@pytest.mark.parametrize(("records", "most"), [(16, 16), (1024, 1000)])
def test_a_turn_takes_no_more_of_them_than_of_a_peers_sessions(records: int, most: int) -> None:
    """However many come with one read."""
    with datagrams(session={"turn_records": records}) as on:
        counts, seen = on.b.plane.counts, [on.b.plane.counts.packets_received]
        on.b.plane.datagrams._batch_done = lambda: seen.append(counts.packets_received)
        on.send(UDP, count=1000, size=36)
        on.run(0.1)
        assert came(on, UDP) == (1000, 1000)
        taken = [later - earlier for earlier, later in zip(seen, seen[1:], strict=False)]
        assert most / 2 < max(taken) <= most


def test_what_waits_of_one_peer_is_in_nobodys_way_and_is_bounded() -> None:
    """What another sends behind it comes in the same turn; and what is too much is lost before it is opened."""
    turn, most = 16, 1 << 17
    session = {"turn_records": turn, "receive_buffer_bytes": most}
    with datagrams(names="abc", session=session) as on:
        b, c, arrived = on.b, on.world.nodes["c"], on.world._arrived
        on.run(1.0)
        budget = next(peer.budget for peer in b.plane.peers if peer.name == "c")
        seen: list[tuple[int, int]] = []
        waiting: list[int] = []

        def batch_done() -> None:
            seen.append((len(arrived["a", "b", UDP]), len(arrived["c", "b", UDP])))
            waiting.append(budget.waiting_bytes)

        asked: list[bool] = []
        b.plane.datagrams._batch_done = batch_done
        b.plane.datagrams._between_turns = lambda: asked.append(True)
        for _ in range(4):
            on.world.send(c, b, UDP, 1000, 36)
        on.send(UDP)
        on.run(0.1)
        assert min(of_c for of_a, of_c in seen if of_a) <= 4 * turn
        assert seen[-1][1] < 4000 and most / 2 < max(waiting) <= most
        assert budget.waiting_bytes == 0, "what was kept has been taken"
        assert b.plane.counts.datagrams_over > 0, "and what was not, counted"
        assert len(asked) >= sum(map(bool, waiting)), (
            "work that waits here is more to do, with the socket empty too"
        )


def test_a_flood_of_datagrams_asks_for_no_more_sessions() -> None:
    with datagrams(multiplexer={"min_sessions": 1, "max_sessions": 3, "busy_bytes": 1 << 16}) as on:
        for port, sessions in ((UDP, 1), (TCP, 2)):
            for _ in range(100):
                on.send(port, count=30, size=1000)
                on.run(0.01)
            assert (len(on.links()) > 1) == (sessions > 1)


@pytest.mark.setting("carrier.stall_timeout")
@pytest.mark.parametrize("stall_s", [0.2, 1.5])
def test_a_session_that_carries_nothing_is_ended_in_time(stall_s: float) -> None:
    with datagrams(carrier={"stall_timeout": stall_s}, delay_s=0.01) as on:
        on.run(1.0)
        on.send(TCP)
        on.block_tcp()
        begun_s = on.now_s
        while on.links():
            on.send(TCP)
            on.run(0.02)
        assert stall_s <= on.now_s - begun_s <= stall_s * (1 + 1 / STALL_LOOKS) + 0.1


def test_a_session_in_doubt_that_carries_nothing_is_ended_at_once() -> None:
    """Another one with the peer has been found so, or the peer has dialed."""
    with datagrams(carrier={"stall_timeout": 2.0}, delay_s=0.01) as on:
        on.run(1.0)
        on.links()[0].peer.pool.look_after()
        on.run(1.0)
        assert len(on.links()) == 1 and not on.a.plane.alone(), "it answers"
        on.block_tcp()
        on.run(0.5)
        on.links()[0].peer.pool.look_after()
        on.run(0.45)
        assert not on.links() and len(on.a.plane.alone()) == 1


def test_what_is_sent_while_a_session_is_in_doubt_is_not_lost_with_it() -> None:
    """Else a flow of TCP whose packet was sent again meanwhile would wait twice as long for the next time."""
    with datagrams(carrier={"stall_timeout": 1.0}, delay_s=0.01) as on:
        on.block_tcp()
        on.send(TCP)
        on.until(lambda: on.links()[0].beside.instead, 0.6)
        for _ in range(20):
            on.send(TCP)
            on.run(0.02)
        first = on.world._numbers["a", "b", TCP] - 20
        on.until(lambda: not on.links(), 1.0)
        on.run(0.05)
        assert set(range(first, first + 20)) <= on.world._arrived["a", "b", TCP]


def test_a_session_in_doubt_that_goes_on_sends_what_has_waited() -> None:
    with datagrams(carrier={"stall_timeout": 1.0}, delay_s=0.01) as on:
        (link,) = on.links()
        on.block_tcp()
        on.send(TCP)
        on.until(lambda: link.beside.instead, 0.6)
        on.send(TCP, count=5)
        on.run(0.1)
        on.block_tcp(False)
        on.run(0.5)
        assert came(on, TCP) == (6, 0) and link in on.links() and not link.beside.instead


@pytest.mark.parametrize(("least_rtt", "stall_s"), [(0.0, 0.5), (1.0, 0.3)])
def test_all_flows_are_in_datagrams_within_a_second_when_tcp_does_not_pass(
    least_rtt: float, stall_s: float
) -> None:
    """Also where streams were as good; and back when it does, in order."""
    carrier = {"least_rtt": least_rtt, "stall_timeout": stall_s}
    with datagrams(carrier=carrier, delay_s=0.01, alive=not least_rtt) as on:
        on.run(2.0)
        on.send(UDP), on.send(TCP), on.send(TCP, back=True)
        on.run(0.1)
        on.block_tcp()
        for step in range(200):
            on.send(UDP), on.send(TCP, 3, 1400), on.send(TCP, back=True)
            on.run(0.01)
            if step == round((stall_s + 0.45) * 100):
                numbers = dict(on.world._numbers)
        for flow, number in numbers.items():
            arrived = on.world._arrived[flow]
            assert set(range(number, on.world._numbers[flow] - 5)) <= arrived
        assert not on.links() and len(on.a.plane.alone()) == len(on.b.plane.alone()) == 1
        on.block_tcp(False)
        on.until(lambda: on.links() and on.links(on.b), 8.0)
        for _ in range(50):
            on.send(UDP), on.send(TCP, 3, 1400)
            on.run(0.02)
        arrived, in_datagrams = came(on, TCP)
        assert arrived - in_datagrams >= 100
        on.run(on.a.live.config.session.drain_timeout + 1.0)
        assert not on.a.plane.alone() and not on.b.plane.alone()
        assert len(on.a.plane.datagrams._takers) == len(on.links())
        on.world.conclude()


def test_a_peer_that_is_gone_with_its_datagrams_is_not_kept() -> None:
    with datagrams(
        session={"user_timeout": 2.0}, health={"interval": 0.5, "idle_interval": 0.5, "timeout": 0.5}
    ) as on:
        on.cut()
        on.until(lambda: not on.links(), 5.0)
        on.until(lambda: not on.a.plane.alone(), 10.0)
        assert len(on.a.plane.datagrams._takers) == 0


def test_a_peer_that_is_forgotten_gets_no_datagrams_either() -> None:
    with datagrams(delay_s=0.01) as on:
        on.block_tcp()
        on.send(TCP, 3)
        on.until(on.a.plane.alone, 2.0)
        on.a.forget("b")
        on.run(0.1)
        assert not on.a.plane.alone() and not on.a.plane.datagrams._takers
        for _ in range(20):
            on.send(UDP, back=True)
            on.run(0.1)
        assert not usable(on.b)


def test_a_port_outside_that_becomes_known_late_is_told_in_the_sessions_there_are() -> None:
    with datagrams(alive=False) as on:
        for node in (on.a, on.b):
            node.udp.blocked = True
        on.run(1.0)
        (theirs,) = on.links(on.b)
        on.a.plane.datagrams.outside = 40_001
        on.run(1.0)
        assert (on.a.place, 40_001) in theirs.beside._path._candidates and len(on.links()[0].lanes) == 2
        on.run(1.0)
        assert len(on.links()[0].lanes) == 2, "it is told once"


def test_after_a_move_datagrams_go_on_before_there_is_a_session() -> None:
    with datagrams(delay_s=0.01) as on:
        on.send(UDP)
        on.block_tcp()
        on.a.place = "198.51.100.7"
        on.a.network_changed()
        on.run(0.1)
        before = on.world._numbers["a", "b", TCP]
        on.send(TCP), on.send(UDP)
        on.run(0.1)
        assert before in on.world._arrived["a", "b", TCP] and on.world.last_arrived(on.a, on.b, UDP)


@pytest.mark.parametrize("failed", [False, True])
def test_when_the_session_ends_its_datagrams_end_with_it(failed: bool) -> None:
    with datagrams() as on:
        for _ in range(5):
            on.send(UDP, count=3)
            on.run(0.01)
        on.a.udp.room = 0
        on.send(UDP, count=3)
        if failed:
            on.connection().reset()
        else:
            on.a.plane.links[next(iter(on.a.plane.links))].peer.pool.rotate(on.links()[0])
        on.a.udp.drain()
        on.run(7.0)
        on.send(UDP, count=3)
        on.run(0.5)
        assert on.world.last_arrived(on.a, on.b, UDP) and usable(on.a)
        assert len(on.a.plane.datagrams._takers) == len(on.links())


def test_datagrams_that_nobody_waits_for_are_counted_and_unanswered() -> None:
    with datagrams() as on:
        before = on.b.udp.sent
        for datagram in (b"", b"x", bytes(40), bytes(1200)):
            on.b.udp._arrive(datagram, ("192.0.2.99", 5))
        on.run(0.01)
        assert on.b.plane.counts.datagrams_unknown == 4
        receiver = next(iter(on.b.plane.datagrams._takers))
        on.b.udp._arrive(
            receiver.to_bytes(4, "big") + (1 << 20).to_bytes(8, "big") + bytes(60), ("192.0.2.99", 5)
        )
        on.run(0.01)
        assert on.b.plane.counts.datagrams_forged == 1
        assert on.b.udp.sent == before


@pytest.mark.parametrize("seed", range(6))
def test_a_bad_way_loses_what_it_loses_and_the_account_is_right(seed: int) -> None:
    with datagrams() as on:
        network = on.world.network
        network.random.seed(seed)
        network.udp_loss, network.udp_doubled, network.udp_jitter = 0.05, 0.05, 3.0
        for _ in range(100):
            on.send(UDP, count=5, size=600)
            on.send(TCP, count=5)
            on.run(0.01)
        network.udp_loss = network.udp_doubled = network.udp_jitter = 0.0
        on.run(20.0)  # what nobody uses is probed, and so the last ones missing are known
        assert came(on, TCP) == (500, 0)
        sent, counts = on.a.plane.counts.datagrams_sent, on.b.plane.counts
        assert counts.datagrams_missed > counts.datagrams_late > 0 and counts.datagrams_replayed > 0
        assert sent == counts.datagrams_received + counts.datagrams_missed - counts.datagrams_late
        assert 0 < 500 - came(on, UDP)[0] <= 60
        on.world.conclude()
