"""What a member says to introduce itself, and that it is enough for who knows nothing but the network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from membership_world import NETWORK, NOW, World, directory, peer, presence, public, reasons

from vpnd.membership import enrolment, introduction
from vpnd.membership.introduction import MAX_GRANTS, MAX_REQUEST, Admitted, Introduction
from vpnd.membership.refusal import REASONS, MembershipRefused
from vpnd.membership.statements import MAX_STATEMENT, Kind, parse_untrusted


def kinds(introduced: Introduction) -> list[Kind]:
    return [parse_untrusted(wire).kind for wire in introduced.statements]


def test_a_member_of_the_roots_own_needs_nothing_but_itself():
    world = World()
    world.enrol("b")
    introduced = introduction.of_member(world.directory, peer("b"))
    assert introduced.network == NETWORK.id and kinds(introduced) == [Kind.MEMBERSHIP]
    world.put(presence("b"))
    introduced = introduction.of_member(world.directory, peer("b"))
    assert kinds(introduced) == [Kind.MEMBERSHIP, Kind.PRESENCE]


def test_the_chain_of_authority_comes_along_and_other_authorities_do_not():
    world = World()
    for name, by in (("a1", "root"), ("a2", "a1"), ("a3", "a2"), ("other", "root"), ("under", "other")):
        world.grant(name, by=by)
    world.enrol("b", by="a3")
    world.put(presence("b"))
    introduced = introduction.of_member(world.directory, peer("b"))
    bodies = [parse_untrusted(wire).body for wire in introduced.statements]
    assert [body.key for body in bodies[:3]] == [public("a1"), public("a2"), public("a3")]
    stranger = directory()
    merged = stranger.merge(introduced.statements, NOW)
    assert not merged.refused and stranger.find(peer("b"), NOW).multiaddrs == ("/ip4/192.0.2.1/tcp/4001",)


def test_of_two_who_vouch_for_an_authority_the_senior_is_named():
    world = World()
    world.grant("a1")
    world.grant("shared", by="a1")
    world.grant("shared", by="root")
    world.enrol("b", by="shared")
    introduced = introduction.of_member(world.directory, peer("b"))
    assert [parse_untrusted(wire).signer for wire in introduced.statements] == [
        public("root"),
        public("shared"),
    ]
    assert not directory().merge(introduced.statements, NOW).refused


def test_of_a_long_chain_what_is_nearest_to_the_member_is_told():
    world = World()
    names = ["root", *(f"a{number}" for number in range(MAX_GRANTS + 2))]
    for by, name in zip(names, names[1:], strict=False):
        world.grant(name, by=by)
    world.enrol("b", by=names[-1])
    introduced = introduction.of_member(world.directory, peer("b"))
    assert len(introduced.statements) == MAX_GRANTS + 1
    stranger = directory()
    assert set(reasons(stranger.merge(introduced.statements, NOW))) == {"unknown_authority"}
    charter = [one.wire for one in world.directory.charter()]
    stranger.merge([*charter[:4], *introduced.statements], NOW)
    assert stranger.find(peer("b"), NOW)


def test_who_is_no_member_has_nothing_to_say():
    world = World()
    assert introduction.of_member(world.directory, peer("b")) is None
    world.enrol("b")
    world.put(world.root.remove(peer("b"), NOW), now_ms=NOW)
    assert introduction.of_member(world.directory, peer("b")) is None


LARGEST = Introduction(NETWORK.id, (bytes(MAX_STATEMENT),) * introduction.MAX_STATEMENTS)


def test_they_read_back_as_themselves_also_the_largest():
    data = introduction.encode(LARGEST)
    assert len(data) <= MAX_REQUEST and introduction.parse_request_untrusted(data) == LARGEST
    for answer in (
        Admitted(),
        introduction.Acquainted((b"x",)),
        enrolment.Refusal(reason="removed", text="no", statements=(b"x",)),
    ):
        assert introduction.parse_answer_untrusted(introduction.encode(answer)) == answer


def reason(parse, data: bytes) -> str:
    with pytest.raises(MembershipRefused) as caught:
        parse(data)
    return caught.value.reason


def test_what_is_outside_the_bounds_is_not_taken():
    too_many = Introduction(NETWORK.id, (b"x",) * (introduction.MAX_STATEMENTS + 1))
    too_long = Introduction(NETWORK.id, (bytes(MAX_STATEMENT + 1),))
    nameless = Introduction(b"short", ())
    for message in (too_many, too_long, nameless, Admitted()):
        assert reason(introduction.parse_request_untrusted, introduction.encode(message)) == "malformed"
    assert reason(introduction.parse_request_untrusted, bytes(MAX_REQUEST + 1)) == "too_long"
    assert reason(introduction.parse_answer_untrusted, bytes(enrolment.MAX_ANSWER + 1)) == "too_long"
    unknown = introduction.encode(enrolment.Refusal(reason="because"))
    assert reason(introduction.parse_answer_untrusted, unknown) == "malformed"


VALID = introduction.encode(LARGEST)[:400]


@given(st.one_of(st.binary(max_size=300), st.integers(0, len(VALID)).map(lambda end: VALID[:end])))
def test_any_bytes_raise_one_error(data):
    for parse in (introduction.parse_request_untrusted, introduction.parse_answer_untrusted):
        try:
            parse(data)
        except MembershipRefused as refusal:
            assert refusal.reason in REASONS
