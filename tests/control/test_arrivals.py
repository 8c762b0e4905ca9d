"""Whose connection has to go when too many are under way."""

from __future__ import annotations

import pytest

from vpnd.adapter.arrivals import Arrival, Places, Progress, source_of

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
