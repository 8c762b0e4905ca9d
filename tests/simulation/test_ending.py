"""A session that ends in the middle of a batch: what was for it goes elsewhere, in order, once the batch is over."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simulation.network import FakeTransport
from simulation.stage import Stage, stage
from vpnd.config.schema import Session

#: So small that a batch is written to the sockets while it is gone through.
SMALL = {"send_buffer_bytes": Session().control_reserve_bytes + (1 << 17)}
PORTS = range(1, 13)
HOUR_S = 3600.0


def kill_in_send(
    transport: FakeTransport, nth: int, other: FakeTransport | None = None
) -> Callable[[], bool]:
    """Let the `nth` send from now on find the connection reset, and the `other` one with it; whether it has been."""
    send, calls = transport.send, [0]

    def sending(view: memoryview) -> int:
        calls[0] += 1
        if calls[0] == nth:
            transport._connection.reset()
            if other is not None:
                other._connection.reset()
        return send(view)

    transport.send = sending  # type: ignore[method-assign]
    return lambda: calls[0] >= nth


def transports(on: Stage) -> list[FakeTransport]:
    return [link.transport for link in on.links()]  # type: ignore[misc]


def arrived_or_lost(on: Stage) -> None:
    """Every packet arrived, or had been given to a session that failed; nothing waits, nothing was dropped."""
    on.run(1.0)
    assert not any(on.a.plane.counts.drops.values())
    assert on.a.plane.queued() == 0
    for port in PORTS:
        on.send(port)
    on.run(0.2)
    assert all(on.world.last_arrived(on.a, on.b, port) for port in PORTS)
    assert on.b.plane.counts.packets_to_tun == on.b.plane.counts.packets_received
    assert on.a.plane.counts.packets_sent == on.world.packets, "sent once each, whatever became of it"


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_socket_is_killed_inside_a_send_of_a_batch_with_several_lanes(nth, queued, both):
    # Few enough that queues take them all; a rate at which they have to wait where that is wanted.
    settings = {
        "multiplexer": {"min_sessions": 3, "max_sessions": 3},
        "session": {**SMALL, "delay_target": HOUR_S, "not_sent_lowat_bytes": 1 << 14 if queued else 1 << 20},
        "stream_pool": {"min_streams_per_peer": 6, "max_streams_per_peer": 6, "cleanup_interval": 0.05},
    }
    with stage(rate=2e6 if queued else 1e9, **settings) as on:
        on.until(lambda: len(on.links()) == 3 and on.a.plane.streams() >= 6, 5.0)
        for port in PORTS:
            on.send(port)
        if queued:
            on.burst(PORTS, 20)
            on.run(0.001)
            assert on.a.plane.queued()
        first, other, _ = transports(on)
        killed = kill_in_send(first, nth, other if both else None)
        on.burst(PORTS, 40)
        if nth > 1:  # a batch writes less often where everything has to wait
            on.until(lambda: killed() or not on.a.plane.queued(), 5.0)
        assert killed() or queued
        arrived_or_lost(on)


def test_records_for_a_lane_that_closed_come_before_what_is_newer():
    """They go back in the order they came in, behind what the session's queue still had, and before the next batch."""
    with stage(multiplexer={"min_sessions": 2}, session=SMALL) as on:
        on.until(lambda: len(on.links()) == 2, 5.0)
        on.send(1)
        (flow,) = on.a.plane.flows.flows.values()
        link = flow.sink.carrier
        on.connection_of(link).faulted = True
        link.close("for the test")
        assert link in on.links() and flow.sink.closed, "closing only marks"
        on.send(1, count=5)
        assert link not in on.links() and not flow.sink.closed, "and the next batch sees to it first"
        on.run(0.2)
        assert on.world.last_arrived(on.a, on.b, 1)
        on.run(5.0)
        arrived_or_lost(on)


def test_what_an_ended_session_had_queued_goes_before_what_it_gave_back():
    """Pending packets go to a session that takes one, queues one, and ends: the third must not overtake the second."""
    with stage(delay_s=0.05, up=False) as on:
        for _ in range(6):
            on.send(1)
        on.until(on.links, 2.0)
        (link,) = on.links()
        (transport,) = transports(on)
        send, calls = transport.send, []

        def sending(view: memoryview) -> int:
            if link.lanes:
                calls.append(view)
                if len(calls) == 1:
                    raise BlockingIOError
                transport._connection.reset()
            return send(view)

        transport.send = sending  # type: ignore[method-assign]
        on.until(lambda: link not in on.links(), 2.0)
        on.run(3.0)
        assert on.world.last_arrived(on.a, on.b, 1), "in order, or the world had said so"
        assert on.b.plane.counts.packets_to_tun == 5, "the first one was in the session's hands"


def test_a_peer_that_gives_up_says_why():
    with stage() as on:
        link = on.links()[0]
        on.connection_of(link).faulted = True
        link._session._table.go_away(2)
        link._flush_soon()
        on.until(lambda: not on.links(on.b), 1.0)
        assert any(line.endswith("the peer gives up: internal error") for line in on.world.log)


def test_a_suspect_that_answers_is_said_to(caplog):
    caplog.set_level("INFO")
    with stage(health={"interval": 0.3, "timeout": 0.2, "max_consecutive_failures": 5}) as on:
        link = on.links()[0]
        on.cut()
        on.until(lambda: link.suspect, 2.0)
        on.cut(False)
        on.until(lambda: not link.suspect, 2.0)
        said = [record.message for record in caplog.records if f"{link.session_id:x}" in record.message]
        assert said[-2:] == [
            f"session {link.session_id:x} with b does not answer",
            f"session {link.session_id:x} with b answers again",
        ]
