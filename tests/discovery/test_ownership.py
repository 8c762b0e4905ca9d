"""Who may use which address, by what a contract says: a scripted contract, a clock that is turned by hand."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vpnd.config.schema import Peer, Registry
from vpnd.discovery.ownership import NEVER, Ownership
from vpnd.discovery.registry import Member, PeerRegistry

SUBNET = "10.86.0.0/16"
OWN = "me"


def ip(last: int) -> ipaddress.IPv4Address:
    return ipaddress.IPv4Address(f"10.86.0.{last}")


class World:
    """A registry of peers under a contract. `says` gives the owner of an address, None for an endpoint that is down."""

    def __init__(self, **settings: float) -> None:
        table = {"positive_lifetime": 100.0, "refresh_share": 0.5, "negative_lifetime": 10.0} | settings
        table = {"failure_lifetime": 2.0, "stale_lifetime": 1000.0, "max_waiting": 3} | table
        self.now_s = 0.0
        self.says: dict[ipaddress.IPv4Address, str | None] = {}
        self.asked: list[int] = []
        self.calls = 0
        self.ownership = Ownership(Registry(**table), 2.0, self._due)  # type: ignore[arg-type]
        self.ownership.govern([SUBNET, "fd86::/64"])
        self.registry = PeerRegistry((), self.ownership)

    def _due(self) -> None:
        self.calls += 1

    def peer(self, name: str, *prefixes: str) -> None:
        """A member that claims these."""
        member = Member(peer_id=name, name=name.upper(), prefixes=prefixes, addresses=(), source="membership")
        self.registry.update({name: member})

    def run(self, to_s: float | None = None) -> list[int]:
        """Ask for what is due, until that moment; the last bytes of what was asked for."""
        to_s = self.now_s if to_s is None else to_s
        begun = len(self.asked)
        while True:
            self.registry.reconsider(self.ownership.lapse(self.now_s))
            for address in self.ownership.take_due(self.now_s, 100):
                self.asked.append(address.packed[-1])
                owner = self.says.get(address, "")
                if owner is None:
                    self.ownership.failed(address, "down", self.now_s)
                else:
                    self.registry.reconsider(self.ownership.answered(address, owner, self.now_s))
            next_s = self.ownership.next_s()
            if next_s > to_s:
                self.now_s = to_s
                return self.asked[begun:]
            self.now_s = max(self.now_s, next_s)

    def has(self, name: str) -> list[str]:
        member = self.registry.find(name)
        assert member is not None
        return list(member.prefixes)

    def said(self, name: str) -> list[str]:
        return list(self.ownership.report(name, self.now_s, str.upper))


@pytest.fixture
def world() -> World:
    made = World()
    made.says[ip(2)] = "b"
    made.peer("b", "10.86.0.2/32", "fd86::2/128", "192.168.7.0/24", "192.168.9.9/32")
    return made


NOT_ASKED = ["fd86::2/128", "192.168.7.0/24", "192.168.9.9/32"]


def test_an_address_is_used_from_the_moment_the_contract_confirms_it(world: World) -> None:
    assert world.has("b") == NOT_ASKED, (
        "IPv6, and what is outside of the VPN, is none of the contract's business"
    )
    assert world.said("b") == ["10.86.0.2 is not used: its owner is looked up"]
    assert (world.ownership.unconfirmed, world.ownership.unasked) == (1, 1)
    assert world.run() == [2]
    assert world.has("b") == ["10.86.0.2/32", *NOT_ASKED] and world.said("b") == []
    assert (world.ownership.unconfirmed, world.ownership.unasked, world.ownership.disowned) == (0, 0, 0)


@pytest.mark.parametrize(("owner", "why"), [("", "nobody owns it"), ("c", "C owns it")])
def test_what_is_not_the_peers_is_not_used_and_asked_for_again(world: World, owner: str, why: str) -> None:
    world.says[ip(2)] = owner
    world.run()
    assert world.has("b") == NOT_ASKED
    assert world.said("b") == [f"10.86.0.2 is not used: the contract says that {why}"]
    assert world.ownership.disowned == 1
    assert world.run(9.9) == []
    world.says[ip(2)] = "b"
    assert world.run(10.0) == [2]
    assert "10.86.0.2/32" in world.has("b") and world.ownership.disowned == 0


@pytest.mark.setting("registry.refresh_share")
def test_an_owner_is_confirmed_again_before_its_lifetime_ends(world: World) -> None:
    world.run()
    assert world.run(49.9) == [] and world.run(50.0) == [2] and world.run(149.0) == [2]
    world.says[ip(2)] = ""
    world.run(150.0)
    assert world.has("b") == NOT_ASKED


def test_an_address_that_changes_hands_is_the_new_owners_in_the_same_step(world: World) -> None:
    world.peer("c", "10.86.0.3/32")
    world.run()
    world.says[ip(2)] = "c"
    world.run(50.0)
    assert world.has("b") == NOT_ASKED
    assert world.has("c") == ["10.86.0.2/32"], "claimed or not; its own it has not"


def test_of_two_that_claim_one_address_the_contract_chooses(world: World) -> None:
    world.peer("c", "10.86.0.2/32")
    assert world.run() == [2]
    assert world.has("c") == [] and "10.86.0.2/32" in world.has("b")
    assert world.said("c") == ["10.86.0.2 is not used: the contract says that B owns it"]


def test_an_owner_outlives_an_outage_but_not_for_ever(world: World) -> None:
    world.run()
    world.says[ip(2)] = None
    world.run(999.9)
    assert "10.86.0.2/32" in world.has("b") and world.ownership.stale == 1
    assert world.said("b") == ["10.86.0.2 is used for another 0 s, unless its owner is confirmed: down"]
    world.run(1000.0)
    assert world.has("b") == NOT_ASKED
    assert (world.ownership.stale, world.ownership.unconfirmed) == (0, 1)
    assert world.said("b") == ["10.86.0.2 is not used: its owner could not be looked up: down"]
    world.says[ip(2)] = "b"
    world.run(1010.0)
    assert "10.86.0.2/32" in world.has("b")


def test_who_was_never_confirmed_does_not_profit_from_an_outage(world: World) -> None:
    world.says[ip(2)] = None
    world.run(100.0)
    assert world.has("b") == NOT_ASKED and world.ownership.unconfirmed == 1


def test_an_owner_is_believed_no_longer_because_nobody_found_the_time_to_ask() -> None:
    world = World()
    world.says[ip(2)] = "b"
    world.peer("b", "10.86.0.2/32")
    world.run()
    world.ownership.take_due(50.0, 1)  # and the answer never comes
    assert world.ownership.next_s() == world.ownership.lapses_s() == 1000.0
    assert world.ownership.lapse(999.9) == frozenset()
    assert world.ownership.lapse(1000.0) == {"b"}


def test_failures_are_repeated_more_and_more_seldom(world: World) -> None:
    world.says[ip(2)] = None
    world.run()
    for at_s in (2.0, 6.0, 14.0, 24.0, 34.0):  # 2, 4, 8, and never more than negative_lifetime
        assert world.run(at_s - 0.1) == [] and world.run(at_s) == [2]


def test_what_packets_want_is_asked_for_and_given_to_a_peer(world: World) -> None:
    world.says[ip(9)] = "b"
    world.run()
    assert world.ownership.wanted(ip(9))
    assert world.run() == [9]
    assert world.has("b") == ["10.86.0.2/32", *NOT_ASKED, "10.86.0.9/32"]
    assert world.run(50.0) == [2, 9], "it is in use from then on"
    world.says[ip(9)] = ""
    world.run(100.0)
    assert "10.86.0.9/32" not in world.has("b")


def test_what_nobody_has_is_asked_for_once_in_a_while(world: World) -> None:
    world.run()
    for _ in range(5):
        world.ownership.wanted(ip(9))
    assert world.run(9.9) == [9]
    world.ownership.wanted(ip(9))
    assert world.run(9.9) == []
    assert world.run(49.0) == [9], "it was wanted once more"
    world.ownership.wanted(ip(9))
    world.says[ip(9)] = None
    assert world.run() == [9], "and is forgotten in between"
    world.ownership.wanted(ip(9))
    assert world.run(58.9) == [2] and world.run(59.0) == [9], (
        "an endpoint that is down is not asked more often"
    )


def test_what_a_stranger_owns_is_nobodys_until_the_stranger_is_a_peer(world: World) -> None:
    world.says[ip(9)] = "d"
    world.run()
    world.ownership.wanted(ip(9))
    world.run()
    world.peer("d")
    assert world.has("d") == ["10.86.0.9/32"]
    assert 9 in world.run(10.0), "and is confirmed like any other"
    world.registry.update({"d": None})
    assert 9 not in world.run(400.0), "until it is none any more"


def test_no_more_than_so_many_wait_and_only_for_what_the_contract_has(world: World) -> None:
    assert not world.ownership.wanted(ipaddress.IPv4Address("192.0.2.1"))
    assert [world.ownership.wanted(ip(last)) for last in range(10, 15)] == [True, True, True, False, False]
    world.run()
    assert not world.ownership.wanted(ip(20)), "nobody's are remembered for a while"
    world.run(10.0)
    assert world.ownership.wanted(ip(20))
    full = World(max_entries=1)
    full.peer("b", "10.86.0.2/32")
    assert not full.ownership.wanted(ip(9)), "claims come first"


def test_no_peer_gets_an_address_of_this_node(world: World) -> None:
    world.ownership.own(OWN, ["10.86.0.1", "fd86::1"])
    world.says[ip(1)] = "b"
    world.peer("c", "10.86.0.1/32")
    world.run()
    assert "10.86.0.1/32" not in world.has("b") + world.has("c")
    assert world.said(OWN) == ["10.86.0.1 is not used: the contract says that B owns it"]
    world.says[ip(1)] = OWN
    world.run(10.0)
    world.run(50.0)
    assert world.said(OWN) == []


def test_claims_come_and_go_with_their_peers() -> None:
    world = World()
    world.registry.replace([Peer(name="b", peer_id="b", virtual_ip="10.86.0.2")])
    world.says[ip(2)] = world.says[ip(3)] = "b"
    world.run()
    assert world.has("b") == ["10.86.0.2/32"]
    world.registry.replace([Peer(name="b", peer_id="b", virtual_ip="10.86.0.3")])
    assert world.run() == [3], "at once"
    assert world.has("b") == ["10.86.0.3/32", "10.86.0.2/32"], "the contract has not taken it away"
    world.registry.replace([])
    assert world.run(1000.0) == [] and world.ownership.next_s() == NEVER
    assert (world.ownership.unconfirmed, world.ownership.disowned, world.ownership.stale) == (0, 0, 0)


def test_the_address_of_a_configured_peer_is_the_contracts_to_give_wherever_it_lies() -> None:
    world = World()
    world.registry.replace([Peer(name="b", peer_id="b", virtual_ip="192.0.2.7")])
    assert world.has("b") == [] and world.run() == [7]
    assert world.said("b") == ["192.0.2.7 is not used: the contract says that nobody owns it"]


def test_somebody_is_told_when_something_is_due_at_once(world: World) -> None:
    calls = world.calls
    world.peer("b", "10.86.0.2/32")
    assert world.calls == calls
    world.peer("b", "10.86.0.4/32")
    assert world.calls == calls + 1
    world.ownership.wanted(ip(9))
    assert world.calls == calls + 2


class Owners(RuleBasedStateMachine):
    """Whatever happens: an address has one user, who the contract said last owned it, and not too long ago."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(stale_lifetime=60.0, positive_lifetime=20.0)
        self.world.ownership.own(OWN, ["10.86.0.1"])
        self.claims: dict[str, frozenset[int]] = {}
        self.confirmed: dict[int, tuple[str, float]] = {}
        self.under_way: list[ipaddress.IPv4Address] = []

    peers, lasts = st.sampled_from("bcd"), st.integers(1, 5)

    @rule(by_s=st.floats(0.0, 30.0))
    def wait(self, by_s: float) -> None:
        self.world.now_s += by_s

    @rule(name=peers, claimed=st.frozensets(lasts, max_size=2))
    def claim(self, name: str, claimed: frozenset[int]) -> None:
        self.world.peer(name, *(f"{ip(last)}/32" for last in sorted(claimed)))
        self.claims[name] = claimed

    @rule(name=peers)
    def leave(self, name: str) -> None:
        self.world.registry.update({name: None})
        self.claims.pop(name, None)

    @rule(last=lasts)
    def want(self, last: int) -> None:
        self.world.ownership.wanted(ip(last))

    @rule(most=st.integers(0, 3))
    def ask(self, most: int) -> None:
        taken = self.world.ownership.take_due(self.world.now_s, most)
        assert not set(taken) & set(self.under_way), "one question at a time"
        self.under_way += taken

    @rule(owner=st.sampled_from(["", OWN, "b", "c", "d", "stranger", None]))
    def answer(self, owner: str | None) -> None:
        if not self.under_way:
            return
        address, now_s = self.under_way.pop(0), self.world.now_s
        if owner is None:
            self.world.ownership.failed(address, "down", now_s)
        else:
            self.confirmed[address.packed[-1]] = owner, now_s
            self.world.registry.reconsider(self.world.ownership.answered(address, owner, now_s))

    @invariant()
    def who_uses_an_address_owns_it(self) -> None:
        world = self.world
        world.registry.reconsider(world.ownership.lapse(world.now_s))
        used = [(prefix, name) for name in self.claims for prefix in world.has(name)]
        assert len({prefix for prefix, _ in used}) == len(used)
        for prefix, name in used:
            owner, since_s = self.confirmed[int(prefix.partition("/")[0].rpartition(".")[2])]
            assert owner == name and world.now_s - since_s < 60.0 and prefix != "10.86.0.1/32"

    @invariant()
    def the_sums_are_those_of_the_lines(self) -> None:
        lines = [line for name in (*self.claims, OWN) for line in self.world.said(name)]
        ownership = self.world.ownership
        assert ownership.unconfirmed == sum("looked up" in line for line in lines)
        assert ownership.disowned == sum("the contract says" in line for line in lines)


TestOwners = Owners.TestCase


@given(st.lists(st.integers(0, 255), max_size=20))
def test_nothing_is_kept_of_what_packets_wanted(lasts: list[int]) -> None:
    world = World()
    for last in lasts:
        world.ownership.wanted(ip(last))
        world.run()
    world.run(100.0)
    assert world.ownership.next_s() == NEVER
