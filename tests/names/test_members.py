"""From members to names and back."""

from __future__ import annotations

import ipaddress

import dns.name
import pytest
from hypothesis import given
from hypothesis import strategies as st
from names_tools import table

from vpnd.discovery.registry import Member
from vpnd.names.members import MemberTable, table_of
from vpnd.names.origins import zone_names
from vpnd.names.reverse import locate

A = ipaddress.ip_address("10.86.0.1")


def test_a_name_that_is_no_label_has_one_of_its_own() -> None:
    members = table()
    assert members.addresses(members.labels["Büro"]) == (ipaddress.ip_address("10.86.0.9"),)


def test_an_address_of_two_belongs_to_the_name_that_sorts_first() -> None:
    assert MemberTable([("b", [A]), ("a", [A])]).label(A) == "a"


def member(name: str, peer_id: str, *prefixes: str) -> Member:
    return Member(peer_id=peer_id, name=name, prefixes=prefixes, addresses=())


def test_members_of_the_registry_have_their_own_addresses_and_not_their_networks() -> None:
    members = table_of([member("a", "P1", "10.86.0.1/32", "192.168.0.0/24", "fd00::1/128")])
    assert members.addresses("a") == (A, ipaddress.ip_address("fd00::1"))


def test_two_members_of_one_name_are_both_found() -> None:
    twice = [member("a", "P2-aaaaaaaaaaaa", "10.86.0.2/32"), member("a", "P1-bbbbbbbbbbbb", "10.86.0.1/32")]
    members = table_of(twice)
    assert members.addresses("a") == (A,)
    other = members.label(ipaddress.ip_address("10.86.0.2"))
    assert other is not None and other.startswith("a-")
    assert table_of(twice[::-1]).labels == members.labels


@pytest.mark.parametrize(
    ("prefix", "zones"),
    [
        ("10.86.0.0/16", ["86.10.in-addr.arpa"]),
        ("10.86.16.0/23", ["16.86.10.in-addr.arpa", "17.86.10.in-addr.arpa"]),
        ("10.86.0.1/32", ["1.0.86.10.in-addr.arpa"]),
        ("fd12:3456:789a::/48", ["a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa"]),
        ("fd00::/7", ["c.f.ip6.arpa", "d.f.ip6.arpa"]),
    ],
)
def test_reverse_zones(prefix: str, zones: list[str]) -> None:
    assert zone_names([ipaddress.ip_network(prefix, strict=False)]) == zones


@given(st.ip_addresses(v=4), st.integers(1, 32))
def test_each_reverse_zone_is_where_locate_says_it_begins(address, length: int) -> None:
    prefix = ipaddress.ip_network(f"{address}/{length}", strict=False)
    for text in zone_names([prefix]):
        name = dns.name.from_text(text)
        place = locate(name, [prefix])
        assert place is not None and place.apex == name and place.network is not None
        assert place.network.subnet_of(prefix)
