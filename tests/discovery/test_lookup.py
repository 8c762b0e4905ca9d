"""The chain of a look-up: which sources are asked, what each says, what comes out."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest

from vpnd.discovery.contract import Owner
from vpnd.discovery.lookup import AnswerCache, Found, Known, Lookup, Resolution, is_peer_id
from vpnd.errors import VpndError

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
OLD, NEW, LATER = "/ip4/192.0.2.1/tcp/4001", "/ip4/192.0.2.2/tcp/4001", "/ip4/192.0.2.3/tcp/4001"


class Sources:
    """All sources, with a clock; counts who was asked."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.known: dict[str, Known] = {}
        self.table: dict[str, Found] = {}
        self.owners: dict[str, str] = {}
        self.fails = self.stale = False
        self.asked: list[str] = []
        self.cache = AnswerCache(60.0, 5.0, 10)

    def find(self, what: str) -> Known | None:
        return self.known.get(what)

    async def search(self, peer_id: str) -> Found | None:
        self.asked.append("dht")
        if self.fails:
            raise VpndError("no answer within 5 s")
        return self.table.get(peer_id)

    async def owner(self, address: ipaddress.IPv4Address) -> Owner:
        self.asked.append("contract")
        if self.fails:
            raise VpndError("the endpoint refused")
        return Owner(
            peer_id=self.owners.get(str(address), ""), confirmed_s=self.now_s - 7.0, stale=self.stale
        )

    def resolve(self, what: str, *, contract: bool = False, dht: bool = True) -> Resolution:
        lookup = Lookup(
            self,
            lambda: self.now_s,
            cache=self.cache,
            search=self.search if dht else None,
            owner=self.owner if contract else None,
        )
        return asyncio.run(lookup.resolve(what))


def steps(resolution: Resolution) -> list[tuple[str, str, float | None]]:
    return [(step.source, step.result, step.age_s) for step in resolution.steps]


@pytest.fixture
def sources() -> Sources:
    made = Sources()
    made.known["b"] = Known(peer_id=PEER, name="b", virtual_ips=("10.86.0.2",), addresses=(OLD,), age_s=300.0)
    return made


def test_what_the_table_says_is_newer_comes_first(sources: Sources) -> None:
    sources.table[PEER] = Found(addresses=(NEW,), age_s=10.0)
    found = sources.resolve("b")
    assert (found.peer_id, found.name, found.virtual_ips) == (PEER, "b", ("10.86.0.2",))
    assert found.addresses == (NEW, OLD)
    assert steps(found) == [
        ("directory", f"peer {PEER}, at {OLD}", 300.0),
        ("cache", "nothing", None),
        ("dht", f"at {NEW}", 10.0),
    ]


def test_what_the_table_says_is_older_comes_last(sources: Sources) -> None:
    sources.table[PEER] = Found(addresses=(NEW, OLD), age_s=301.0)
    assert sources.resolve("b").addresses == (OLD, NEW)


def test_an_answer_is_asked_for_once_in_its_lifetime(sources: Sources) -> None:
    sources.table[PEER] = Found(addresses=(NEW,), age_s=10.0)
    sources.resolve("b")
    sources.now_s += 59.0
    found = sources.resolve("b")
    assert sources.asked == ["dht"]
    assert steps(found)[1:] == [("cache", f"at {NEW}", 59.0)]
    sources.now_s += 1.0
    sources.table[PEER] = Found(addresses=(LATER,), age_s=1.0)
    assert sources.resolve("b").addresses == (LATER, OLD)
    assert sources.asked == ["dht", "dht"]


def test_that_there_is_nothing_is_remembered_too_and_for_less(sources: Sources) -> None:
    assert sources.resolve("b").addresses == (OLD,)
    assert steps(sources.resolve("b"))[1:] == [("cache", "nothing", 0.0)]
    assert sources.asked == ["dht"]
    sources.now_s += 5.0
    sources.resolve("b")
    assert sources.asked == ["dht", "dht"]


def test_a_table_that_cannot_be_asked_is_no_answer(sources: Sources) -> None:
    sources.fails = True
    found = sources.resolve("b")
    assert found.addresses == (OLD,)
    assert steps(found)[-1] == ("dht", "failed: no answer within 5 s", None)
    sources.fails = False
    sources.table[PEER] = Found(addresses=(NEW,), age_s=0.0)
    assert sources.resolve("b").addresses == (NEW, OLD), "it is asked again at once"


def test_nobody_is_found_without_asking_anybody(sources: Sources) -> None:
    found = sources.resolve("nobody")
    assert (found.peer_id, found.addresses) == ("", ())
    assert steps(found) == [("directory", "not known", None)]
    assert sources.asked == []


def test_a_peer_id_stands_for_itself(sources: Sources) -> None:
    sources.table[PEER] = Found(addresses=(NEW,), age_s=10.0)
    found = sources.resolve(PEER)
    assert (found.peer_id, found.addresses) == (PEER, (NEW,))
    assert is_peer_id(PEER)
    assert not is_peer_id("b")


def test_the_contract_knows_addresses_that_the_directory_does_not(sources: Sources) -> None:
    sources.owners["10.86.0.9"] = PEER
    found = sources.resolve("10.86.0.9", contract=True, dht=False)
    assert (found.peer_id, found.virtual_ips) == (PEER, ("10.86.0.9",))
    assert steps(found) == [("directory", "not known", None), ("contract", f"peer {PEER}", 7.0)]
    sources.known[PEER] = sources.known["b"]
    assert sources.resolve("10.86.0.9", contract=True).name == "b", "and then the directory knows the rest"


def test_the_contract_may_know_nobody_or_fail(sources: Sources) -> None:
    assert steps(sources.resolve("10.86.0.9", contract=True))[-1] == ("contract", "nobody owns it", 7.0)
    sources.fails = True
    found = sources.resolve("10.86.0.9", contract=True)
    assert steps(found)[-1] == ("contract", "failed: the endpoint refused", None)
    assert found.peer_id == ""


def test_whatever_the_directory_says_the_contract_decides(sources: Sources) -> None:
    sources.known["10.86.0.2"] = sources.known["b"]
    sources.owners["10.86.0.2"] = PEER
    assert sources.resolve("10.86.0.2", contract=True).peer_id == PEER
    sources.stale = True
    assert "look-ups fail" in steps(sources.resolve("10.86.0.2", contract=True, dht=False))[-1][1]
    sources.owners.clear()
    found = sources.resolve("10.86.0.2", contract=True)
    assert found.peer_id == "" and [step.source for step in found.steps] == ["directory", "contract"]


@pytest.mark.parametrize("what", ["b", PEER, "fd86::9"])
def test_the_contract_is_asked_for_ipv4_addresses_alone(sources: Sources, what: str) -> None:
    sources.resolve(what, contract=True, dht=False)
    assert sources.asked == []


def test_without_a_table_there_are_no_further_steps(sources: Sources) -> None:
    assert steps(sources.resolve("b", dht=False)) == [("directory", f"peer {PEER}, at {OLD}", 300.0)]


def test_where_a_member_is_can_be_asked_alone(sources: Sources) -> None:
    sources.table[PEER] = Found(addresses=(NEW,), age_s=10.0)
    lookup = Lookup(sources, lambda: sources.now_s, cache=sources.cache, search=sources.search)
    first = asyncio.run(lookup.whereabouts(PEER))
    sources.now_s += 7.0
    again = asyncio.run(lookup.whereabouts(PEER))
    assert first is not None
    assert again is not None
    assert (first.age_s, again.age_s) == (10.0, 17.0)
