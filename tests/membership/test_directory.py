"""The directory: who is a member, as a table of situations; and that it is the same in any order."""

from __future__ import annotations

import pytest
from membership_world import (
    DAY,
    FORGET,
    LIFETIME,
    NETWORK,
    NOW,
    SKEW,
    World,
    directory,
    key,
    membership,
    peer,
    presence,
    public,
    reason,
    reasons,
)

from vpnd.membership import charter, network
from vpnd.membership.authority import Authority
from vpnd.membership.roster import Conflict
from vpnd.membership.statements import Grant, Removal, Revoke, sign

LAST = NOW + LIFETIME + SKEW  # the last millisecond a membership of NOW is valid


def merge(held, *statements, now_ms: int = NOW):
    return held.merge([statement.wire for statement in statements], now_ms)


def removal(name: str, issued_ms: int, signer: str = "root"):
    body = Removal(network=NETWORK.id, signer=public(signer), peer_id=peer(name), issued_ms=issued_ms)
    return sign(key(signer), body)


def revocation(signer: str, subject: str, issued_ms: int, since_ms: int = 0):
    body = Revoke(
        network=NETWORK.id, signer=public(signer), key=public(subject), since_ms=since_ms, issued_ms=issued_ms
    )
    return sign(key(signer), body)


OTHER = network.create("other", public("root"), "10.86.0.0/16")

REFUSED = [
    ("of another network", [membership("b", network=OTHER.id)], "wrong_network"),
    ("signed by a key nobody vouches for", [membership("b", signer="stranger")], "unknown_authority"),
    ("from further ahead than clocks differ", [membership("b", issued_ms=NOW + SKEW + 1)], "not_yet_valid"),
    ("past its expiry", [membership("b", issued_ms=NOW - LIFETIME - SKEW - 1)], "expired"),
    ("older than the one known", [membership("b", serial=1), membership("b")], "rolled_back"),
    (
        "presence older than the one known",
        [membership("b"), presence("b", 9), presence("b", 8)],
        "rolled_back",
    ),
    ("of a removed peer, let in before", [removal("b", NOW), membership("b")], "removed"),
    (
        "renewed after the removal, let in before",
        [removal("b", NOW), membership("b", issued_ms=NOW + 1)],
        "removed",
    ),
    ("presence of a stranger", [presence("b")], "not_member"),
    ("presence from ahead", [membership("b"), presence("b", NOW + SKEW + 1)], "not_yet_valid"),
]


@pytest.mark.parametrize(("what", "statements", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_statement_that_is_of_no_use_is_refused_for_its_reason(what, statements, reason):
    held = directory()
    for statement in statements[:-1]:
        assert not merge(held, statement).refused
    before = held.index.root()
    assert reasons(merge(held, statements[-1])) == [reason]
    assert held.index.root() == before


def test_garbage_and_forgeries_beside_good_ones_do_no_harm():
    held, good = directory(), membership("b")
    bad = bytearray(membership("c").wire)
    bad[10] ^= 1
    merged = held.merge([b"junk", bytes(bad), good.wire], NOW)
    assert sorted(reasons(merged)) == ["forged", "malformed"]
    assert merged.accepted == (good,)


def test_a_full_directory_takes_no_new_peer_but_news_of_those_it_has():
    held = directory(max_members=1)
    assert reasons(merge(held, membership("b"), membership("c"))) == ["directory_full"]
    assert not merge(held, membership("b", issued_ms=NOW + 1)).refused


def test_what_is_set_aside_is_bounded():
    """Who lets in and removes one peer without end loses its own statements, not those that seniors signed."""
    held = directory(max_members=10)
    thiefs = Authority(key("root"), held, lifetime_ms=LIFETIME).grant(public("thief"), peer("thief"), NOW)
    merge(held, thiefs, membership("b"))
    merge(held, removal("b", NOW, "thief"))
    for number in range(1, 41):
        at_ms = NOW + 2 * number
        merge(held, membership("x", "thief", issued_ms=at_ms, enrolled_ms=at_ms), now_ms=at_ms)
        merge(held, removal("x", at_ms + 1, "thief"), now_ms=at_ms + 1)
    assert len(held.statements()) <= 10 + 3, "beside those: a grant, two removals"
    assert held.find(peer("b"), NOW) is None
    merge(held, revocation("root", "thief", NOW + 100), now_ms=NOW + 100)
    assert held.find(peer("b"), NOW) is not None


def test_a_member_is_found_by_everything_it_has():
    held = directory()
    statement = membership("b", addresses=("10.86.0.2", "fd00::2"), routes=("192.168.7.0/24",))
    changes = merge(held, presence("b", routes=("192.168.7.0/24",)), statement).changes
    (member,) = changes.added
    assert held.find(peer("b"), NOW) == member
    assert held.members(NOW) == (member,)
    assert held.owner("10.86.0.2") == held.owner("fd00::2") == held.owner("b") == peer("b")
    assert member.prefixes == ("10.86.0.2/32", "fd00::2/128", "192.168.7.0/24")
    assert member.multiaddrs == ("/ip4/192.0.2.1/tcp/4001",)


@pytest.mark.parametrize(
    ("announced", "allowed", "found"),
    [
        # nothing is announced by being allowed
        ((), ("10.1.0.0/16",), ()),
        # what is allowed, and a part of it
        (("10.1.0.0/16", "10.1.2.0/24"), ("10.1.0.0/16",), ("10.1.0.0/16", "10.1.2.0/24")),
        # neither a larger network nor another one
        (("10.0.0.0/8", "10.2.0.0/16"), ("10.1.0.0/16",), ()),
        # the way to everywhere, but not any network by that
        (("0.0.0.0/0", "10.2.0.0/16"), ("0.0.0.0/0",), ("0.0.0.0/0",)),
        # the two families are told apart
        (("::/0", "fd00:1::/64"), ("0.0.0.0/0", "fd00:1::/48"), ("fd00:1::/64",)),
    ],
)
def test_a_member_announces_what_its_membership_permits(announced, allowed, found):
    held = directory()
    merge(held, membership("b", routes=allowed), presence("b", routes=announced))
    assert held.find(peer("b"), NOW).routes == found


def test_changes_say_what_is_new_other_and_gone():
    held = directory()
    assert [one.name for one in merge(held, membership("b")).changes.added] == ["b"]
    assert not merge(held, membership("b")).changes
    (moved,) = merge(held, presence("b", address="/ip4/192.0.2.9/tcp/1")).changes.changed
    assert moved.multiaddrs == ("/ip4/192.0.2.9/tcp/1",)
    (gone,) = merge(held, removal("b", NOW)).changes.removed
    assert gone.peer_id == peer("b")
    assert held.find(peer("b"), NOW) is None and held.owner(gone.addresses[0]) is None


def test_members_expire_are_remembered_and_then_forgotten():
    held = directory()
    merge(held, membership("b"), presence("b"))
    assert held.next_expiry_ms() == LAST + 1
    assert not held.advance(LAST) and held.find(peer("b"), LAST)
    assert held.find(peer("b"), LAST + 1) is None, "also before anybody calls advance"
    (gone,) = held.advance(LAST + 1).removed
    assert gone.name == "b"
    assert len(held.index) == 0, "the expired are not told to others"
    assert held.newest(peer("b")) and "b" in held.taken(), "but may still renew"
    assert held.next_expiry_ms() == LAST + FORGET + 1
    held.advance(LAST + FORGET + 1)
    assert held.newest(peer("b")) is None and not held.taken() and not held.statements()
    assert held.next_expiry_ms() is None


def test_a_renewal_after_expiry_brings_the_member_back():
    held = directory()
    merge(held, membership("b"))
    held.advance(LAST + 1)
    later = LAST + DAY
    merged = merge(held, membership("b", issued_ms=later, enrolled_ms=NOW), now_ms=later)
    assert [one.name for one in merged.changes.added] == ["b"]


def test_a_removal_also_holds_against_a_renewal_by_who_has_not_heard_of_it():
    held = directory()
    merge(held, membership("b"), removal("b", NOW + 5))
    assert reasons(merge(held, membership("b", issued_ms=NOW + 10, enrolled_ms=NOW))) == ["removed"]
    assert not merge(held, membership("b", issued_ms=NOW + 10, enrolled_ms=NOW + 10)).refused, "let in anew"
    assert held.find(peer("b"), NOW)


def test_a_removal_outlives_the_membership():
    held = directory()
    merge(held, membership("b"), removal("b", NOW + 5))
    far = NOW + 1000 * DAY
    held.advance(far)
    again = membership("b", issued_ms=far, enrolled_ms=NOW)
    assert reasons(merge(held, again, now_ms=far)) == ["removed"]


def test_of_two_claims_by_one_authority_the_older_enrolment_wins_everywhere():
    old = membership("b", addresses=("10.86.0.9",), enrolled_ms=NOW - 5)
    young = membership("a", addresses=("10.86.0.9", "fd00::a"), enrolled_ms=NOW - 3)
    for order in ([old, young], [young, old]):
        held = directory()
        for statement in order:
            merge(held, statement)
        assert held.owner("10.86.0.9") == peer("b")
        assert held.conflicts() == (Conflict("10.86.0.9", peer("b"), (peer("a"),)),)
        loser = held.find(peer("a"), NOW)
        assert loser.addresses == ("fd00::a",) and loser.lost == ("10.86.0.9",)
    changes = merge(held, removal("b", NOW)).changes
    assert [one.addresses for one in changes.changed] == [("10.86.0.9", "fd00::a")]
    assert held.conflicts() == ()


def test_of_two_claims_of_one_millisecond_the_smaller_peer_id_wins():
    held = directory()
    merge(
        held, *(membership(name, name="twin", addresses=(f"10.86.1.{n}",)) for n, name in enumerate("bcd", 1))
    )
    first, *rest = sorted(map(peer, "bcd"))
    assert held.owner("twin") == first
    assert held.conflicts() == (Conflict("twin", first, tuple(rest)),)
    assert held.find(rest[0], NOW).name == ""


def test_a_removal_of_the_same_instant_beats_the_membership_in_either_order():
    for statements in ([membership("b"), removal("b", NOW)], [removal("b", NOW), membership("b")]):
        held = directory()
        for statement in statements:
            merge(held, statement)
        assert held.members(NOW) == ()


class TestAnAuthorityThatWasStolen:
    """What a thief of the key "second" can take from members of the root."""

    def world(self) -> World:
        world = World()
        world.grant("second")
        world.enrol("b", addresses=("10.86.0.9",), routes=("10.7.0.0/16",))
        world.put(presence("b", routes=("10.7.0.0/16",)))
        return world

    def take(self, world: World, now_ms: int = NOW):
        """The thief lets its own node in as b, since the beginning of time."""
        stolen = membership(
            "thief",
            "second",
            name="b",
            addresses=("10.86.0.9",),
            routes=("10.7.0.0/16",),
            enrolled_ms=0,
            issued_ms=now_ms,
        )
        return world.put(stolen, presence("thief", now_ms, routes=("10.7.0.0/16",)), now_ms=now_ms)

    def keeps_everything(self, world: World, now_ms: int = NOW) -> bool:
        held = world.directory
        thief, b = held.find(peer("thief"), now_ms), held.find(peer("b"), now_ms)
        return (
            held.owner("10.86.0.9") == held.owner("b") == peer("b")
            and (thief.addresses, thief.name) == ((), "")
            and b.ranks < thief.ranks
        )

    def test_an_earlier_enrolment_takes_nothing(self):
        world = self.world()
        assert not self.take(world).changes.moved
        assert self.keeps_everything(world)
        assert [one.what for one in world.directory.conflicts()] == ["10.86.0.9", "b"]

    def test_nor_when_the_thief_has_renewed_the_member(self):
        world = self.world()
        world.put(world.authority("second").renew(peer("b"), NOW + DAY), now_ms=NOW + DAY)
        self.take(world, NOW + DAY)
        assert self.keeps_everything(world, NOW + DAY)

    def test_what_the_thief_takes_from_the_member_nobody_else_gets(self):
        world = self.world()
        world.put(
            membership("b", "second", name="c", addresses=("10.86.0.77",), issued_ms=NOW + 1), now_ms=NOW + 1
        )
        self.take(world, NOW + 1)
        thief = world.directory.find(peer("thief"), NOW + 1)
        assert thief.addresses == () and thief.name == ""
        assert world.directory.owner("10.86.0.9") is None and world.directory.holder("10.86.0.9") == peer("b")

    def test_a_member_that_only_the_thief_vouches_for_is_taken_over_not_in_silence(self):
        world = self.world()
        world.enrol("c", by="second", addresses=("10.86.0.10",))
        stolen = membership("thief", "second", addresses=("10.86.0.10",), enrolled_ms=0)
        assert world.put(stolen).changes.moved == (("10.86.0.10", peer("c"), peer("thief")),)

    def test_the_root_takes_what_it_gives_to_somebody_else(self):
        world = self.world()
        world.enrol("c", by="second", addresses=("10.86.0.10",))
        moved = world.put(membership("d", addresses=("10.86.0.10",))).changes.moved
        assert moved == (("10.86.0.10", peer("c"), peer("d")),)


class TestBounds:
    """The charter is bounded, and no bound keeps a revocation out."""

    def flooded(self, grants: int = charter.MAX_NAMED) -> World:
        world = World()
        second = world.grant("second")
        for number in range(grants):
            world.put(second.grant(public(f"x{number}"), peer(f"x{number}"), NOW + number))
        return world

    def test_a_revocation_is_taken_however_many_grants_there_are(self):
        world = self.flooded()
        world.put(*world.root.revoke_stolen(public("second"), NOW + 1).final, now_ms=NOW + 1)
        held = world.directory
        assert [one.key for one in held.authorities() if not one.revoked] == [public("root")]
        assert reasons(merge(held, membership("thief", "second"))) == ["revoked_authority"]
        assert reasons(merge(held, membership("thief", "x3"))) == ["unknown_authority"]

    def test_one_authority_names_so_many_and_no_more(self):
        world = self.flooded()
        late = world.authority("second").grant(public("late"), peer("late"), NOW + 1000)
        assert reasons(merge(world.directory, late)) == ["directory_full"]
        assert world.directory.authority(public("late")) is None
        world.grant("of-the-root")

    def test_those_it_names_name_no_more_in_its_stead(self):
        world = self.flooded(charter.MAX_NAMED // 2)
        for number in range(charter.MAX_NAMED):
            body = Grant(
                network=NETWORK.id,
                signer=public("x0"),
                key=public(f"y{number}"),
                peer_id=peer(f"y{number}"),
                granted_ms=NOW,
                issued_ms=NOW,
            )
            merge(world.directory, sign(key("x0"), body))
        assert len(world.directory.authorities()) == charter.MAX_NAMED + 2

    def test_what_is_granted_again_and_again_is_kept_once(self):
        world = World()
        for number in range(50):
            world.put(world.root.grant(public("second"), peer("second"), NOW + number))
        kinds = [wire for wire in world.directory.statements() if public("second") in wire]
        assert len(kinds) == 2, "the first, which would count again, and the newest"

    @pytest.mark.parametrize("order", [1, -1])
    def test_which_keys_are_kept_does_not_depend_on_the_order(self, order):
        told, world = self.flooded().said, World()
        second = self.flooded(0).authority("second")
        told += [
            second.grant(public(f"z{number}"), peer(f"z{number}"), NOW - 9 + number) for number in range(9)
        ]
        merge(world.directory, *told[::order])
        merge(world.directory, *told[::order])
        named = {one.peer_id for one in world.directory.authorities() if one.distance == 2}
        assert {peer(f"z{number}") for number in range(9)} <= named and len(named) == charter.MAX_NAMED


class TestAuthorities:
    def test_a_granted_key_signs_for_the_network_and_grants_on(self):
        world = World()
        world.grant("second")
        world.grant("third", by="second")
        world.enrol("b", by="third")
        assert [(one.peer_id, one.distance) for one in world.directory.authorities()] == [
            (peer("root"), 0),
            (peer("second"), 1),
            (peer("third"), 2),
        ]
        assert world.directory.find(peer("b"), NOW)

    def test_grants_are_taken_in_any_order_when_they_come_together(self):
        world = World()
        for number in range(1, 6):
            world.grant(f"a{number}", by=f"a{number - 1}" if number > 1 else "root")
        world.enrol("b", by="a5")
        held = directory()
        assert not merge(held, *reversed(world.said)).refused
        assert held.index.root() == world.directory.index.root()

    def test_what_a_revoked_authority_signed_before_stays_and_after_is_void(self):
        world = World()
        world.grant("second")
        world.enrol("b", by="second")
        world.enrol("c", by="second", now_ms=NOW + 10)
        world.put(revocation("root", "second", NOW + 20, since_ms=NOW + 10))
        assert [one.name for one in world.directory.members(NOW)] == ["b"]
        late = membership("d", signer="second", issued_ms=NOW + 11)
        assert reasons(merge(world.directory, late)) == ["revoked_authority"]

    def test_after_a_theft_everything_is_void_but_what_is_signed_again(self):
        world = World()
        world.grant("second")
        world.enrol("b", by="second")
        world.enrol("thief", by="second")
        address = world.directory.find(peer("b"), NOW).addresses
        theft = world.root.revoke_stolen(public("second"), NOW + 1, keep=[peer("b")])
        assert theft.lost == [peer("thief")]
        world.put(*theft.again, now_ms=NOW + 1)
        world.put(*theft.final, now_ms=NOW + 1)
        (kept,) = world.directory.members(NOW + 1)
        assert (kept.name, kept.addresses, kept.signer) == ("b", address, public("root"))

    def test_after_a_theft_everybody_is_as_honest_authorities_made_them(self):
        world = World()
        world.grant("second")
        world.grant("third", now_ms=NOW + 1)
        for name in ("second", "b", "c"):
            world.enrol(name)
        world.enrol("third", by="second", now_ms=NOW + 1)
        # the thief renames b and gives it a way to everywhere, and lets c be
        world.put(
            membership("b", "second", name="x", routes=("0.0.0.0/0",), enrolled_ms=NOW + 2, issued_ms=NOW + 2)
        )
        theft = world.root.revoke_stolen(public("second"), NOW + 3)
        changes = [world.put(*part, now_ms=NOW + 3).changes for part in (theft.again, theft.final)]
        assert {one.name for one in world.directory.members(NOW)} == {"b", "c", "third"}
        assert [one.name for one in changes[1].removed] == ["second"], "its key is the thief's, too"
        assert world.directory.find(peer("b"), NOW).routes == ()
        assert reason(world.root.grant, public("second"), peer("second"), NOW + 9) == "revoked_authority"

    def test_what_a_thief_revoked_comes_back_when_the_thief_is_revoked(self):
        world = World()
        world.grant("senior")
        world.grant("junior", now_ms=NOW + 1)
        world.enrol("b", by="junior", now_ms=NOW + 1)
        before = world.directory.index.root()
        world.put(revocation("senior", "junior", NOW + 2), now_ms=NOW + 2)
        assert world.directory.members(NOW) == ()
        restarted = directory()
        restarted.restore(world.directory.statements(), NOW + 2)
        for held in (world.directory, restarted):
            merge(held, revocation("root", "senior", NOW + 3, since_ms=NOW + 2), now_ms=NOW + 3)
            assert [one.name for one in held.members(NOW)] == ["b"]
        assert world.directory.index.root() == restarted.index.root() != before

    def test_a_junior_cannot_revoke_its_senior_nor_anybody_the_root(self):
        world = World()
        world.grant("senior")
        world.grant("junior", now_ms=NOW + 1)
        for signer, subject in [("junior", "senior"), ("senior", "root"), ("root", "root")]:
            body = Revoke(
                network=NETWORK.id, signer=public(signer), key=public(subject), since_ms=0, issued_ms=NOW
            )
            assert reasons(merge(world.directory, sign(key(signer), body))) == ["not_permitted"]

    def test_a_member_removed_by_a_thief_comes_back_when_the_thief_is_revoked(self):
        world = World()
        world.grant("second")
        world.enrol("b")
        world.put(world.authority("second").remove(peer("b"), NOW + 5), now_ms=NOW + 5)
        assert world.directory.members(NOW) == ()
        changes = world.put(revocation("root", "second", NOW + 9, since_ms=NOW + 1), now_ms=NOW + 9).changes
        assert [one.name for one in changes.added] == ["b"]

    def test_root_may_move_to_another_node(self):
        world = World()
        world.put(world.root.found(peer("new"), NOW + 1), now_ms=NOW + 1)
        assert world.directory.authorities()[0].peer_id == peer("new")


def test_a_restart_keeps_members_the_expired_and_the_removed():
    held = directory()
    merge(held, membership("b"), membership("c", expires_ms=NOW + DAY), presence("b"))
    merge(held, membership("d"), removal("d", NOW))
    later = NOW + 2 * DAY
    held.advance(later)
    restarted = directory()
    restarted.restore(held.statements(), later)
    assert restarted.members(later) == held.members(later)
    assert restarted.index.root() == held.index.root()
    assert restarted.newest(peer("c")) and restarted.removal(peer("d"))
    assert sorted(restarted.statements()) == sorted(held.statements())
