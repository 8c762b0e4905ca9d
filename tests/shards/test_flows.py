"""Flow workers: when they are made, moved and forgotten, and what state they are said to be in."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from queue_harness import Fair, chunk, live, numbers

from shards.counters import Counts
from shards.flow.fair import FairQueue
from shards.flow.flows import SPAN_BYTES, STAY, Discard, Flow, FlowTable, Sink, unpin
from shards.flow.queues import Pending, ReorderBuffer
from vpnd.config.live import Live
from vpnd.packet.ring import SCRATCH

DROPS = Counts().drops


class Place:
    """A lane, as the table sees it."""

    holding = False
    most_bytes = SPAN_BYTES

    def __init__(self) -> None:
        self.flows: set[Flow] = set()
        self.movable_before_s = STAY

    def submit(self, buffer: memoryview, start: int, end: int, packets: int) -> None:
        raise AssertionError("nothing is sent here")

    def flush(self) -> None:
        raise AssertionError("nothing is sent here")


def table(max_flows: int = 16, sinks: list[Sink] | None = None, **worker: float) -> tuple[FlowTable, Live]:
    """A table whose flows get the sinks in turn, the last one for good."""
    settings = live(worker={"max_flows": max_flows, "idle_timeout": 10.0, "stall_timeout": 1.0} | worker)
    order = sinks or [Place()]

    def sink_for(key: int) -> Sink:
        return order.pop(0) if len(order) > 1 else order[0]

    return FlowTable(settings, sink_for, Counts()), settings


def wait(flow: Flow, settings: Live, since_s: float = 0.0) -> FairQueue:
    """Something of the flow waits."""
    queue = FairQueue(settings, Counts().drops)
    queue.put(flow, chunk(1, range(1), since_s))
    return queue


def test_a_full_table_forgets_the_flow_longest_without_a_packet():
    flows, _ = table(max_flows=16)
    for key in range(16):
        flows.open(key, 1.0)
    flows.flows[5].last_s = 0.5
    flows.open(100, 2.0)
    assert len(flows.flows) == 16
    assert 5 not in flows.flows and 100 in flows.flows
    assert (flows._counts.flows_created, flows._counts.flows_reaped) == (17, 1)


@pytest.mark.setting("worker.max_flows")
def test_the_table_grows_with_its_limit():
    flows, settings = table(max_flows=16)
    for key in range(20):
        flows.open(key, 1.0)
    assert len(flows.flows) == 16
    settings.config = live(worker={"max_flows": 40}).config
    for key in range(100, 120):
        flows.open(key, 1.0)
    assert len(flows.flows) == 36


def test_flows_of_which_something_waits_are_never_forgotten():
    flows, settings = table(max_flows=16)
    waiting = [flows.open(key, 0.0) for key in range(4)]
    for flow in waiting:
        wait(flow, settings)
    for key in range(100, 200):
        flows.open(key, 50.0)
    flows.forget_idle(1000.0)
    assert set(flows.flows) == {0, 1, 2, 3}


def test_flows_that_are_held_back_are_never_forgotten():
    """A new worker would not know of the packets that wait, and overtake them."""
    holding = ReorderBuffer(live(), DROPS, lambda: 0.0)
    flows, _ = table(max_flows=16, sinks=[holding, Place()])
    held = flows.open(1, 0.0)
    for key in range(100, 200):
        flows.open(key, 50.0)
    flows.forget_idle(1000.0)
    assert flows.flows == {1: held}


IDLE = [
    ("a flow that was silent for the idle timeout is forgotten", 10.0, 20.1, False),
    ("a flow that was silent for less is kept", 10.0, 19.9, True),
    ("a longer timeout keeps it longer", 30.0, 20.1, True),
]


@pytest.mark.setting("worker.idle_timeout")
@pytest.mark.parametrize(("sentence", "timeout_s", "now_s", "kept"), IDLE, ids=[row[0] for row in IDLE])
def test_silent_flows_are_forgotten(sentence, timeout_s, now_s, kept):
    place = Place()
    flows, settings = table(sinks=[place])
    flow = flows.open(1, 10.0)
    settings.config = live(worker={"idle_timeout": timeout_s}).config
    flows.forget_idle(now_s)
    assert (1 in flows.flows) == kept
    assert (flow in place.flows) == kept
    assert flows._counts.flows_reaped == (0 if kept else 1)


STATES = [
    ("a packet since the last cleaning: active", 6.0, None, False, {}, "active"),
    ("none since then: idle", 4.0, None, False, {}, "idle"),
    ("its oldest packet waits for the stall timeout: stalled", 6.0, 6.0, False, {}, "stalled"),
    ("for less: active", 6.0, 6.5, False, {}, "active"),
    ("with a longer timeout: active", 6.0, 6.0, False, {"stall_timeout": 2.0}, "active"),
    ("held back: draining, whatever else", 4.0, None, True, {}, "draining"),
]


@pytest.mark.setting("worker.stall_timeout")
@pytest.mark.parametrize(
    ("sentence", "last_s", "waits_since_s", "held", "worker", "state"), STATES, ids=[row[0] for row in STATES]
)
def test_a_flow_is_in_one_state(sentence, last_s, waits_since_s, held, worker, state):
    place: Sink = ReorderBuffer(live(), DROPS, lambda: 0.0) if held else Place()
    flows, settings = table(sinks=[place], **worker)
    flows.forget_idle(5.0)
    flow = flows.open(1, last_s)
    if waits_since_s is not None:
        wait(flow, settings, waits_since_s)
    flows.count_states(7.0)
    assert flows.states.pop(state) == 1 and not any(flows.states.values())


def test_a_flow_moves_only_when_nothing_of_it_waits():
    first, second = Place(), Place()
    flows, settings = table(sinks=[first, second])
    flow = flows.open(1, 0.0)
    queue = wait(flow, settings)
    assert flows.open(1, 1.0).sink is first
    queue.take_all()
    assert flows.open(1, 1.0).sink is second
    assert (first.flows, second.flows, flows._counts.flows_moved) == (set(), {flow}, 1)


def test_a_flow_whose_sink_has_ended_finds_another():
    first, second = Place(), Place()
    flows, _ = table(sinks=[first, second])
    flow, other = flows.open(1, 0.0), Flow(7)
    other.pin(first)
    unpin(first, {flow})
    assert (flow.sink, other.sink) == (None, first)
    assert flows.open(1, 0.0).sink is second
    unpin(first)
    assert other.sink is None and not first.flows


def test_a_discard_sink_counts_and_says_so_before():
    drops, seen = Counts().drops, []
    discard = Discard("circuit_open", drops, lambda *records: seen.append(drops["circuit_open"]))
    discard.submit(memoryview(b""), 0, 0, 3)
    discard.submit(memoryview(b""), 0, 0, 2)
    assert (drops["circuit_open"], seen) == (5, [0, 3])


@given(st.randoms(use_true_random=False))
def test_every_flow_is_pinned_where_it_says(chance: random.Random) -> None:
    places = [Place() for _ in range(3)]
    fair = Fair(live())
    counts = Counts()
    settings = live(worker={"max_flows": 16, "idle_timeout": 1.0})
    flows = FlowTable(settings, lambda key: chance.choice(places), counts)
    now_s = 0.0
    for _ in range(chance.randrange(150)):
        now_s += chance.random() / 4
        what, key = chance.randrange(8), chance.randrange(40)
        if what < 5:
            fair.flows[key] = flow = flows.open(key, now_s)
            flow.last_s = now_s
            if chance.random() < 0.2:
                fair.put(key, 1, now_s)
        elif what == 5:
            unpin(chance.choice(places))
        elif what == 6:
            flows.forget_idle(now_s)
        else:
            fair.send(now_s)
        pinned = [flow for place in places for flow in place.flows]
        assert len(pinned) == len(set(pinned))
        assert all(flows.flows[flow.key] is flow and flow in flow.sink.flows for flow in pinned)
        assert counts.flows_created - counts.flows_reaped == len(flows.flows)
        waiting = sum(flow.oldest_s() is not None for flow in flows.flows.values())
        assert len(flows.flows) <= 16 + waiting


# --- what waits together


def test_a_chunk_keeps_the_records_and_has_scratch_in_front():
    source = memoryview(bytes(range(64)))
    kept = chunk(1, range(1)).__class__(source, 20, 50, 1, 0.0)
    assert bytes(kept.buffer[kept.start : kept.end]) == bytes(range(20, 50))
    kept.buffer[:SCRATCH] = b"!" * SCRATCH
    assert kept.start >= SCRATCH and len(kept) == 30


def test_dropping_the_first_packet_of_a_chunk_leaves_the_others():
    kept = chunk(4, range(5, 8))
    whole = len(kept)
    taken = kept.drop_first(DROPS, "queue_delay")
    assert (len(kept), kept.packets) == (whole - taken, 2)
    assert numbers(kept) == [(4, 6), (4, 7)]


ROOM = [
    ("bytes are the bound", {"pending_bytes": 300}, 3, 2),
    ("packets are the bound", {"buffer_size": 1}, 3, 1),
    ("with room everything waits", {}, 3, 3),
    ("no room, no waiting", {"pending_bytes": 0}, 2, 0),
]


@pytest.mark.setting("worker.pending_bytes")
@pytest.mark.parametrize(("sentence", "worker", "packets", "kept"), ROOM, ids=[row[0] for row in ROOM])
def test_packets_wait_for_a_session_within_bounds(sentence, worker, packets, kept):
    drops, wanted = Counts().drops, []
    pending = Pending(live(worker=worker), drops, lambda: 0.0, lambda: wanted.append(1))
    for number in range(packets):
        one = chunk(1, range(number, number + 1), size=100)
        pending.submit(one.buffer, one.start, one.end, 1)
    assert (pending.queue.packets, drops["no_session"]) == (kept, packets - kept)
    assert wanted[:1] == [1] and len(wanted) == (1 if kept else packets)
    out: list[tuple[int, int]] = []
    pending.empty(lambda each: out.extend(numbers(each)))
    assert out == [(1, number) for number in range(kept)]
    assert not pending.queue and pending.queue.bytes == 0


def test_what_waits_for_too_long_is_dropped():
    drops, clock = Counts().drops, [0.0]
    settings = live(worker={"pending_timeout": 2.0})
    pending = Pending(settings, drops, lambda: clock[0], lambda: None)
    for clock[0] in (0.0, 1.0):
        one = chunk(1, range(2))
        pending.submit(one.buffer, one.start, one.end, 2)
    assert pending.expire(1.9) == 2.0
    assert pending.expire(2.0) == 3.0
    assert drops["no_session"] == 2
    settings.config = live(worker={"pending_timeout": 5.0}).config
    assert pending.expire(3.0) == 6.0
    pending.drop_all("circuit_open")
    assert pending.expire(9.0) is None and drops["circuit_open"] == 2


def test_what_finds_no_way_after_all_waits_on_in_order():
    pending = Pending(live(), Counts().drops, lambda: 0.0, lambda: None)
    for number in range(3):
        one = chunk(1, range(number, number + 1))
        pending.submit(one.buffer, one.start, one.end, 1)
    pending.empty(lambda each: pending.submit(each.buffer, each.start, each.end, each.packets))
    out: list[tuple[int, int]] = []
    pending.empty(lambda each: out.extend(numbers(each)))
    assert out == [(1, 0), (1, 1), (1, 2)]


@pytest.mark.setting("session.hold_bytes")
@pytest.mark.parametrize(("hold_bytes", "kept"), [(1 << 17, 2), (1 << 20, 3)])
def test_what_is_held_back_is_bounded_but_for_what_waited_before(hold_bytes, kept):
    drops = Counts().drops
    holding = ReorderBuffer(live(hold_bytes=hold_bytes), drops, lambda: 0.0)
    holding.hold(chunk(1, range(1), size=60_000))
    for number in (1, 2):
        one = chunk(1, range(number, number + 1), size=60_000)
        holding.submit(one.buffer, one.start, one.end, 1)
    assert (holding.queue.packets, drops["queue_full"]) == (kept, 3 - kept)
    out: list[tuple[int, int]] = []
    holding.empty(lambda each: out.extend(numbers(each)))
    assert out == [(1, number) for number in range(kept)]
