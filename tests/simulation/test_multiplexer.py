"""The multiplexer in a made-up world: how flows spread, when sessions and streams are added, when flows move."""

from __future__ import annotations

from random import Random

import pytest

from shards.peer.multiplexer import Multiplexer
from simulation.stage import Stage, stage
from vpnd.config.live import Live
from vpnd.config.schema import Config

NEVER_BUSY = 1 << 40
OFTEN = {"auto_scaling_interval": 0.05}


class FixedCarrier:
    """A session with so many bytes ahead of the next packet."""

    def __init__(self, load: int) -> None:
        self.ahead = load

    def load(self) -> int:
        return self.ahead


class FixedLane:
    """A lane that counts what is put on it."""

    def __init__(self, load: int = 0) -> None:
        self.carrier = FixedCarrier(load)
        self.flows: set[int] = set()


class FixedPool:
    def __init__(self, lanes: list[FixedLane]) -> None:
        self._lanes = lanes

    def lanes(self) -> list[FixedLane]:
        return self._lanes


def multiplexer(*lanes: FixedLane, seed: int = 1) -> Multiplexer:
    return Multiplexer(Live(Config()), FixedPool(list(lanes)), Random(seed).randrange)  # type: ignore[arg-type]


def test_without_a_lane_there_is_none_to_pick_and_of_one_that_one():
    lane = FixedLane(10)
    assert multiplexer().pick() is None
    assert multiplexer(lane).pick() is lane


def test_of_two_lanes_the_one_with_less_ahead_is_picked():
    full, empty = FixedLane(1000), FixedLane(0)
    for seed in range(20):
        assert multiplexer(full, empty, seed=seed).pick() is empty


def test_equal_lanes_get_equal_numbers_of_flows():
    """Power of two choices: the fullest is above the mean by a few, not by the square root."""
    lanes = [FixedLane() for _ in range(8)]
    mux = multiplexer(*lanes)
    for flow in range(4000):
        mux.pick().flows.add(flow)
    assert max(len(lane.flows) for lane in lanes) - 4000 / 8 <= 5


def test_a_loaded_lane_gets_few_flows_and_the_fullest_none():
    lanes = [FixedLane(load) for load in (0, 10, 20, 30)]
    mux = multiplexer(*lanes)
    picked = [mux.pick() for _ in range(3000)]
    counts = [picked.count(lane) for lane in lanes]
    assert counts == sorted(counts, reverse=True) and counts[3] == 0
    assert counts[0] == pytest.approx(1500, rel=0.1)  # half of all pairs hold it


def sessions(on: Stage) -> int:
    return len(on.a.plane.peers.get("b").pool.usable())


@pytest.mark.setting("multiplexer.max_sessions")
@pytest.mark.parametrize("most", [1, 3])
def test_sessions_are_added_while_all_are_busy_up_to_the_maximum(most):
    with stage(multiplexer={"max_sessions": most, "busy_bytes": 1 << 16, **OFTEN}) as on:
        on.flood(1.5, packets=60, flows=20)
        assert sessions(on) == most


def test_added_sessions_go_when_they_are_idle():
    pool = {"idle_timeout": 0.5, "cleanup_interval": 0.1}
    with stage(multiplexer={"max_sessions": 3, "busy_bytes": 1 << 16, **OFTEN}, stream_pool=pool) as on:
        on.flood(1.5, packets=60, flows=20)
        assert sessions(on) == 3
        for node in (on.a, on.b):
            on.reload(node, worker={"idle_timeout": 0.2, "cleanup_interval": 0.1})
        on.run(4.0)
        assert sessions(on) == 1 and len(on.links(on.b)) == 1


@pytest.mark.setting("multiplexer.min_sessions")
def test_limits_can_be_changed():
    with stage(multiplexer={"max_sessions": 3}, stream_pool={"cleanup_interval": 0.1}) as on:
        on.run(0.5)
        assert sessions(on) == 1
        on.reload(on.a, multiplexer={"min_sessions": 3})
        on.until(lambda: sessions(on) == 3, 3.0)


@pytest.mark.setting("multiplexer.auto_scaling_interval")
@pytest.mark.parametrize(("interval_s", "least_s", "most_s"), [(0.05, 0.0, 0.3), (1.0, 0.4, 1.4)])
def test_load_is_looked_at_every_interval(interval_s, least_s, most_s):
    with stage(multiplexer={"busy_bytes": 1 << 15, "auto_scaling_interval": interval_s}) as on:
        on.until(lambda: on.now_s >= 0.5, 1.0)
        since_s = on.now_s
        while sessions(on) < 2:
            assert on.now_s - since_s < 3.0
            on.flood(0.01)
        assert least_s <= on.now_s - since_s <= most_s


DELAYS = [
    ("packets that wait ask for more", {"scale_up_delay": 0.001}, 2e6, True),
    ("not if they may wait for so long", {"scale_up_delay": 60.0}, 2e6, False),
    ("and not where none has to wait", {"scale_up_delay": 0.001}, 1e9, False),
]


@pytest.mark.setting("multiplexer.scale_up_delay")
@pytest.mark.parametrize(("sentence", "settings", "rate", "grows"), DELAYS, ids=[row[0] for row in DELAYS])
def test_waiting_packets_ask_for_another_session(sentence, settings, rate, grows):
    with stage(rate=rate, multiplexer={"busy_bytes": NEVER_BUSY, **OFTEN, **settings}) as on:
        on.flood(1.0, packets=40)
        assert (sessions(on) > 1) == grows


@pytest.mark.setting("stream_pool.max_streams_per_peer")
@pytest.mark.parametrize("most", [2, 4])
def test_streams_are_added_when_there_may_be_no_more_sessions(most):
    settings = {"max_sessions": 1, "scale_up_delay": 0.0001, **OFTEN}
    with stage(rate=2e6, multiplexer=settings, stream_pool={"max_streams_per_peer": most}) as on:
        on.flood(2.0, packets=40)
        assert on.a.plane.streams() == most


@pytest.mark.setting("multiplexer.busy_bytes")
@pytest.mark.parametrize(("busy_bytes", "moves"), [(1 << 16, True), (NEVER_BUSY, False)])
def test_small_flows_leave_a_busy_session_for_a_calm_one(busy_bytes, moves):
    with stage(multiplexer={"min_sessions": 2, "busy_bytes": busy_bytes, **OFTEN}) as on:
        on.until(lambda: sessions(on) >= 2, 2.0)
        for port in range(1, 20):
            on.send(port)
        before = on.a.plane.counts.flows_moved
        on.flood(0.5)
        busy = next(flow.sink for flow in on.a.plane.flows.flows.values() if flow.key & 0xFFFF == 100)
        on.flood(0.1)
        for port in range(1, 20):
            on.send(port)
        assert (on.a.plane.counts.flows_moved > before) == moves
        beside = [flow for flow in busy.flows if flow.key & 0xFFFF != 100]
        assert bool(beside) != moves
        on.run(0.2)
        assert all(on.world.last_arrived(on.a, on.b, port) for port in range(1, 20))
