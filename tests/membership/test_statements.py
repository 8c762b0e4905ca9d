"""Statements: what is signed is what is read, and nothing a stranger writes does more than be refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from membership_world import LIFETIME, NETWORK, NOW, key, membership, peer, presence, public

from vpnd.membership import network
from vpnd.membership.refusal import REASONS, MembershipRefused
from vpnd.membership.statements import (
    HEADER_BYTES,
    MAX_LIFETIME_MS,
    MAX_STATEMENT,
    VERSION,
    Grant,
    Kind,
    Membership,
    Presence,
    Removal,
    Revoke,
    Statement,
    parse_untrusted,
    sign,
)

ALL = [
    membership("b", routes=("192.168.0.0/24", "::/0"), groups=("servers",)),
    presence("b"),
    sign(key("root"), Removal(network=NETWORK.id, signer=public("root"), peer_id=peer("b"), issued_ms=NOW)),
    sign(
        key("root"),
        Grant(
            network=NETWORK.id,
            signer=public("root"),
            key=public("second"),
            peer_id=peer("second"),
            granted_ms=NOW,
            issued_ms=NOW,
        ),
    ),
    sign(
        key("root"),
        Revoke(network=NETWORK.id, signer=public("root"), key=public("second"), since_ms=0, issued_ms=NOW),
    ),
]


def reason_of(wire: bytes) -> str:
    with pytest.raises(MembershipRefused) as caught:
        parse_untrusted(wire)
    assert caught.value.reason in REASONS
    return caught.value.reason


@pytest.mark.parametrize("statement", ALL, ids=[one.kind.name for one in ALL])
def test_a_statement_reads_back_as_itself(statement):
    assert parse_untrusted(statement.wire) == statement
    assert len(statement.wire) <= MAX_STATEMENT


@pytest.mark.parametrize("statement", ALL, ids=[one.kind.name for one in ALL])
def test_no_bit_of_a_statement_can_change(statement):
    for place in range(0, len(statement.wire), 3):
        changed = bytearray(statement.wire)
        changed[place] ^= 1 << place % 8
        assert reason_of(bytes(changed)) in ("forged", "malformed", "unknown_version")


def test_a_signature_over_one_kind_is_none_over_another():
    wire = bytearray(ALL[2].wire)
    body = msgspec.msgpack.decode(ALL[2].wire[HEADER_BYTES:])
    assert wire[1] == Kind.REMOVAL
    grant = Grant(
        network=body[0], signer=body[1], key=public("x"), peer_id=body[2], granted_ms=0, issued_ms=body[3]
    )
    data = msgspec.msgpack.encode(grant)
    assert reason_of(bytes([1, Kind.GRANT]) + wire[2:HEADER_BYTES] + data) == "forged"


def test_only_the_named_key_can_sign():
    with pytest.raises(MembershipRefused, match="signature") as caught:
        sign(key("other"), ALL[0].body)
    assert caught.value.reason == "forged"
    with pytest.raises(MembershipRefused):
        sign(key("other"), ALL[1].body)


UNFIT = [
    ("a name is a label", {"name": "Laptop"}),
    ("a name has no dot", {"name": "a.b"}),
    ("a name does not end in a line feed", {"name": "a\n"}),
    ("a member has an address", {"addresses": ()}),
    ("addresses are in their usual spelling", {"addresses": ("fd00:0::1",)}),
    ("an address is one machine's", {"addresses": ("224.0.0.1",)}),
    ("a loopback address is nobody's own", {"addresses": ("127.0.0.1",)}),
    ("an address has no zone", {"addresses": ("fd00::1%eth0",)}),
    ("an address is an address", {"addresses": ("10.86.0.0/16",)}),
    ("nothing is named twice", {"addresses": ("10.86.0.1", "10.86.0.1")}),
    ("a route has no host bits", {"routes": ("10.0.0.1/8",)}),
    ("a peer id is one", {"peer_id": "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"}),
    ("it ends after it begins", {"expires_ms": NOW}),
    ("it does not last for ever", {"expires_ms": NOW + MAX_LIFETIME_MS + 1}),
    ("enrolment is not after issue", {"enrolled_ms": NOW + 1}),
    ("times are not negative", {"enrolled_ms": -1}),
    ("the network's id is whole", {"network": b"short"}),
]


@pytest.mark.parametrize(("rule", "changes"), UNFIT, ids=[rule for rule, _ in UNFIT])
def test_a_membership_outside_its_rules_is_malformed_though_signed(rule, changes):
    with pytest.raises(MembershipRefused) as caught:
        membership("b", **changes)
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/0.0.0.0/tcp/1",
        "/ip4/192.0.2.1/tcp/0",
        "/ip4/192.0.2.1/udp/1",
        "192.0.2.1:1",
        f"/ip4/192.0.2.1/tcp/1/p2p/{peer('b')}",
    ],
)
def test_a_presence_names_only_what_can_be_dialed(address):
    with pytest.raises(MembershipRefused):
        presence("b", address=address)


def with_one_field_more(statement: Statement, signer: str) -> bytes:
    """What a later version may say, signed as it would."""
    said = msgspec.msgpack.decode(statement.wire[HEADER_BYTES:])
    known = (
        [*said, []] if statement.kind is Kind.PRESENCE else said
    )  # a presence without relays does not say so
    data = msgspec.msgpack.encode([*known, ["more"]])
    domain = f"vpnd {statement.kind.name.lower()} {VERSION}\0".encode()
    return statement.wire[:2] + key(signer).sign(domain + data) + data


def test_of_itself_a_member_may_say_more_than_this_version_reads_but_no_authority_of_others():
    said = presence("a")
    read = parse_untrusted(with_one_field_more(said, "a"))
    assert read.body == said.body and read.wire != said.wire and read.slot == said.slot
    assert parse_untrusted(read.wire) == read
    assert reason_of(with_one_field_more(membership("a"), "root")) == "malformed"


def test_a_presence_without_relays_is_what_it_always_was():
    said = presence("a")
    assert len(msgspec.msgpack.decode(said.wire[HEADER_BYTES:])) == 5
    body = msgspec.structs.replace(said.body, relays=(peer("b"), peer("c")))
    assert parse_untrusted(sign(key("a"), body).wire).body == body
    for relays in ((peer("b"),) * 4, ("nobody",)):
        with pytest.raises(MembershipRefused):
            sign(key("a"), msgspec.structs.replace(said.body, relays=relays))


def test_what_does_not_fit_is_refused_before_it_is_read():
    routes = tuple(f"2001:db8:{number:x}:1234:5678:9abc::/96" for number in range(32))
    with pytest.raises(MembershipRefused) as caught:
        membership("b", routes=routes)
    assert caught.value.reason == "too_long"


@given(st.binary(max_size=MAX_STATEMENT + 8))
def test_random_bytes_are_refused(data):
    reason_of(data)


@settings(max_examples=300)
@given(st.sampled_from(ALL), st.binary(max_size=300))
def test_a_good_head_before_random_bytes_is_refused(statement, data):
    reason_of(statement.wire[:HEADER_BYTES] + data)


@settings(max_examples=300)
@given(st.data())
def test_mutations_and_cuts_of_good_statements_are_refused(data):
    wire = bytearray(data.draw(st.sampled_from(ALL)).wire)
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(wire[: data.draw(st.integers(0, len(wire)))])
    if cut not in {one.wire for one in ALL}:
        reason_of(cut)


def test_ranks_put_the_newer_above_the_older():
    rows = [
        (membership("b"), membership("b", issued_ms=NOW + 1), "issued later"),
        (
            membership("b", issued_ms=NOW + 9),
            membership("b", issued_ms=NOW + 5, enrolled_ms=NOW + 1),
            "let in later",
        ),
        (membership("b"), membership("b", serial=1), "the same instant, counted up"),
        (presence("b"), presence("b", NOW + 1), "said later"),
    ]
    for older, newer, why in rows:
        assert older.slot == newer.slot and older.rank < newer.rank, why


def test_the_network_id_covers_everything():
    ids = {
        network.create(*fields).id
        for fields in [
            ("home", public("root"), "10.86.0.0/16"),
            ("work", public("root"), "10.86.0.0/16"),
            ("home", public("x"), "10.86.0.0/16"),
            ("home", public("root"), "10.87.0.0/16"),
        ]
    }
    assert len(ids) == 4
    assert network.parse_untrusted(NETWORK.encode()) == NETWORK


@pytest.mark.parametrize(
    "subnet", ["10.86.0.1/16", "127.0.0.0/8", "10.0.0.0/31", "0.0.0.0/0", "fd00::/16", "x"]
)
def test_an_unfit_subnet_makes_no_network(subnet):
    with pytest.raises(MembershipRefused):
        network.create("home", public("root"), subnet)


@given(st.binary(max_size=300))
def test_random_network_descriptions_are_refused(data):
    try:
        network.parse_untrusted(data)
    except MembershipRefused as refusal:
        assert refusal.reason in REASONS


def test_the_unique_local_prefix_is_as_rfc_4193_section_3_has_it():
    assert NETWORK.ipv6.prefixlen == 48
    assert NETWORK.ipv6.network_address.packed[0] == 0xFD
    assert NETWORK.ipv6.network_address.packed[1:6] == NETWORK.id[:5]
    assert NETWORK.members_ipv6.subnet_of(NETWORK.ipv6) and NETWORK.members_ipv6.prefixlen == 64


def test_fields_are_in_this_order_on_the_wire():
    assert Membership.__struct_fields__[:4] == ("network", "signer", "peer_id", "name")
    assert Presence.__struct_fields__ == (
        "network",
        "peer_id",
        "addresses",
        "sequence_ms",
        "routes",
        "relays",
    )
    assert membership("b").body.expires_ms == NOW + LIFETIME
