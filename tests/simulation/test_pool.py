"""The stream pool in a made-up world: what is opened, closed, replaced and given up, and by which settings."""

from __future__ import annotations

import pytest

from simulation.node import SHARD
from simulation.stage import Stage, stage
from vpnd.nat.paths import RELAYED, Path

HOUR_S = 3600.0
CALM_HEALTH = {"interval": HOUR_S, "urgent_timeout": 60.0, "warm_interval": HOUR_S}
OFTEN = {"cleanup_interval": 0.1}


def streams(on: Stage) -> int:
    return on.a.plane.streams()


@pytest.mark.setting("stream_pool.min_streams_per_peer")
@pytest.mark.parametrize(("least", "expected"), [(1, 1), (3, 3)])
def test_so_many_streams_are_kept_open(least, expected):
    with stage(stream_pool={"min_streams_per_peer": least, **OFTEN}) as on:
        on.run(1.0)
        assert streams(on) == on.b.plane.streams() == expected


def test_the_minimum_can_be_changed_and_what_is_too_much_goes_when_idle():
    with stage(stream_pool={"idle_timeout": 0.5, **OFTEN}) as on:
        dialer = on.a if on.links()[0].initiator else on.b
        on.reload(dialer, stream_pool={"min_streams_per_peer": 4})
        on.until(lambda: streams(on) == 4, 0.5)
        on.reload(dialer, stream_pool={"min_streams_per_peer": 2})
        on.until(lambda: streams(on) == 2, 1.5)
        on.run(3.0)
        assert streams(on) == 2


@pytest.mark.setting("stream_pool.cleanup_interval")
@pytest.mark.parametrize("interval_s", [0.2, 2.0])
def test_what_is_missing_is_opened_every_cleanup_interval(interval_s):
    with stage(stream_pool={"min_streams_per_peer": 2, "cleanup_interval": interval_s}) as on:
        took_s = on.until(lambda: streams(on) == 2, 3.0)
        assert interval_s - 0.2 <= took_s <= interval_s + 0.1


@pytest.mark.setting("stream_pool.idle_timeout")
@pytest.mark.parametrize("timeout_s", [0.5, 2.0])
def test_an_idle_stream_is_closed_after_its_timeout(timeout_s):
    with stage(stream_pool={"min_streams_per_peer": 2, "idle_timeout": timeout_s, **OFTEN}) as on:
        on.until(lambda: streams(on) == 2, 1.0)
        on.run(0.3)
        for node in (on.a, on.b):
            on.reload(node, stream_pool={"min_streams_per_peer": 1})
        since_s = max(lane.active_s for link in on.links() for lane in link.lanes)
        on.until(lambda: streams(on) == 1, 5.0)
        assert timeout_s <= on.world.loop.now_s - since_s <= timeout_s + 0.3


def test_a_session_whose_last_streams_both_sides_close_at_once_gets_another():
    with stage(stream_pool=OFTEN) as on:
        link, other = on.links()[0], on.links(on.b)[0]
        dialer, acceptor = (link, other) if link.initiator else (other, link)
        acceptor.open_lane()
        on.run(0.05)
        for each in (dialer, acceptor):
            each.peer.pool.leave_lane(next(lane for lane in each.lanes if lane.stream.ours))
        on.run(0.05)
        assert len(dialer.lanes) == 1 and dialer.usable and acceptor.usable
        on.send()
        on.run(0.1)
        assert on.world.last_arrived(on.a, on.b, 1)


REPLACED = [
    ("after max_age", {"max_age": 1.0}, False, 1),
    ("not before", {"max_age": 30.0}, False, 0),
    ("after max_bytes", {"max_bytes": 1 << 20}, True, 1),
    ("not with fewer", {"max_bytes": 1 << 30}, True, 0),
]


@pytest.mark.setting("session.max_age", "session.max_bytes")
@pytest.mark.parametrize(
    ("sentence", "session", "flood", "rotated"), REPLACED, ids=[row[0] for row in REPLACED]
)
def test_a_session_is_replaced_without_a_gap_and_without_loss(sentence, session, flood, rotated):
    with stage(session=session, stream_pool=OFTEN) as on:
        if flood:
            on.flood(0.3)
        sent_s = on.now_s
        while on.now_s < sent_s + 1.8:
            on.send(1)
            on.send(2, back=True)
            on.run(0.002)
            assert on.a.plane.peers.get("b").pool.usable()
        on.run(0.2)
        assert (on.a.plane.counts.sessions_rotated + on.b.plane.counts.sessions_rotated >= 1) == bool(rotated)
        arrived = on.b.plane.counts.packets_to_tun + on.a.plane.counts.packets_to_tun
        assert arrived == on.world.packets


@pytest.mark.parametrize("dialer_leaves", [True, False])
def test_who_has_no_other_way_goes_on_until_it_has(dialer_leaves):
    # The replacement of a session may go to another shard of the peer than the one that loses the old one.
    with stage(worker={"pending_bytes": 0}) as on:
        mine, theirs = on.links()[0], on.links(on.b)[0]
        leaver, other = (mine, theirs) if mine.initiator == dialer_leaves else (theirs, mine)
        leaver.peer.pool.leave(leaver)
        sent_s = on.now_s
        while on.now_s < sent_s + 1.0:
            on.send(back=leaver is mine)
            on.run(0.002)
        assert other.closed and other.peer.pool.usable()
        arrived = on.a.plane.counts.packets_to_tun + on.b.plane.counts.packets_to_tun
        assert arrived == on.world.packets


def test_the_age_can_be_changed():
    with stage(session={"max_age": HOUR_S}, stream_pool=OFTEN) as on:
        first = on.links()[0].session_id
        on.run(2.0)
        for node in (on.a, on.b):
            on.reload(node, session={"max_age": 1.0})
        on.until(lambda: on.links()[0].session_id != first, 1.0)


@pytest.mark.setting("session.drain_timeout")
@pytest.mark.parametrize("timeout_s", [0.5, 3.0])
def test_a_session_that_cannot_be_drained_is_ended_after_its_deadline(timeout_s):
    with stage(session={"drain_timeout": timeout_s}, health=CALM_HEALTH, stream_pool=OFTEN) as on:
        old = next(link for node in (on.a, on.b) for link in on.links(node) if link.initiator)
        on.connection().vanish()
        old.peer.pool.rotate(old)
        on.until(lambda: old.leaving, 1.0)
        assert on.until(lambda: old.closed, 5.0) == pytest.approx(timeout_s, abs=0.05)
        assert old.peer.pool.usable() and old.peer.pool.held() == 0


ATTEMPTS = [
    ("one attempt, a short deadline", 1, 0.5, 0.5),
    ("more attempts", 3, 0.5, 1.5),
    ("a longer deadline", 1, 2.0, 2.0),
]


@pytest.mark.parametrize(
    ("sentence", "attempts", "deadline_s", "ended_s"), ATTEMPTS, ids=[row[0] for row in ATTEMPTS]
)
def test_a_session_in_which_no_stream_opens_is_given_up(sentence, attempts, deadline_s, ended_s):
    retry = {"max_attempts": attempts, "initial_interval": 0.01, "max_interval": 0.01}
    session = {"negotiate_timeout": deadline_s}
    with stage(up=False, delay_s=0.02, session=session, retry=retry, health=CALM_HEALTH) as on:
        on.until(lambda: on.world.network.connections, 1.0)
        on.connection().vanish()
        on.until(lambda: any(link.initiator for node in (on.a, on.b) for link in on.links(node)), 1.0)
        link = next(link for node in (on.a, on.b) for link in on.links(node) if link.initiator)
        took_s = on.until(lambda: link.closed, 5.0)
        assert ended_s - 0.1 <= took_s <= ended_s + 0.2
        assert on.a.plane.counts.streams_failed + on.b.plane.counts.streams_failed == attempts


def test_other_attempts_hold_for_a_session_in_which_no_stream_opens_yet():
    retry = {"max_attempts": 1000, "initial_interval": 0.01, "max_interval": 0.01}
    session = {"negotiate_timeout": 0.2}
    with stage(up=False, delay_s=0.02, session=session, retry=retry, health=CALM_HEALTH) as on:
        on.until(lambda: on.world.network.connections, 1.0)
        on.connection().vanish()
        on.until(lambda: any(link.initiator for node in (on.a, on.b) for link in on.links(node)), 1.0)
        node, link = next((node, link) for node in (on.a, on.b) for link in on.links(node) if link.initiator)
        on.run(1.5)
        assert not link.closed
        on.reload(node, retry={"max_attempts": 1})
        on.until(lambda: link.closed, 0.5)


def test_streams_a_peer_refuses_are_counted_and_do_not_end_the_session():
    with stage(session={"max_streams": 2}, stream_pool={"min_streams_per_peer": 4, **OFTEN}) as on:
        on.run(1.0)
        assert 2 <= streams(on) <= 4 and on.links()


def test_a_suspect_gets_a_replacement_and_what_recovers_needs_none():
    with stage(
        health={"interval": 0.5, "timeout": 0.5, "max_consecutive_failures": 20}, stream_pool=OFTEN
    ) as on:
        pool = on.a.plane.peers.get("b").pool
        wanted = []
        tell, on.a.session_wanted = on.a.session_wanted, lambda *what: (wanted.append(what), tell(*what))
        on.cut()
        on.until(lambda: on.a.plane.counts.health_failures, 2.0)
        assert wanted[-1] == ("b", 2, True)
        on.cut(False)
        on.until(lambda: not any(link.suspect for link in pool.carriers), 1.0)
        on.run(0.3)
        assert wanted[-1] == ("b", 1, False)


def test_new_flows_avoid_a_suspect_and_those_it_has_leave_it_when_it_is_given_up():
    health = {"interval": 0.5, "timeout": 0.5, "max_consecutive_failures": 3}
    with stage(multiplexer={"min_sessions": 2}, health=health) as on:
        on.until(lambda: len(on.a.plane.peers.get("b").pool.usable()) >= 2, 2.0)
        for port in range(1, 20):
            on.send(port)
        silent = on.links()[0]
        on.connection().vanish()
        on.until(lambda: silent.suspect, 2.0)
        for port in range(20, 40):
            on.send(port)
        sinks = {flow.sink.carrier for key, flow in on.a.plane.flows.flows.items() if key & 0xFFFF >= 20}
        assert sinks and silent not in sinks, "new flows go where there is an answer"
        assert any(lane.flows for lane in silent.lanes), "the others wait for the verdict"
        on.until(lambda: silent.closed, 3.0)
        for port in range(1, 40):
            on.send(port)
        on.run(0.2)
        assert all(on.world.last_arrived(on.a, on.b, port) for port in range(1, 40))


def test_a_flow_stays_where_it_is_when_its_peer_gets_another_network():
    with stage(multiplexer={"min_sessions": 2}) as on:
        on.until(lambda: len(on.a.plane.peers.get("b").pool.usable()) >= 2, 2.0)
        for port in range(1, 30):
            on.send(port)
        before = {flow.key: flow.sink for flow in on.a.plane.flows.flows.values()}
        peers = on.a.plane.peers
        peers.know("b", "b", (f"{on.b.address}/32", "10.99.0.0/16"))
        assert {flow.key: flow.sink for flow in on.a.plane.flows.flows.values()} == before
        peers.know("b", "b", ("10.99.0.0/16",))
        assert not any(flow.sink for flow in on.a.plane.flows.flows.values())


@pytest.mark.parametrize(("prefix", "returns"), [("10.86.0.2/32", False), ("10.86.0.0/24", True)])
def test_flows_go_where_their_destination_belongs_now(prefix, returns):
    """c takes over b's address, or a part of b's network, and gives it up again."""
    with stage(names="abc") as on:
        peers = on.a.plane.peers
        peers.know("b", "b", (prefix,))
        on.send()
        flow = next(iter(on.a.plane.flows.flows.values()))
        assert flow.sink.carrier.peer is peers.get("b")
        peers.know("c", "c", (f"{on.b.address}/32",))
        on.send()
        assert flow.sink.carrier.peer is peers.get("c")
        peers.know("c", "c", ())
        on.send()
        assert on.a.plane.counts.drops["no_route"] == (0 if returns else 1)
        assert not returns or flow.sink.carrier.peer is peers.get("b")
        on.a.check()


@pytest.mark.parametrize("by_who_made_the_relayed_one", [True, False])
def test_a_direct_session_takes_the_place_of_a_relayed_one_and_nothing_is_lost(by_who_made_the_relayed_one):
    with stage() as on:
        relayed = on.links()[0], on.links(on.b)[0]
        for link in relayed:
            link.path = Path(kind=RELAYED)
        maker = on.a if relayed[0].initiator == by_who_made_the_relayed_one else on.b
        other = on.b if maker is on.a else on.a
        maker.planner.wanted(other.name, SHARD, 2, False, on.world.loop.now_s)
        maker.settle()
        sent_s = on.now_s
        while on.now_s < sent_s + 1.0:
            on.send()
            on.send(back=True)
            on.run(0.002)
        assert all(link.closed for link in relayed)
        assert not any(link.path.kind == RELAYED for node in (on.a, on.b) for link in on.links(node))
        arrived = on.a.plane.counts.packets_to_tun + on.b.plane.counts.packets_to_tun
        assert arrived == on.world.packets
