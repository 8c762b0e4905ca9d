"""Records of the members' table: which are believed."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from vpnd import peerid
from vpnd.discovery.records import MAX_KEY_BYTES, RecordRules, dht_key
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.statements import Presence, Removal, sign

NOW = 1_800_000_000_000
LIFETIME, SKEW = 3_600_000, 300_000
NETWORK_ID = bytes(16)


def key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def peer(name: str) -> str:
    return peerid.from_public_key(key(name).public_key().public_bytes_raw())


def presence(name: str, at_ms: int = NOW, address: str = "/ip4/192.0.2.1/tcp/4001") -> bytes:
    body = Presence(NETWORK_ID, peer_id=peer(name), addresses=(address,), sequence_ms=at_ms)
    return sign(key(name), body).wire


def rules(**known_ms: int) -> RecordRules:
    """The members are those named, with the sequences of the presences known of them."""
    by_id = {peer(name): sequence for name, sequence in known_ms.items()}
    return RecordRules(by_id.get, LIFETIME, SKEW)


GOOD = presence("a")
BAD = [
    # (sentence, key, value, reason)
    ("not a statement", dht_key(peer("a")), b"hello", "malformed"),
    ("empty", dht_key(peer("a")), b"", "malformed"),
    ("one bit of the signature", dht_key(peer("a")), GOOD[:9] + bytes([GOOD[9] ^ 1]) + GOOD[10:], "forged"),
    ("one bit of the body", dht_key(peer("a")), GOOD[:-1] + bytes([GOOD[-1] ^ 1]), None),
    ("under another's key", dht_key(peer("b")), GOOD, "forged"),
    ("under the key of nobody", "/vpn/m/", GOOD, "forged"),
    ("of no member", dht_key(peer("stranger")), presence("stranger"), "not_member"),
    ("too old", dht_key(peer("a")), presence("a", NOW - LIFETIME - SKEW - 1), "expired"),
    ("of the future", dht_key(peer("a")), presence("a", NOW + SKEW + 1), "not_yet_valid"),
    ("older than what is known", dht_key(peer("b")), presence("b", NOW - 1), "rolled_back"),
    (
        "another kind of statement",
        dht_key(peer("a")),
        sign(
            key("a"),
            Removal(
                NETWORK_ID,
                signer=key("a").public_key().public_bytes_raw(),
                peer_id=peer("a"),
                issued_ms=NOW,
            ),
        ).wire,
        "malformed",
    ),
]


@pytest.mark.parametrize(("where", "value", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_record_is_refused(where: str, value: bytes, reason: str | None) -> None:
    with pytest.raises(MembershipRefused) as refused:
        rules(a=-1, b=NOW).check_untrusted(where, value, NOW)
    assert reason is None or refused.value.reason == reason


def test_a_good_one_is_believed_as_long_as_it_may_be() -> None:
    where = dht_key(peer("a"))
    for at_ms in (NOW, NOW + SKEW, NOW - LIFETIME - SKEW):
        body = rules(a=-1).check_untrusted(where, presence("a", at_ms), NOW)
        assert body.addresses == ("/ip4/192.0.2.1/tcp/4001",)
    assert rules(a=NOW).check_untrusted(where, presence("a"), NOW), "the same as is known is no older"


def test_keys_fit_and_differ() -> None:
    keys = {dht_key(peer(str(number))) for number in range(100)}
    assert len(keys) == 100
    assert all(len(each) <= MAX_KEY_BYTES for each in keys)


def test_the_newest_is_best_and_of_equal_ones_the_last() -> None:
    old, new = presence("a", NOW - 5), presence("a", NOW)
    judge = rules(a=-1)
    assert judge.best_untrusted([old, new]) == 1
    assert judge.best_untrusted([new, old]) == 0
    assert judge.best_untrusted([new, new]) == 1
    assert judge.best_untrusted([new, old, new, old]) == 2
    for values in ([], [new, b"nonsense"]):
        with pytest.raises(MembershipRefused):
            judge.best_untrusted(values)


def test_of_two_said_in_one_millisecond_all_prefer_the_same() -> None:
    one, other = presence("a"), presence("a", address="/ip4/192.0.2.2/tcp/4001")
    judge = rules(a=-1)
    assert [one, other][judge.best_untrusted([one, other])] == [other, one][
        judge.best_untrusted([other, one])
    ]


@given(st.text(max_size=60), st.binary(max_size=300), st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_nothing_else_than_a_refusal_comes_of_whatever_bytes(
    where: str, value: bytes, place: int, bits: int
) -> None:
    judge = rules(a=-1)
    changed = GOOD[:place] + bytes([GOOD[place] ^ bits]) + GOOD[place + 1 :]
    for candidate in (value, GOOD[:66] + value, changed):
        with pytest.raises(MembershipRefused):
            judge.check_untrusted(where, candidate, NOW)
        with pytest.raises(MembershipRefused):
            judge.check_untrusted(dht_key(peer("a")), candidate, NOW)
