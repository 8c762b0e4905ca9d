"""Directories that were told the same are the same: whatever the order, the batches and the repeats."""

from __future__ import annotations

import random

from hypothesis import example, given, settings
from hypothesis import strategies as st
from membership_world import NETWORK, NOW, SKEW, directory, key, membership, peer, presence, public

from vpnd.membership.directory import Directory
from vpnd.membership.statements import Grant, Removal, Revoke, Statement, parse_untrusted, sign

AUTHORITIES = ("root", "second", "third")
MEMBERS = ("b", "c", "d")
TIMES = st.integers(NOW, NOW + 6)
LATER = NOW + 100

_cache: dict[bytes, Statement] = {}


def parse(wire: bytes) -> Statement:
    if wire not in _cache:
        _cache[wire] = parse_untrusted(wire)
    return _cache[wire]


def _membership(signer: str, name: str, times: list[int], address: int, called: str) -> Statement:
    enrolled_ms, issued_ms = sorted(times)
    addresses = (f"10.86.0.{address}",)
    return membership(
        name, signer, name=called, addresses=addresses, enrolled_ms=enrolled_ms, issued_ms=issued_ms
    )


def _removal(signer: str, name: str, issued_ms: int) -> Statement:
    body = Removal(network=NETWORK.id, signer=public(signer), peer_id=peer(name), issued_ms=issued_ms)
    return sign(key(signer), body)


def _grant(signer: str, subject: str, times: list[int]) -> Statement:
    granted_ms, issued_ms = sorted(times)
    body = Grant(
        network=NETWORK.id,
        signer=public(signer),
        key=public(subject),
        peer_id=peer(subject),
        granted_ms=granted_ms,
        issued_ms=issued_ms,
    )
    return sign(key(signer), body)


def _revoke(signer: str, subject: str, since_ms: int, issued_ms: int) -> Statement:
    body = Revoke(
        network=NETWORK.id, signer=public(signer), key=public(subject), since_ms=since_ms, issued_ms=issued_ms
    )
    return sign(key(signer), body)


SIGNERS = st.sampled_from(AUTHORITIES)
NAMES = st.sampled_from(MEMBERS)
TWO_TIMES = st.lists(TIMES, min_size=2, max_size=2)
STATEMENTS = st.one_of(
    st.builds(_membership, SIGNERS, NAMES, TWO_TIMES, st.integers(1, 3), NAMES),
    st.builds(_removal, SIGNERS, NAMES, TIMES),
    st.builds(presence, NAMES, TIMES),
    st.builds(_grant, SIGNERS, st.sampled_from(AUTHORITIES), TWO_TIMES),
    st.builds(_revoke, SIGNERS, st.sampled_from(AUTHORITIES[1:]), TIMES, TIMES),
)
BASE = [_grant("root", "second", [NOW, NOW]), _grant("second", "third", [NOW, NOW])]


def tell(held: Directory, statements: list[Statement], dice: random.Random) -> None:
    """All statements in random order and batches, again and again until nothing is new."""
    while True:
        accepted = 0
        order = dice.sample(statements, len(statements))
        while order:
            batch = [order.pop() for _ in range(min(len(order), dice.randint(1, 4)))]
            accepted += len(held.merge([one.wire for one in batch], LATER).accepted)
        if not accepted:
            return


@settings(max_examples=120)
@given(st.lists(STATEMENTS, max_size=25), st.integers(0, 1 << 30))
def test_the_order_of_statements_does_not_matter(statements, seed):
    dice = random.Random(seed)
    told = [directory(parse), directory(parse), directory(parse)]
    for held in told:
        tell(held, BASE + statements, dice)
    first, *others = told
    for other in others:
        assert other.authorities() == first.authorities()
        assert other.members(LATER) == first.members(LATER)
        assert other.conflicts() == first.conflicts()
        assert other.index.root() == first.index.root()


@settings(max_examples=80)
@given(st.lists(STATEMENTS, max_size=25), st.integers(0, 1 << 30))
def test_what_is_kept_over_a_restart_is_enough(statements, seed):
    before, after = directory(parse), directory(parse)
    tell(before, BASE + statements, random.Random(seed))
    after.restore(before.statements(), LATER)
    assert after.members(LATER) == before.members(LATER)
    assert after.index.root() == before.index.root()


@settings(max_examples=80)
@given(st.lists(STATEMENTS, max_size=25), st.integers(0, 1 << 30), st.integers(NOW - SKEW - 9, NOW + 9))
@example(
    [_removal("root", "b", NOW), _revoke("root", "second", NOW, NOW), _removal("third", "b", NOW)],
    0,
    NOW - SKEW,
)
def test_a_clock_that_is_wrong_for_a_while_changes_nothing(statements, seed, wrong_ms):
    held = directory(parse)
    tell(held, BASE + statements, random.Random(seed))
    before = (
        held.members(LATER),
        held.authorities(),
        held.conflicts(),
        held.index.root(),
        sorted(held.statements()),
    )
    held.judge_anew(wrong_ms)
    held.judge_anew(LATER)
    after = (
        held.members(LATER),
        held.authorities(),
        held.conflicts(),
        held.index.root(),
        sorted(held.statements()),
    )
    assert after == before and not held.early()


@settings(max_examples=80)
@given(st.lists(STATEMENTS, max_size=25), st.integers(0, 1 << 30))
def test_the_changes_add_up_to_the_members(statements, seed):
    """Somebody who only follows `changes` knows what a reader of the directory knows; so do those who read owners."""
    held, dice = directory(parse), random.Random(seed)
    followed = {}
    for statement in dice.sample(BASE + statements, len(BASE + statements)):
        changes = held.merge([statement.wire], LATER).changes
        for member in changes.removed:
            assert followed.pop(member.peer_id) == member
        for member in changes.added:
            assert followed.setdefault(member.peer_id, member) is member
        for member in changes.changed:
            assert followed[member.peer_id] != member
            followed[member.peer_id] = member
    assert sorted(followed) == sorted(member.peer_id for member in held.members(LATER))
    for member in held.members(LATER):
        assert followed[member.peer_id] == member
        assert all(held.owner(address) == member.peer_id for address in member.addresses)
    every = [address for member in held.members(LATER) for address in member.addresses]
    assert len(set(every)) == len(every)
