"""A shard's slot: what its process tells, and what it leaves behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from supervisor.slots import ShardSlot
from vpnd.api.reports import PeerTraffic
from vpnd.config.live import Live
from vpnd.config.schema import Config, Membership
from vpnd.errors import ProtocolViolation
from vpnd.metrics import MOST


@pytest.fixture
def slot() -> Any:
    """One without a process."""
    live = Live(Config(membership=Membership(max_members=10)))
    slot = ShardSlot(0, live, None, None, SimpleNamespace(detach=lambda port: 0))  # type: ignore[arg-type]
    yield slot
    slot.close()


def rows(first: int, last: int) -> tuple[PeerTraffic, ...]:
    return tuple(PeerTraffic(peer_id=f"p{number}", bytes_sent=1) for number in range(first, last))


def test_no_shard_tells_of_more_peers_than_there_are(slot: Any) -> None:
    slot.told(rows(0, 20))
    slot.traffic.ended()
    slot.told(rows(0, 20))
    with pytest.raises(ProtocolViolation):
        slot.told(rows(20, 100))


def test_counters_that_no_shard_can_have_read_as_the_most_and_begin_again(slot: Any) -> None:
    page = slot.page
    page.set("packets_sent", 2**64 - 1)
    page.set("packets_received", 7)
    assert page.read()["packets_sent"] == MOST and page.read()["packets_received"] == 7
    assert page.mend() and not page.mend()
    assert page.read()["packets_sent"] == 0 and page.read()["packets_received"] == 7


def test_the_heartbeat_is_no_counter_and_wraps(slot: Any) -> None:
    page = slot.page
    page.values[len(page.names)] = 2**64 - 1
    before = page.read()
    page.beat()
    assert page.beats == 0 and page.read() == before


def test_what_was_dropped_of_a_peer_outlives_the_process_that_dropped_it(slot: Any) -> None:
    slot.told(
        (PeerTraffic(peer_id="p", drops={"queue_full": 3, "no_such_reason": 9}), PeerTraffic(peer_id="q"))
    )
    slot.traffic.ended()
    slot.told((PeerTraffic(peer_id="p", drops={"queue_full": 1, "too_big": 2}),))
    assert slot.traffic.drops_of("p") == {"queue_full": 4, "too_big": 2}
    assert slot.traffic.drops_of("q") == slot.traffic.drops_of("nobody") == {}
