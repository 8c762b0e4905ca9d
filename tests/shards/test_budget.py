"""What one peer may use of a shard: of a turn, and of memory, over all its sessions."""

from __future__ import annotations

import pytest
from queue_harness import live
from simulation.clock import VirtualLoop
from simulation.packets import number_of, record

from shards.budget import Budget
from shards.counters import Counts
from shards.flow.prefixes import set_of
from shards.inbound import Inbound, Reassembly
from vpnd.errors import FloodError

TURN = 16
RECORD = record(number_of("10.86.0.1"), number_of("10.86.0.2"), 1, 1, 1000)


class Busy:
    """A session that always has more; `taken`: records a turn."""

    def __init__(self, budget: Budget, loop: VirtualLoop) -> None:
        self.budget, self.loop = budget, loop
        self.taken: list[int] = []

    def go(self) -> None:
        self.taken.append(self.budget.turn(self.loop.now_s))
        self.budget.left = 0
        self.budget.wait(self.go)


@pytest.mark.setting("session.turn_records")
@pytest.mark.parametrize("records", [TURN, 100])
def test_sessions_of_a_peer_take_turns_within_one_budget(records: int) -> None:
    loop = VirtualLoop()
    with loop.running():
        budget = Budget(live(turn_records=records), loop.time, lambda: None)
        busy = [Busy(budget, loop) for _ in range(3)]
        for each in busy:
            each.go()
        assert [each.taken for each in busy] == [[records], [0], [0]]
        for _ in range(9):
            loop.run_one()
        shares = [sum(each.taken) for each in busy]
        assert sum(shares) == 10 * records and max(shares) - min(shares) <= records


@pytest.mark.setting("session.turn_interval")
@pytest.mark.parametrize("interval_s", [0.001, 0.5])
def test_a_turn_is_over_after_its_interval(interval_s: float) -> None:
    loop = VirtualLoop()
    with loop.running():
        budget = Budget(live(turn_interval=interval_s), loop.time, lambda: None)
        full = budget.turn(loop.now_s)
        budget.left = 1
        loop.now_s += interval_s * 0.9
        assert budget.turn(loop.now_s) == 1
        loop.now_s += interval_s * 0.2
        assert budget.turn(loop.now_s) == full


@pytest.mark.setting("session.partial_bytes")
@pytest.mark.parametrize("most", [1 << 17, 1 << 18])
def test_unfinished_packets_of_a_peer_are_bounded_over_all_its_streams(most: int) -> None:
    loop, written = VirtualLoop(), []
    with loop.running():
        budget = Budget(live(partial_bytes=most), loop.time, lambda: None)
    inbound = Inbound(written.append, set_of(["10.86.0.2/32"]), Counts())
    sources = set_of(["10.86.0.1/32"])
    part = memoryview(RECORD)[:900]

    def begin() -> Reassembly:
        reassembly = Reassembly(budget, Counts().drops)
        assert inbound.deliver_untrusted(sources, reassembly, part, 10) == (900, 0)
        return reassembly

    begun = [begin() for _ in range(most // 900)]
    with pytest.raises(FloodError):
        begin()
    budget.partial_bytes -= 900  # the session that went too far is gone
    for one in begun[:20]:
        rest = memoryview(RECORD)[900:]
        assert inbound.deliver_untrusted(sources, one, rest, 10) == (len(rest), 0)
    for one in begun[20:]:
        one.take()
    assert budget.partial_bytes == 0 and len(written) == 20


@pytest.mark.parametrize("most", [1, 3, 10])
@pytest.mark.parametrize("cut", [1, 3, 5, 700])
def test_records_are_taken_a_few_at_a_time_wherever_they_are_cut(most: int, cut: int) -> None:
    loop, written = VirtualLoop(), []
    with loop.running():
        budget = Budget(live(), loop.time, lambda: None)
    inbound = Inbound(lambda view: written.append(bytes(view)), set_of(["10.86.0.2/32"]), Counts())
    sources, reassembly = set_of(["10.86.0.1/32"]), Reassembly(budget, Counts().drops)
    data = memoryview(RECORD * 7)
    for start in range(0, len(data), len(data) - cut):
        view, position = data[start : start + len(data) - cut], 0
        while position < len(view):
            reached, records = inbound.deliver_untrusted(sources, reassembly, view[position:], most)
            position += reached
            assert records <= most
    assert written == [RECORD[4:]] * 7 and budget.partial_bytes == 0
