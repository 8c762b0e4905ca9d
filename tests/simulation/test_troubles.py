"""What is done about peers that vanish, come back, or are left alone; and that others do not notice."""

from __future__ import annotations

import pytest

from shards.session.transport import TcpState
from simulation.stage import Stage, stage

HOUR_S = 3600.0
#: Nothing but health may notice.
PATIENT = {"user_timeout": HOUR_S}


def gone(on: Stage) -> bool:
    return not on.links()


NOTICED = [
    # settings, suspect after at most, ended after so much more
    ("defaults of a quick configuration", {"interval": 2.0, "timeout": 1.0}, 3.0, 1.0),
    ("a shorter interval", {"interval": 0.5, "timeout": 1.0}, 1.5, 1.0),
    ("a shorter timeout", {"interval": 2.0, "timeout": 0.2}, 2.2, 0.2),
    ("more failures", {"interval": 2.0, "timeout": 0.5, "max_consecutive_failures": 4}, 2.5, 1.5),
    ("a longer interval of idle sessions", {"interval": 0.5, "idle_interval": 2.0, "timeout": 1.0}, 3.0, 1.0),
]


@pytest.mark.parametrize(
    ("sentence", "health", "suspect_s", "ended_s"), NOTICED, ids=[row[0] for row in NOTICED]
)
def test_a_peer_that_vanishes_is_noticed_within_interval_and_timeout(sentence, health, suspect_s, ended_s):
    for wait_s in (0.0, 0.7, 1.9):
        with stage(session=PATIENT, health={"idle_interval": 0.05, **health}) as on:
            on.run(2.5 + wait_s)
            on.cut()
            took_s = on.until(lambda on=on: on.a.plane.counts.health_failures, 10.0)
            assert took_s <= suspect_s + 0.05
            assert on.until(lambda on=on: gone(on), 10.0) == pytest.approx(ended_s, abs=0.02)
            assert on.a.plane.counts.health_deaths == 1


@pytest.mark.setting("health.idle_interval")
def test_an_idle_session_is_asked_seldom_by_one_end_and_at_once_when_it_is_used() -> None:
    with stage(session=PATIENT, health={"interval": 1.0, "idle_interval": 20.0, "timeout": 1.0}) as on:
        both = on.a.plane.counts, on.b.plane.counts
        on.run(30.0)
        before = sum(each.health_probes for each in both)
        on.run(200.0)
        assert 9 <= sum(each.health_probes for each in both) - before <= 11
        on.cut()
        on.send()
        assert on.until(lambda: both[0].health_failures, 10.0) <= 1.0 + 1.0 + 0.25 + 0.05
        assert on.until(lambda: gone(on), 10.0) <= 1.05


@pytest.mark.parametrize("urgent_s", [0.2, 0.8])
def test_when_the_network_changed_sessions_are_looked_after_at_once(urgent_s):
    with stage(session=PATIENT, health={"interval": HOUR_S, "urgent_timeout": urgent_s}) as on:
        on.cut()
        on.a.network_changed()
        assert on.until(lambda: gone(on), 5.0) == pytest.approx(2 * urgent_s, abs=0.02)


def test_a_session_from_an_address_that_is_gone_is_ended_at_once():
    with stage() as on:
        on.a.place = "198.51.100.7"
        on.a.network_changed()
        on.run(0.0)
        assert gone(on)
        assert on.until(lambda: on.a.plane.peers.get("b").pool.usable(), 3.0) < 1.0


def test_a_peer_that_dials_anew_has_perhaps_lost_what_it_had():
    """b has forgotten everything, silently; its new dial makes a look after the old session."""
    with stage(session=PATIENT, health={"interval": HOUR_S, "urgent_timeout": 0.3}) as on:
        old = on.links()[0]
        on.connection().vanish()
        on.links(on.b)[0].close("lost", failed=True)
        dialer = on.until(lambda: old.closed, 10.0)
        assert dialer < 2.0
        on.run(1.0)
        on.send()
        on.run(0.1)
        assert on.world.last_arrived(on.a, on.b, 1)


@pytest.mark.setting("session.stuck_retransmissions")
@pytest.mark.parametrize(
    ("tcp", "begins"),
    [
        (TcpState(1448, 6, 3), False),
        (TcpState(1448, 7, 3), True),
        (TcpState(1220, 7, 3), False),  # it has small segments already: something else is wrong
    ],
)
def test_another_session_is_made_where_large_segments_do_not_arrive(tcp, begins):
    session = PATIENT | {"stuck_retransmissions": 7}
    with stage(session=session, health={"interval": HOUR_S, "urgent_timeout": 0.3}) as on:
        told = []
        on.a.segments_stuck = told.append
        (old,) = on.links()
        on.connection_of(old).vanish()
        old.transport.tcp = tcp
        on.send(2)
        on.run(5.0)
        assert told == ["b"] * begins
        assert old.closed == begins and len(on.links()) == 1
        on.send()
        on.run(0.1)
        assert bool(on.world.last_arrived(on.a, on.b, 1)) == begins


def test_a_moment_in_which_nothing_arrives_is_not_taken_for_large_segments_that_do_not():
    health = {"interval": 0.5, "timeout": 1.0, "urgent_timeout": HOUR_S}
    with stage(session=PATIENT, health=health) as on:
        told = []
        on.a.segments_stuck = told.append
        (old,) = on.links()
        old.transport.tcp = TcpState(1448, 7, 3)
        on.run(0.6)
        old.transport.tcp = TcpState(1448, 0, 1)
        on.run(3.0)
        assert told == []


def test_a_peer_that_acknowledges_everything_and_answers_nothing_may_not_get_its_own_segments_through():
    with stage(session=PATIENT, health={"interval": 0.5, "timeout": 1.0, "urgent_timeout": HOUR_S}) as on:
        told = []
        on.a.segments_stuck = told.append
        (old,) = on.links()
        on.connection_of(old).vanish()
        old.transport.tcp = TcpState(1448, 0, 0)
        on.run(3.0)
        assert told == ["b"]


SMALL, LARGE = TcpState(1220, 0, 0), TcpState(1448, 0, 0)


@pytest.mark.parametrize("arrive", [True, False])
def test_a_session_with_large_segments_is_used_only_when_they_have_arrived(arrive):
    """Beside one with small ones; what is lost before it is used is no packet."""
    health = {"interval": HOUR_S, "timeout": 0.5, "urgent_timeout": HOUR_S}
    with stage(delay_s=0.01, session=PATIENT, health=health) as on:
        told = []
        on.a.segments_stuck = told.append
        (old,) = on.links()
        old.transport.tcp, on.world.network.tcp = SMALL, LARGE
        old.peer.pool.rotate(old)
        while len(on.links()) == 1:
            on.run(0.005)
        (new,) = set(on.links()) - {old}
        if not arrive:
            on.connection_of(new).vanish()
        assert not new.lanes and not new.opening
        for _ in range(100):
            on.send()
            on.run(0.01)
        assert new.closed != arrive
        assert told == ["b"] * (not arrive)
        on.run(0.3)
        assert on.world.last_arrived(on.a, on.b, 1)
        assert on.b.plane.counts.packets_to_tun == 100


@pytest.mark.setting("health.warm_interval", "health.warm_for")
@pytest.mark.parametrize(
    ("warm_s", "warm_for_s", "asks"), [(0.2, 300.0, True), (HOUR_S, 300.0, False), (0.2, 0.0, False)]
)
def test_sessions_to_recently_used_peers_are_asked_for_again(warm_s, warm_for_s, asks):
    health = {
        "interval": 0.3,
        "idle_interval": 0.3,
        "timeout": 0.2,
        "warm_interval": warm_s,
        "warm_for": warm_for_s,
    }
    with stage(health=health) as on:
        on.send()
        on.run(0.6)
        on.cut()
        on.until(lambda: gone(on), 3.0)
        asked = []
        on.a.session_wanted = lambda *what: asked.append(what)
        on.run(1.0)
        assert bool([what for what in asked if what[2]]) == asks


def test_packets_for_an_open_circuit_are_dropped_and_a_working_session_closes_it():
    breaker = {"failure_threshold": 1, "reset_timeout": 0.5}
    health = {"interval": 0.3, "timeout": 0.2}
    retry = {"initial_interval": 0.1, "max_interval": 0.2}
    with stage(health=health, circuit_breaker=breaker, retry=retry) as on:
        peer = on.a.plane.peers.get("b")
        on.cut()
        on.send(count=3)
        on.until(lambda: peer.circuit == "open", 5.0)
        assert on.a.plane.queued() == 0
        before = on.a.plane.counts.drops["circuit_open"]
        on.send(count=5)
        assert on.a.plane.counts.drops["circuit_open"] == before + 5
        on.cut(False)
        on.until(lambda: peer.circuit == "closed" and peer.pool.usable(), 3.0)
        on.send(2)
        on.run(0.1)
        assert on.world.last_arrived(on.a, on.b, 2)


def test_packets_wait_for_a_session_and_go_out_in_order():
    with stage(up=False, delay_s=0.01) as on:
        for _ in range(20):
            on.send(count=2)
            on.run(0.002)
        assert on.a.plane.peers.get("b").pending.queue
        on.run(1.0)
        assert on.world.last_arrived(on.a, on.b, 1)
        assert on.b.plane.counts.packets_to_tun == 40


@pytest.mark.setting("worker.pending_timeout")
@pytest.mark.parametrize("timeout_s", [0.5, 2.0])
def test_packets_wait_for_a_session_no_longer_than_their_timeout(timeout_s):
    settings = {"worker": {"pending_timeout": timeout_s}, "circuit_breaker": {"failure_threshold": 1000}}
    with stage(up=False, retry={"max_attempts": 1000}, **settings) as on:
        on.cut()
        on.send(count=7)
        took_s = on.until(lambda: on.a.plane.counts.drops["no_session"] == 7, 5.0)
        assert took_s == pytest.approx(timeout_s, abs=0.01)


def test_flows_to_a_healthy_peer_do_not_notice_that_another_one_vanishes():
    with stage(names="abc", health={"interval": 1.0, "timeout": 0.5}) as on:
        c = on.world.nodes["c"]
        on.cut()
        on.world.troubled.add(frozenset("ab"))
        for _ in range(300):
            on.send(100, 20, 1400)
            on.world.send(on.a, c, 1, 1, 100)
            on.run(0.01)
        on.run(0.1)
        assert c.plane.counts.packets_to_tun == 300
        assert on.world.slowest_s < 0.05


def test_a_forgotten_peer_costs_its_packets_and_nothing_else():
    with stage(names="abc", rate=1e6) as on:
        c = on.world.nodes["c"]
        on.send(100, 800, 1400)
        on.world.send(on.a, c, 1, 5, 100)
        assert on.a.plane.queued()
        on.a.forget("b")
        on.run(0.5)
        assert on.a.plane.counts.drops["peer_forgotten"] and on.a.plane.queued() == 0
        assert on.world.last_arrived(on.a, c, 1)
        on.send(100, 1)
        assert on.a.plane.counts.drops["no_route"] == 1


@pytest.mark.setting("worker.cleanup_interval")
@pytest.mark.parametrize(("idle_s", "every_s"), [(0.5, 0.1), (2.0, 0.1), (0.5, 1.0)])
def test_idle_flows_are_forgotten(idle_s, every_s):
    with stage(worker={"idle_timeout": idle_s, "cleanup_interval": every_s}) as on:
        on.send()
        took_s = on.until(lambda: not on.a.plane.flows.flows, 5.0)
        assert idle_s <= took_s <= idle_s + every_s + 0.01


def test_a_reset_while_a_session_is_left_is_not_a_failure():
    with stage() as on:
        link = next(link for link in on.links(on.b))
        told = []
        on.b.session_down = lambda link, reason, failed: told.append((reason, failed))
        on.links()[0].go_away()
        on.until(lambda: link.leaving, 1.0)
        on.connection().reset()
        on.run(0.01)
        assert told == [("receive: Connection reset by peer", False)]


def test_a_shorter_interval_does_not_wait_for_the_end_of_a_long_one():
    seldom = {"health": {"interval": HOUR_S, "warm_interval": HOUR_S}, "worker": {"cleanup_interval": HOUR_S},
              "stream_pool": {"cleanup_interval": HOUR_S}}  # fmt: skip
    with stage(session=PATIENT, **seldom) as on:
        on.send()
        on.run(1.0)
        on.reload(on.a, worker={"cleanup_interval": 0.1, "idle_timeout": 0.5})
        on.until(lambda: not on.a.plane.flows.flows, 1.0)
        for node in (on.a, on.b):
            on.reload(node, stream_pool={"min_streams_per_peer": 2, "cleanup_interval": 0.1})
        on.until(lambda: on.a.plane.streams() == 2, 1.0)
        on.cut()
        on.reload(on.a, health={"interval": 0.5, "timeout": 0.5})
        assert on.until(lambda: on.a.plane.counts.health_failures, 2.0) <= 1.05


def test_a_batch_larger_than_the_window_of_an_idle_link_loses_nothing():
    with stage(rate=1e9, session={"window_bytes": 1 << 18}) as on:
        on.world.network.buffer = 1 << 22
        on.run(0.5)
        on.send(count=5000, size=40)
        on.run(5.0)
        assert on.a.plane.counts.packets_sent == 5000 and not sum(on.a.plane.counts.drops.values())


@pytest.mark.parametrize("setting", [{"window_bytes": 1 << 18}, {"send_buffer_bytes": 1 << 17}])
def test_of_a_batch_that_does_not_fit_as_a_whole_goes_what_fits_and_then_the_rest(setting):
    with stage(session=setting) as on:
        on.run(0.5)
        link = on.links()[0]
        packets = 400
        on.send(count=packets, size=1400)  # one span, of one flow
        assert link.packets_sent > 50, "a part of it went at once"
        on.until(lambda: link.packets_sent >= packets, 2.0)
        on.run(0.5)
        assert not link.queue.packets and on.b.plane.counts.packets_received == packets
