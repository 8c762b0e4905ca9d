"""Streams give way to a few datagrams on a slow link: against a made-up link with a queue."""

from __future__ import annotations

import pytest

from shards.session.courtesy import Courtesy
from shards.session.transport import TcpState
from vpnd.config.live import Live
from vpnd.config.schema import Carrier, Config

LOOK_S = 0.25
BASE_S = 0.03
LINK = 6_000_000.0  # bytes a second
BUFFER_S = 0.05


class Way:
    """TCP that sends what it may, up to a fifth more than the link takes, and what stands in the link's queue."""

    def __init__(self, **carrier: object) -> None:
        self.courtesy = Courtesy(Live(Config(carrier=Carrier(**carrier))))  # type: ignore[arg-type]
        self.queue_s = 0.0
        self.arrived: list[float] = []
        self.queues: list[float] = []

    def run(self, looks: int, datagrams: int = 160 * 12, foreign_s: float = 0.0) -> None:
        """`foreign_s`: of others' bytes, a queue that is there whatever is done."""
        for _ in range(looks):
            pace = min(self.courtesy.rate or LINK * 1.2, LINK * 1.2)
            self.queue_s = min(max(0.0, self.queue_s + (pace / LINK - 1.0) * LOOK_S), BUFFER_S)
            arrives = LINK if self.queue_s else min(pace, LINK)
            rtt_s = BASE_S + self.queue_s + foreign_s
            self.courtesy.look(
                TcpState(1448, 0, 10, 0, rtt_s, BASE_S, int(arrives)), 0.0, int(arrives * LOOK_S), datagrams
            )
            self.arrived.append(arrives)
            self.queues.append(self.queue_s)


@pytest.mark.setting("carrier.yield_delay")
@pytest.mark.parametrize("delay_s", [0.001, 0.01])
def test_the_queue_stays_short_and_the_link_is_used(delay_s: float) -> None:
    way = Way(yield_delay=delay_s)
    way.run(100)
    mean_s = sum(way.queues[20:]) / 80
    assert mean_s < delay_s + 0.005
    assert sum(way.arrived[20:]) / 80 > 0.9 * LINK
    assert (max(way.queues[20:]) > 0.01) == (delay_s > 0.003)


def test_without_datagrams_or_beside_a_flood_nothing_gives_way() -> None:
    for datagrams in (0, int(LINK * LOOK_S)):
        way = Way()
        way.run(30, datagrams)
        assert way.courtesy.rate is None and way.arrived[-1] == LINK


def test_soon_after_the_last_datagram_there_is_no_limit_any_more() -> None:
    way = Way()
    way.run(20)
    assert way.courtesy.rate is not None
    way.run(3, 0)
    assert way.courtesy.rate is not None
    way.run(10, 0)
    assert way.courtesy.rate is None


@pytest.mark.setting("carrier.yield_share")
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_queue_of_others_costs_no_more_than_a_share(share: float) -> None:
    way = Way(yield_share=share)
    way.run(60, foreign_s=0.04)
    assert way.courtesy.rate == pytest.approx(LINK * share, rel=0.35)
    assert way.courtesy.rate is not None and way.courtesy.rate >= LINK * share * 0.7
