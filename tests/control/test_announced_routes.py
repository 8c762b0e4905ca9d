"""Which announced networks are routed, and to whom: the same on every node, and nothing a member may not have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Network as Settings
from vpnd.control.routes import announced
from vpnd.membership.roster import Member

OWN = OwnAddresses(
    network="home",
    label="me",
    addresses=("10.86.0.1", "fd86::1"),
    subnets=("10.86.0.0/16", "fd86::/64"),
    advertised=("172.20.0.0/24",),
)


def member(name: str, *routes: str, enrolled_ms: int = 1, distance: int = 0) -> Member:
    """`distance`: of the authority that permitted the routes, from the root."""
    return Member(
        peer_id=f"id-{name}",
        name=name,
        addresses=(f"10.86.0.{ord(name[0]) % 200}",),
        routes=routes,
        groups=(),
        lost=(),
        multiaddrs=(),
        signer=b"",
        enrolled_ms=enrolled_ms,
        issued_ms=enrolled_ms,
        expires_ms=10**12,
        ranks=tuple(((distance, 0, b""), enrolled_ms) for _ in routes),
    )


CASES = [
    # (sentence, members, what is wanted, network -> name of its owner)
    ("nothing is announced", [member("b")], Settings(), {}),
    ("one network", [member("b", "10.9.0.0/24")], Settings(), {"10.9.0.0/24": "b"}),
    ("it is not wanted", [member("b", "10.9.0.0/24")], Settings(accept_routes=False), {}),
    (
        "two announce different ones, one inside the other",
        [member("b", "10.9.0.0/16"), member("c", "10.9.1.0/24")],
        Settings(),
        {"10.9.0.0/16": "b", "10.9.1.0/24": "c"},
    ),
    (
        "two announce the same: the older member has it",
        [member("b", "10.9.0.0/24", enrolled_ms=7), member("c", "10.9.0.0/24", enrolled_ms=5)],
        Settings(),
        {"10.9.0.0/24": "c"},
    ),
    (
        "older by the word of a junior authority: that does not count",
        [member("b", "10.9.0.0/24", enrolled_ms=7), member("c", "10.9.0.0/24", enrolled_ms=0, distance=1)],
        Settings(),
        {"10.9.0.0/24": "b"},
    ),
    (
        "equally old: the smaller peer id",
        [member("c", "10.9.0.0/24"), member("b", "10.9.0.0/24")],
        Settings(),
        {"10.9.0.0/24": "b"},
    ),
    ("a part of the VPN itself", [member("b", "10.86.7.0/24", "fd86::/80")], Settings(), {}),
    ("one address of the VPN", [member("b", "10.86.0.1/32")], Settings(), {}),
    ("around the VPN is fine", [member("b", "10.0.0.0/8")], Settings(), {"10.0.0.0/8": "b"}),
    ("what this node announces itself", [member("b", "172.20.0.0/24", "172.20.0.128/25")], Settings(), {}),
    ("IPv6", [member("b", "2001:db8::/32")], Settings(), {"2001:db8::/32": "b"}),
    ("a default route nobody asked for", [member("b", "0.0.0.0/0", "::/0")], Settings(), {}),
    (
        "a default route of the exit node, by name",
        [member("b", "0.0.0.0/0"), member("c", "0.0.0.0/0")],
        Settings(exit_node="c"),
        {"0.0.0.0/0": "c"},
    ),
    ("by address", [member("b", "::/0")], Settings(exit_node="10.86.0.98"), {"::/0": "b"}),
    (
        "an exit node though other routes are not wanted",
        [member("b", "0.0.0.0/0", "10.9.0.0/24")],
        Settings(accept_routes=False, exit_node="b"),
        {"0.0.0.0/0": "b"},
    ),
]


@pytest.mark.parametrize(
    ("members", "accept", "owners"), [row[1:] for row in CASES], ids=[row[0] for row in CASES]
)
def test_who_gets_what(members: list[Member], accept: Settings, owners: dict[str, str]) -> None:
    for order in (members, members[::-1]):
        settled = announced(order, OWN, accept)
        assert dict(settled.owners) == {network: f"id-{name}" for network, name in owners.items()}
        assert settled.known().routes == tuple(settled.owners)
        assert not settled.problems


def test_a_member_may_send_from_what_is_routed_to_it_and_from_nothing_more() -> None:
    b, c = member("b", "10.9.0.0/24", "0.0.0.0/0"), member("c", "10.9.0.0/24", enrolled_ms=2)
    plain = announced([b, c], OWN, Settings())
    assert plain.prefixes(b) == ("10.86.0.98/32", "10.9.0.0/24")
    assert plain.prefixes(c) == ("10.86.0.99/32",)
    through = announced([b, c], OWN, Settings(exit_node="b"))
    assert set(through.prefixes(b)) == {"10.86.0.98/32", "10.9.0.0/24", "0.0.0.0/0"}
    assert through.known().exit_peer == "id-b"


def test_an_exit_node_that_is_none_is_a_problem_and_no_way() -> None:
    for members, words in (
        ([member("b", "10.9.0.0/24")], "announces neither"),
        ([], "no member b"),
    ):
        settled = announced(members, OWN, Settings(exit_node="b"))
        assert settled.exit_peer == ""
        (problem,) = settled.problems
        assert words in problem


networks = st.sampled_from(
    ["10.9.0.0/24", "10.9.0.0/16", "0.0.0.0/0", "10.86.4.0/24", "2001:db8::/32", "::/0"]
)
rosters = st.lists(
    st.tuples(st.sampled_from("bcdefgh"), st.sets(networks), st.integers(1, 3)),
    max_size=6,
    unique_by=lambda row: row[0],
)


@given(rosters, st.randoms(), st.sampled_from(["", "b", "c"]))
def test_it_does_not_depend_on_the_order_members_are_known_in(rows, random, exit_node: str) -> None:
    members = [member(name, *sorted(routes), enrolled_ms=enrolled) for name, routes, enrolled in rows]
    shuffled = members[:]
    random.shuffle(shuffled)
    accept = Settings(exit_node=exit_node)
    one, other = announced(members, OWN, accept), announced(shuffled, OWN, accept)
    assert list(one.owners.items()) == list(other.owners.items())
    for each in members:
        foreign = set(one.prefixes(each)) - set(each.prefixes)
        assert not foreign, "nobody gets what it did not announce"
    assert not any(network in ("0.0.0.0/0", "::/0") for network in one.owners) or one.exit_peer
