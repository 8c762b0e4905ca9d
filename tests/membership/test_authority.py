"""What authorities do, and what invitations are good for, as tables of situations."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from membership_world import DAY, LIFETIME, NETWORK, NOW, World, peer, presence, public, reason

from vpnd.membership import enrolment, network, statements
from vpnd.membership.authority import renewal_ms
from vpnd.membership.invitations import Invitations
from vpnd.membership.refusal import REASONS, MembershipRefused

SECRET = bytes(range(16))
HOUR = 3_600_000


@pytest.fixture
def world() -> World:
    return World()


class TestAddresses:
    def test_a_member_gets_one_of_each_version_inside_the_network(self, world):
        one, other = map(ipaddress.ip_address, world.enrol("b").addresses)
        assert one in NETWORK.ipv4 and other in NETWORK.members_ipv6

    def test_addresses_depend_on_the_peer_id_and_what_is_taken(self):
        first = network.ipv4(NETWORK, peer("b"), ())
        assert network.ipv4(NETWORK, peer("b"), ()) == first
        assert network.ipv4(NETWORK, peer("b"), {first}) == str(ipaddress.ip_address(first) + 1)
        six = network.ipv6(NETWORK, peer("b"), ())
        assert network.ipv6(NETWORK, peer("b"), {six}) != six

    def test_every_address_is_given_out_and_then_no_more(self):
        small = network.create("home", public("root"), "10.9.8.0/29")
        taken: set[str] = set()
        for number in range(6):
            taken.add(network.ipv4(small, peer(f"p{number}"), taken))
        assert taken == {f"10.9.8.{number}" for number in range(1, 7)}
        assert reason(network.ipv4, small, peer("late"), taken) == "subnet_full"

    def test_two_authorities_at_once_rarely_choose_alike(self):
        chosen = [network.ipv4(NETWORK, peer(f"p{number}"), ()) for number in range(100)]
        assert len(set(chosen)) >= 98

    @pytest.mark.parametrize(
        ("wish", "why"),
        [
            ("10.86.0.0", "address_outside"),
            ("10.86.255.255", "address_outside"),
            ("10.87.0.1", "address_outside"),
            ("fd00::1", "address_outside"),
            ("x", "address_outside"),
            ("10.86.0.5", "address_taken"),
        ],
    )
    def test_a_wish_is_judged(self, wish, why):
        assert reason(network.check_wish, NETWORK, wish, {"10.86.0.5"}) == why

    def test_a_wish_is_granted(self, world):
        ipv4, ipv6 = world.enrol("b", addresses=("10.86.0.7",)).addresses
        assert ipv4 == "10.86.0.7" and ipv6 == world.enrol("b").addresses[1]
        wished = str(NETWORK.members_ipv6.network_address + 7)
        assert world.enrol("c", addresses=(wished,)).addresses == (world.enrol("c").addresses[0], wished)


class TestMembers:
    def test_names_are_told_apart_by_numbers_unless_they_are_firm(self, world):
        assert world.enrol("b", called="laptop").name == "laptop"
        assert world.enrol("c", called="laptop").name == "laptop-2"
        assert world.enrol("d", called="laptop").name == "laptop-3"
        with pytest.raises(MembershipRefused) as caught:
            world.enrol("e", called="laptop", firm=True)
        assert caught.value.reason == "name_taken"

    def test_enrolling_again_keeps_addresses_and_may_change_the_rest(self, world):
        before = world.enrol("b")
        after = world.enrol("b", called="c", routes=("10.1.0.0/16",), now_ms=NOW + 5)
        assert after.addresses == before.addresses and after.enrolled_ms == before.enrolled_ms
        assert after.name == "c" and after.routes == ("10.1.0.0/16",)

    def test_any_authority_renews_and_nothing_else_changes(self, world):
        before = world.enrol("b")
        second = world.grant("second")
        statement = second.renew(peer("b"), NOW + DAY)
        world.put(statement, now_ms=NOW + DAY)
        after = statement.body
        assert after.expires_ms == NOW + DAY + LIFETIME
        assert (after.name, after.addresses, after.enrolled_ms) == (before.name, before.addresses, NOW)

    def test_an_expired_member_renews_as_long_as_it_is_remembered(self, world):
        world.enrol("b")
        late = NOW + LIFETIME + DAY
        world.directory.advance(late)
        world.put(world.root.renew(peer("b"), late), now_ms=late)
        assert world.directory.find(peer("b"), late)

    def test_who_is_removed_or_was_never_here_is_not_renewed(self, world):
        world.enrol("b")
        world.put(world.root.remove(peer("b"), NOW))
        assert reason(world.root.renew, peer("b"), NOW) == "removed"
        assert reason(world.root.renew, peer("c"), NOW) == "not_member"

    def test_a_removal_by_a_clock_behind_holds(self, world):
        world.enrol("b", now_ms=NOW + 60_000)
        world.put(world.root.remove(peer("b"), NOW))
        assert not world.directory.members(NOW)

    def test_a_removed_member_can_be_let_in_again_by_a_clock_behind(self, world):
        world.enrol("b")
        world.put(world.root.remove(peer("b"), NOW + 60_000))
        world.enrol("b")
        assert world.directory.find(peer("b"), NOW)
        world.put(presence("b"))

    def test_who_lost_an_address_and_a_name_gets_others_at_renewal(self, world):
        apart = World()
        apart.enrol("b", called="twin", addresses=("10.86.0.7", "10.86.0.8"))
        world.enrol("c", called="twin", addresses=("10.86.0.7",), now_ms=NOW - 1)
        world.put(*apart.said[1:])
        assert world.directory.find(peer("b"), NOW).lost == ("10.86.0.7", "twin")
        statement = world.root.renew(peer("b"), NOW + 1)
        world.put(statement, now_ms=NOW + 1)
        assert statement.body.addresses[1] == "10.86.0.8" and statement.body.name == "twin-2"
        assert world.directory.conflicts() == () and not world.directory.find(peer("b"), NOW).lost

    def test_renewal_is_due_when_the_share_is_left(self):
        assert renewal_ms(NOW, NOW + LIFETIME, 0.5) == NOW + LIFETIME // 2
        assert renewal_ms(NOW, NOW + LIFETIME, 0.25) == NOW + LIFETIME * 3 // 4


class TestAuthorities:
    def test_a_stranger_and_a_revoked_authority_sign_nothing(self, world):
        assert reason(world.authority("stranger").remove, peer("b"), NOW) == "not_authority"
        second = world.grant("second")
        world.put(world.root.revoke(public("second"), NOW + 1), now_ms=NOW + 1)
        assert not second.valid
        assert reason(second.remove, peer("b"), NOW + 2) == "not_authority"
        assert reason(world.root.grant, public("second"), peer("second"), NOW + 3) == "revoked_authority"

    def test_only_seniors_revoke(self, world):
        second, third = world.grant("second"), world.grant("third", now_ms=NOW + 1)
        assert reason(third.revoke, public("second"), NOW + 2) == "not_permitted"
        assert reason(second.revoke, public("root"), NOW + 2) == "not_permitted"
        assert reason(second.revoke, public("nobody"), NOW + 2) == "unknown_authority"
        world.put(second.revoke(public("third"), NOW + 2), now_ms=NOW + 2)
        world.put(second.revoke(public("second"), NOW + 3), now_ms=NOW + 3)
        assert [one.revoked for one in world.directory.authorities()] == [False, True, True]

    def test_the_network_goes_on_without_its_root(self, world):
        second = world.grant("second")
        world.enrol("b", by="second")
        world.put(second.grant(public("third"), peer("third"), NOW + 1), now_ms=NOW + 1)
        world.enrol("c", by="third", now_ms=NOW + 2)
        assert len(world.directory.members(NOW)) == 2

    def test_keys_are_in_no_representation(self, world):
        assert repr(world.root) == f"Authority(public_key={public('root').hex()})"


class TestInvitations:
    def invited(self, world, **options) -> Invitations:
        invitations = Invitations()
        invitations.add(SECRET, world.directory, NOW, lifetime_ms=HOUR, **options)
        return invitations

    def redeem(self, world, invitations, name, *, secret=SECRET, wished="", now_ms=NOW):
        statement = invitations.redeem(
            world.root, world.directory, secret, peer(name), wished or name, now_ms
        )
        world.put(statement, now_ms=now_ms)
        return statement.body

    def test_a_token_lets_one_node_in_once(self, world):
        invitations = self.invited(world)
        assert self.redeem(world, invitations, "b", wished="Ann's Laptop").name == "ann-s-laptop"
        assert reason(self.redeem, world, invitations, "c") == "used_token"

    def test_the_same_node_gets_the_same_answer_again(self, world):
        invitations = self.invited(world)
        before = self.redeem(world, invitations, "b")
        assert self.redeem(world, invitations, "b", now_ms=NOW + 2 * HOUR) == before

    def test_an_answer_lost_before_anything_was_stored_is_given_anew(self, world):
        invitations = self.invited(world)
        invitations.redeem(world.root, world.directory, SECRET, peer("b"), "b", NOW)
        assert self.redeem(world, invitations, "b").peer_id == peer("b")
        assert invitations.all()[0].uses_left == 0

    def test_each_reason_to_refuse(self, world):
        invitations = self.invited(world)
        assert reason(self.redeem, world, invitations, "b", secret=bytes(16)) == "unknown_token"
        assert reason(self.redeem, world, invitations, "b", now_ms=NOW + HOUR + 1) == "expired_token"
        assert invitations.withdraw(invitations.all()[0].id) and not invitations.withdraw("x")
        assert reason(self.redeem, world, invitations, "b") == "unknown_token"

    def test_a_failure_uses_nothing_up(self, world):
        invitations = self.invited(world, name="laptop")
        world.enrol("x", called="laptop")
        assert reason(self.redeem, world, invitations, "b") == "name_taken"
        assert invitations.all()[0].uses_left == 1

    def test_a_removed_node_does_not_come_back_by_an_older_invitation(self, world):
        invitations = self.invited(world, uses=5)
        self.redeem(world, invitations, "b")
        world.put(world.root.remove(peer("b"), NOW + 1), now_ms=NOW + 1)
        assert reason(self.redeem, world, invitations, "b", now_ms=NOW + 2) == "removed"
        invitations.add(bytes(16), world.directory, NOW + 3, lifetime_ms=HOUR)
        assert self.redeem(world, invitations, "b", secret=bytes(16), now_ms=NOW + 4)

    def test_a_name_and_address_are_promised_once(self, world):
        invitations = self.invited(world, name="laptop", addresses=("10.86.0.7",), groups=("staff",))
        again = {"lifetime_ms": HOUR}
        add = invitations.add
        assert reason(add, bytes(16), world.directory, NOW, name="laptop", **again) == "name_taken"
        assert (
            reason(add, bytes(16), world.directory, NOW, addresses=("10.86.0.7",), **again) == "address_taken"
        )
        assert reason(add, bytes(16), world.directory, NOW, name="x", uses=2, **again) == "malformed"
        assert reason(add, bytes(16), world.directory, NOW, name="A b", **again) == "malformed"
        body = self.redeem(world, invitations, "b")
        assert (body.name, body.addresses[0], body.groups) == ("laptop", "10.86.0.7", ("staff",))

    @pytest.mark.parametrize(
        ("wish", "said"),
        [
            ({"routes": ("foo",)}, "192.168.7.0/24, say"),
            ({"routes": ("192.168.7.5/24",)}, "write 192.168.7.0/24"),
            ({"routes": ("10.0.0.0/8", "10.0.0.0/8")}, "twice"),
            ({"routes": tuple(f"10.{number}.0.0/16" for number in range(33))}, "at most 32"),
            ({"groups": ("we ird;",)}, "a-z, 0-9 and -"),
            ({"groups": tuple(f"{number}" * 60 for number in range(10))}, "512 characters"),
        ],
    )
    def test_what_no_membership_can_have_is_refused_at_once(self, world, wish, said):
        with pytest.raises(MembershipRefused, match=said):
            Invitations().add(SECRET, world.directory, NOW, lifetime_ms=HOUR, **wish)

    def test_the_most_that_can_be_asked_for_is_a_statement(self, world):
        routes = tuple(f"2001:db8:{number:x}::/48" for number in range(0x1000, 0x1014))
        groups = tuple("g" * number for number in range(1, 17))
        invitations = self.invited(world, routes=routes, groups=groups, name="n" * 63)
        assert self.redeem(world, invitations, "b").routes == routes

    def test_old_ones_are_forgotten(self, world):
        invitations = self.invited(world)
        invitations.prune(NOW + HOUR)
        assert invitations.all()
        invitations.prune(NOW + HOUR + 1)
        assert not invitations.all()


@given(st.text(max_size=100), st.integers(2, 99999))
def test_any_name_becomes_a_label(text, number):
    assert statements.is_label(statements.to_label(text))
    assert statements.is_label(statements.numbered(statements.to_label(text), number))


class TestEnrolmentMessages:
    SAMPLES = (
        enrolment.Join(secret=SECRET, name="b"),
        enrolment.Renew(network=NETWORK.id),
        enrolment.Leave(network=NETWORK.id),
    )
    ANSWERS = (
        enrolment.Welcome(network=NETWORK.encode(), statements=(b"x",)),
        enrolment.Refusal(reason="used_token", text="no"),
    )

    def test_they_read_back_as_themselves(self):
        for one in self.SAMPLES:
            assert enrolment.parse_request_untrusted(enrolment.encode(one)) == one
        for one in self.ANSWERS:
            assert enrolment.parse_answer_untrusted(enrolment.encode(one)) == one

    def test_errors_travel_and_unknown_ones_do_not(self):
        answer = enrolment.refusal(MembershipRefused("used_token", "x" * 1000))
        assert enrolment.parse_answer_untrusted(enrolment.encode(answer)).reason == "used_token"
        data = enrolment.encode(enrolment.Refusal(reason="because"))
        assert reason(enrolment.parse_answer_untrusted, data) == "malformed"

    def test_what_is_too_long_is_not_read(self):
        assert reason(enrolment.parse_request_untrusted, bytes(enrolment.MAX_REQUEST + 1)) == "too_long"
        assert reason(enrolment.parse_answer_untrusted, bytes(enrolment.MAX_ANSWER + 1)) == "too_long"

    @given(st.binary(max_size=200))
    def test_any_bytes_raise_one_error(self, data):
        for parse in (enrolment.parse_request_untrusted, enrolment.parse_answer_untrusted):
            try:
                parse(data)
            except MembershipRefused as refusal:
                assert refusal.reason in REASONS

    def test_secrets_are_in_no_representation(self):
        assert repr(self.SAMPLES[0]) == "Join(name='b')"
