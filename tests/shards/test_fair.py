"""The fair queue: whose turn it is, what is dropped and why, and that a flow stays in order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from queue_harness import LEAST_RECORD, QUEUE_BYTES, Fair, chunk, live, numbers

from vpnd.packet import ecn
from vpnd.packet.record import PACKET_OFFSET

BULK, SMALL = 1, 2
KIB = 1024


def ports(fair: Fair) -> list[int]:
    return [port for port, _ in fair.sent]


@pytest.mark.parametrize("quantum", [KIB, 16 * KIB])
def test_a_new_flow_goes_before_those_that_have_had_a_turn(quantum):
    fair = Fair(live(quantum_bytes=quantum))
    for _ in range(80):
        fair.put(BULK, size=1000)
    for _ in range(40):
        fair.send()
    fair.put(SMALL)
    fair.send()
    assert ports(fair)[-1] == SMALL


def test_two_flows_get_the_same_share_of_bytes_whatever_their_packets_sizes():
    fair = Fair(live(quantum_bytes=4 * KIB))
    for _ in range(30):
        fair.put(BULK, size=1400)
    for _ in range(300):
        fair.put(SMALL, size=140)
    for _ in range(110):
        fair.send()
    carried = {port: ports(fair).count(port) * size for port, size in ((BULK, 1400), (SMALL, 140))}
    assert carried[BULK] == pytest.approx(carried[SMALL], abs=2 * 4 * KIB)


@pytest.mark.setting("session.quantum_bytes")
def test_a_larger_quantum_gives_longer_turns():
    turns = {}
    for quantum in (2 * KIB, 16 * KIB):
        fair = Fair(live(quantum_bytes=quantum))
        for port in (BULK, SMALL):
            for _ in range(40):
                fair.put(port, size=1000)
        while fair.send():
            pass
        sequence = ports(fair)
        turns[quantum] = 1 + sum(a != b for a, b in zip(sequence, sequence[1:], strict=False))
    assert turns[16 * KIB] * 3 < turns[2 * KIB]


BOUNDS = [
    ("a flow keeps what came first when it is full", {"buffer_size": 3}, [(BULK, 5, 100)], {"flow_full": 2}, 3),
    ("other flows are not touched by that", {"buffer_size": 3}, [(BULK, 5, 100), (SMALL, 3, 100)],
     {"flow_full": 2}, 6),
    ("with more room nothing is dropped", {"buffer_size": 5}, [(BULK, 5, 100)], {}, 5),
    ("a queue that is full loses packets of the large flow", {}, [(SMALL, 1, 100), (BULK, 140, 1000), (3, 1, 100)],
     {"queue_full": 11}, 131),
]  # fmt: skip


@pytest.mark.setting("worker.buffer_size", "session.queue_bytes")
@pytest.mark.parametrize(
    ("sentence", "worker", "puts", "dropped", "left"), BOUNDS, ids=[row[0] for row in BOUNDS]
)
def test_what_there_is_no_room_for_is_dropped(sentence, worker, puts, dropped, left):
    fair = Fair(live(worker=worker))
    for port, packets, size in puts:
        for _ in range(packets):
            fair.put(port, size=size)
    assert fair.dropped() == dropped
    assert fair.queue.packets == left
    assert fair.queue.bytes <= QUEUE_BYTES
    while fair.send():
        pass
    assert (SMALL, 0) in fair.sent or not any(port == SMALL for port, _, _ in puts)
    fair.check()


def test_the_bounds_are_those_in_force_now():
    fair = Fair(live(worker={"buffer_size": 1}))
    fair.put(BULK, 2)
    assert fair.dropped() == {"flow_full": 2}
    fair.live.config = live(worker={"buffer_size": 2}).config
    fair.put(BULK, 2)
    assert fair.dropped() == {"flow_full": 2}
    fair.live.config = live(queue_bytes=1 << 20).config
    for _ in range(200):
        fair.put(SMALL, size=1000)
    assert fair.dropped() == {"flow_full": 2}


DELAYS = [
    ("waiting below the target costs nothing, however long it lasts", 0.004, 1.0, False),
    ("waiting above the target for less than an interval costs nothing", 0.2, 0.09, False),
    ("waiting above the target for an interval begins to cost packets", 0.2, 0.3, True),
]


@pytest.mark.parametrize(("sentence", "waits_s", "lasts_s", "drops"), DELAYS, ids=[row[0] for row in DELAYS])
def test_delay_is_controlled(sentence, waits_s, lasts_s, drops):
    standing = standing_queue(waits_s, lasts_s, target_s=0.005, interval_s=0.1)
    assert bool(standing) == drops
    if standing:
        assert standing[0] == pytest.approx(0.1, abs=0.003)


def standing_queue(waits_s: float, lasts_s: float, *, target_s: float, interval_s: float) -> list[float]:
    """When packets are dropped of a flow whose oldest packet has waited for so long, millisecond by millisecond."""
    fair = Fair(
        live(delay_target=target_s, delay_interval=interval_s, quantum_bytes=KIB, queue_bytes=1 << 24)
    )
    dropped: list[float] = []
    for _ in range(int(lasts_s * 4000)):
        fair.put(BULK, size=1000)
    backlog = fair.flow(BULK).backlog
    assert backlog is not None
    for step in range(int(lasts_s * 1000)):
        now_s = step / 1000
        for waiting in backlog.chunks:
            waiting.since_s = now_s - waits_s
        before = fair.drops["queue_delay"]
        assert fair.send(now_s)
        dropped += [now_s] * (fair.drops["queue_delay"] - before)
    return dropped


def test_dropping_gets_faster_at_the_pace_of_the_specification():
    """RFC 8289: the n-th drop follows the one before it after interval / sqrt(n)."""
    at_s = standing_queue(0.5, 1.0, target_s=0.005, interval_s=0.1)
    waits = [later - earlier for earlier, later in zip(at_s, at_s[1:], strict=False)]
    assert len(waits) > 10
    for count, wait_s in enumerate(waits[:10], 1):
        assert wait_s == pytest.approx(0.1 / count**0.5, abs=0.0021)


def test_packets_whose_senders_heed_marks_are_marked_at_that_pace_and_not_dropped():
    fair = Fair(live(delay_target=0.005, delay_interval=0.1, quantum_bytes=KIB, queue_bytes=1 << 24))
    for _ in range(2000):
        fair.put(BULK, size=1000)
    backlog = fair.flow(BULK).backlog
    assert backlog is not None
    for waiting in backlog.chunks:
        waiting.buffer[waiting.start + PACKET_OFFSET + 1] = 2
    marked: list[float] = []
    for step in range(1000):
        now_s = step / 1000
        for waiting in backlog.chunks:
            waiting.since_s = now_s - 0.5
        flow, chunk = fair.queue.first(now_s), backlog.chunks[0]
        marked += [now_s] * (ecn.bits_of(chunk.buffer, chunk.start + PACKET_OFFSET) == ecn.MARKED)
        fair.queue.sent(flow, now_s)
    assert not fair.dropped()
    waits = [later - earlier for earlier, later in zip(marked, marked[1:], strict=False)]
    assert len(waits) > 10
    for count, wait_s in enumerate(waits[:10], 1):
        assert wait_s == pytest.approx(0.1 / count**0.5, abs=0.0021)


@pytest.mark.setting("session.delay_target", "session.delay_interval")
@pytest.mark.parametrize(
    ("target_s", "interval_s", "drops"), [(0.005, 0.1, True), (0.4, 0.1, False), (0.005, 0.9, False)]
)
def test_target_and_interval_are_settings(target_s, interval_s, drops):
    assert bool(standing_queue(0.2, 0.5, target_s=target_s, interval_s=interval_s)) == drops


def test_a_flow_whose_stream_is_full_does_not_hold_up_others():
    fair = Fair(live())
    fair.put(BULK)
    fair.put(SMALL)
    blocked = fair.queue.first(0.0)
    fair.queue.block(blocked)
    fair.put(BULK)
    while fair.send():
        pass
    assert fair.sent == [(SMALL, 0)]
    fair.queue.unblock()
    while fair.send():
        pass
    assert fair.sent == [(SMALL, 0), (BULK, 0), (BULK, 1)]
    fair.check()


@pytest.mark.parametrize("blocked", [1, 8, 40])
def test_a_large_flow_bears_the_losses_also_beside_flows_that_are_blocked(blocked: int):
    fair = Fair(live())
    queue = fair.queue
    for port in range(blocked):
        queue.put(fair.flow(port), chunk(port, range(1), size=1400))
        queue.first(0.0)
        queue.block(fair.flow(port))
    for number in range(90):
        queue.put(fair.flow(100), chunk(100, range(number, number + 1), size=2000))
    for number in range(40):
        queue.put(fair.flow(200), chunk(200, range(number, number + 1), size=1400))
    assert not any(fair.flow(port).dropped for port in range(blocked))
    assert fair.flow(100).dropped > 2 * fair.flow(200).dropped


def test_everything_or_what_is_of_some_flows_can_be_taken_out():
    fair = Fair(live())
    for port in (1, 2, 3):
        fair.put(port, 2)
        fair.put(port)
    blocked = fair.queue.first(0.0)
    fair.queue.block(blocked)
    taken = fair.queue.take_all({fair.flow(1), fair.flow(3)})
    assert sorted(sum(map(numbers, taken), [])) == [(1, 0), (1, 1), (1, 2), (3, 0), (3, 1), (3, 2)]
    assert [each for each in sum(map(numbers, taken), []) if each[0] == 1] == [(1, 0), (1, 1), (1, 2)]
    assert fair.queue.packets == 3
    assert sum(map(numbers, fair.queue.take_all()), []) == [(2, 0), (2, 1), (2, 2)]
    assert not fair.queue and fair.queue.bytes == 0
    assert fair.queue.first(0.0) is None


def test_a_flow_may_move_to_another_queue_while_the_first_still_lists_it():
    first, second = Fair(live()), Fair(live())
    flow = second.flows[BULK] = first.flow(BULK)
    first.put(BULK)
    first.put(SMALL)
    assert first.send()  # empty, and still listed
    second.put(BULK)
    assert first.send() and not first.send()
    assert (first.sent, first.queue.packets) == ([(BULK, 0), (SMALL, 0)], 0)
    assert flow.backlog is not None and flow.backlog.queue is second.queue
    assert second.queue.packets == 1 and first.queue.take_all() == []
    assert second.send() and not second.send()
    first.put(BULK)  # and back
    assert first.send() and not first.send()


def test_the_least_waiting_time_is_told_once():
    fair = Fair(live())
    for since_s in (0.0, 0.3):
        fair.put(BULK, now_s=since_s)
    assert fair.queue.least_delay_s() is None
    fair.send(0.4)
    fair.send(0.4)
    assert fair.queue.least_delay_s() == pytest.approx(0.1)
    assert fair.queue.delay_s == pytest.approx(0.1)
    assert fair.queue.least_delay_s() is None


@given(st.randoms(use_true_random=False), st.sampled_from((20, 1 << 16)), st.sampled_from((0.001, 10.0)))
def test_nothing_is_lost_without_a_reason_and_no_flow_is_reordered(
    chance: random.Random, buffer_size: int, target_s: float
) -> None:
    fair = Fair(
        live(
            worker={"buffer_size": buffer_size}, delay_target=target_s, delay_interval=0.01, quantum_bytes=KIB
        )
    )
    now_s = 0.0
    for _ in range(chance.randrange(200)):
        now_s += chance.choice((0.0, 0.0, 0.002, 0.05))
        what = chance.randrange(10)
        if what < 5:
            size = chance.choice((LEAST_RECORD, 1000, 30_000))
            fair.put(chance.randrange(6), chance.randint(1, 2 if size > 1000 else 8), now_s, size)
        elif what < 8:
            fair.send(now_s)
        elif what == 8 and (flow := fair.queue.first(now_s)) is not None:
            fair.queue.block(flow)
        else:
            fair.queue.unblock()
        assert fair.queue.bytes <= QUEUE_BYTES
        fair.check()
    fair.queue.unblock()
    while fair.send(now_s):
        fair.check()
    assert not fair.queue
    for port in range(6):
        mine = [number for each, number in fair.sent if each == port]
        assert mine == sorted(mine) and len(mine) == len(set(mine))
