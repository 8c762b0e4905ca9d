"""Asking control for destinations that nobody has: how often, for which, and for how many."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import msgspec
import pytest
from test_sources import EXIT, StandIn

from shards.peer.table import PeerTable, Unowned
from vpnd.config.live import Live
from vpnd.config.schema import Config, Registry


def number(last: int) -> int:
    return int(ipaddress.IPv4Address(f"10.86.0.{last}"))


class Asking:
    """What is asked, and the timer."""

    def __init__(self) -> None:
        config = msgspec.structs.replace(Config(), registry=Registry(negative_lifetime=7.0, max_waiting=3))
        self.asked: list[int] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.looked_again = 0
        self.unowned = Unowned(Live(config), self.asked.append, self._again, self._later)
        self.unowned.ask_in(["10.86.0.0/16"])

    def _again(self) -> None:
        self.looked_again += 1

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self.timers.append((seconds, call))

    def see(self, *lasts: int) -> None:
        for last in lasts:
            self.unowned.flow_begins(4, number(last))


@pytest.fixture
def asking() -> Asking:
    return Asking()


def test_an_address_is_asked_for_once_in_a_lifetime(asking: Asking) -> None:
    asking.see(9, 9, 8, 9)
    assert asking.asked == [number(9), number(8)]
    ((seconds, over),) = asking.timers
    looked_again = asking.looked_again
    assert seconds == 7.0
    over()
    assert asking.looked_again == looked_again + 1, "flows that go on ask again"
    asking.see(9)
    assert asking.asked[2:] == [number(9)] and len(asking.timers) == 2


def test_only_what_may_have_an_owner_and_so_many_are_asked_for(asking: Asking) -> None:
    asking.unowned.flow_begins(4, int(ipaddress.IPv4Address("192.0.2.1")))
    asking.unowned.flow_begins(6, number(9))
    assert not asking.asked and not asking.timers, "nothing is paid for what is not asked"
    asking.see(*range(10, 20))
    assert asking.asked == [number(last) for last in (10, 11, 12)]


def test_another_control_is_asked_anew(asking: Asking) -> None:
    asking.see(9)
    asking.unowned.ask_in(["10.86.0.0/16"])
    asking.see(9)
    assert asking.asked == [number(9)] * 2 and len(asking.timers) == 1


def test_a_network_around_an_address_does_not_make_its_owner() -> None:
    """An exit node has all addresses but those of which each has an owner of its own, or none."""
    asked: list[int] = []
    table = PeerTable(
        StandIn,  # type: ignore[arg-type]
        {"no_route": 0},
        Live(Config()),
        asked.append,
        lambda seconds, call: None,
        lambda *records: None,
    )
    leaving = table.know("exit", "exit", EXIT)
    assert leaving.sources.find(4, number(9)), "as long as nobody asks a contract"
    table.ask_owners(("10.86.0.0/16",))
    assert not leaving.sources.find(4, number(9))
    assert leaving.sources.find(4, number(1)) and leaving.sources.find(4, 0x08080808)
    table.sink_for(number(9) << 24).flush()
    assert asked == [number(9)]
    plain = table.know("plain", "plain", ("10.86.0.9/32",))
    assert plain.sources.find(4, number(9)) and not leaving.sources.find(4, number(9))
    table.forget("plain")
    table.ask_owners(("10.86.0.0/16",))
    assert not leaving.sources.find(4, number(9))
