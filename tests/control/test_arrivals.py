"""Whose connection has to go when too many are under way."""

from __future__ import annotations

import pytest

from vpnd.adapter.arrivals import MINUTE_S, SECOND_S, Arrival, Pace, Places, Progress, Rate, source_of
from vpnd.config.live import Live
from vpnd.config.schema import P2P, Config

PLACES, RESERVED, FRESH_S = 8, 2, 10.0


class FromAddress:
    def __init__(self, ip: str) -> None:
        self.ip = ip

    def get_remote_address(self) -> tuple[str, int]:
        return self.ip, 4001


def arrival(ip: str, progress: Progress = Progress.SILENT) -> Arrival:
    found = Arrival(FromAddress(ip))
    found.progress = progress
    return found


class World:
    def __init__(self) -> None:
        self.now_s, self.members, self.asked = 0.0, [], 0
        self.places = Places(PLACES, RESERVED, self._members, FRESH_S, lambda: self.now_s)

    def _members(self) -> list[str]:
        self.asked += 1
        return self.members

    def flood(self, count: int, ip: str = "192.0.2.66", progress: Progress = Progress.SILENT) -> list[str]:
        """Where those are from that have to go."""
        gone = (self.places.enter(arrival(ip.format(number), progress)) for number in range(count))
        return [one.source for one in gone if one is not None]


@pytest.mark.parametrize(
    ("ip", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_machine_is_one_source_whatever_address_it_chooses(ip: str, source: str) -> None:
    assert source_of(ip) == source


def test_a_flood_pushes_out_itself() -> None:
    world = World()
    assert world.flood(1, "192.0.2.1") == []
    assert set(world.flood(100)) == {"192.0.2.66"}


def test_addresses_out_of_one_prefix_are_one_flood() -> None:
    world = World()
    world.flood(1, "192.0.2.1")
    assert set(world.flood(100, "2001:db8::{:x}")) == {"2001:db8::/64"}


def test_of_the_flood_the_one_goes_that_has_come_least_far() -> None:
    world = World()
    far = arrival("192.0.2.66", Progress.AGREED)
    world.places.enter(far)
    first = arrival("192.0.2.66")
    world.places.enter(first)
    world.flood(PLACES - 2)
    assert world.places.enter(arrival("192.0.2.66")) is first
    world.places.leave(far)
    assert world.places.enter(arrival("192.0.2.66")) is None


def test_from_everywhere_who_has_said_something_stays() -> None:
    world = World()
    world.flood(1, "198.51.100.1", Progress.SPOKE)
    assert "198.51.100.1" not in world.flood(100, "192.0.2.{}")


@pytest.mark.parametrize("how", ["listed", "came before"])
def test_where_members_are_some_places_stay(how: str) -> None:
    world = World()
    if how == "listed":
        world.members = ["/dns/name.example/tcp/4001", "/ip4/198.51.100.1/tcp/4001"]
    else:
        world.places.member_from("198.51.100.1")
    world.flood(RESERVED, "198.51.100.1")
    assert "198.51.100.1" not in world.flood(200, "192.0.2.{}", Progress.AGREED)
    assert "198.51.100.1" in world.flood(PLACES, "198.51.100.1"), "no more than those"


def test_members_are_looked_up_seldom() -> None:
    world = World()
    world.flood(100)
    assert world.asked == 1
    world.now_s = FRESH_S
    world.flood(1)
    assert world.asked == 2


def test_where_members_came_from_is_not_remembered_for_ever() -> None:
    world = World()
    for number in range(PLACES + 1):
        world.places.member_from(f"198.51.100.{number}")
    assert len(world.places._came_from) == PLACES


class Second:
    """Who is let in within one, and the next."""

    def __init__(self, members: tuple[str, ...] = (), **p2p: int) -> None:
        self.now_s = 0.0
        self.pace = Pace(Live(Config(p2p=P2P(**p2p))), lambda source: source in members, lambda: self.now_s)

    def admitted(self, source: str, tries: int) -> int:
        return sum(self.pace.admits(source) for _ in range(tries))


@pytest.mark.setting("p2p.max_connects_per_source")
def test_one_source_gets_in_so_often_a_second_and_the_others_notice_nothing() -> None:
    second = Second(max_connects_per_source=5)
    assert second.admitted("192.0.2.66", 100) == 5
    assert second.admitted("192.0.2.1", 1) == 1
    second.now_s += SECOND_S
    assert second.admitted("192.0.2.66", 100) == 5


@pytest.mark.setting("p2p.max_connects")
def test_a_flood_from_everywhere_keeps_no_member_out() -> None:
    second = Second(("198.51.100.1",), max_connects_per_source=5, max_connects=20)
    assert sum(second.admitted(f"192.0.2.{number}", 1) for number in range(100)) == 20
    assert second.admitted("198.51.100.1", 9) == 5
    assert second.admitted("203.0.113.1", 1) == 0


@pytest.mark.setting("p2p.max_handshakes_per_peer")
def test_where_a_member_came_too_often_one_gets_in_as_often_as_it_may_for_a_minute() -> None:
    second = Second(max_handshakes_per_peer=120)
    second.pace.slow_down("192.0.2.66")
    for _ in range(60):
        assert second.admitted("192.0.2.66", 50) == 2
        assert second.admitted("192.0.2.1", 50) == 50
        second.now_s += SECOND_S
    assert second.admitted("192.0.2.66", 50) == 50


def test_what_was_refused_is_told_until_a_minute_is_over() -> None:
    now_s = 0.0
    rate = Rate(lambda: now_s)
    assert [rate.allows("m", 2) for _ in range(5)] == [True, True, False, False, False]
    assert rate.allows("n", 2)
    assert (rate.refused("m"), rate.refused("n")) == (3, 0)
    now_s = MINUTE_S + 1
    assert rate.refused("m") == 0
    assert rate.allows("m", 2)
    assert rate.refused("m") == 0
