"""Tokens: short, one word, and a typing error is found and said where."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from membership_world import NETWORK, peer

from vpnd.membership import token
from vpnd.membership.refusal import MembershipRefused
from vpnd.membership.token import HINT_BYTES, Token
from vpnd.nat.paths import RelayAt

ADDRESSES = ("/ip4/192.0.2.1/tcp/4001", "/ip6/2001:db8::1/tcp/4001", "/dns4/a.example.org/tcp/443")


def made(addresses: tuple[str, ...] = ADDRESSES[:1]) -> Token:
    return Token(
        network=NETWORK.id[:HINT_BYTES], peer_id=peer("root"), addresses=addresses, secret=bytes(range(16))
    )


def refusal(text: str) -> MembershipRefused:
    with pytest.raises(MembershipRefused) as caught:
        token.parse_untrusted(text)
    assert len(text) < 40 or text not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("count", range(4))
def test_a_token_reads_back_as_itself(count):
    text = token.encode(made(ADDRESSES[:count]))
    assert token.parse_untrusted(text) == made(ADDRESSES[:count])
    assert text.isalnum() and text.isascii()


def test_a_token_names_relays_of_a_node_that_cannot_be_dialed():
    relays = (RelayAt(ADDRESSES[0], peer("b")), RelayAt(ADDRESSES[1], peer("c")))
    wanted = msgspec.structs.replace(made(ADDRESSES[:2]), relays=relays)
    read = token.parse_untrusted(token.encode(wanted))
    assert read == wanted
    many = msgspec.structs.replace(wanted, addresses=ADDRESSES * 2, relays=relays * 2)
    read = token.parse_untrusted(token.encode(many))
    assert read.addresses == (*ADDRESSES, ADDRESSES[0]) and read.relays == relays


def test_a_token_with_one_address_fits_two_lines_of_a_terminal():
    assert len(token.encode(made())) <= 130


def test_what_does_not_fit_is_left_out_from_the_end():
    long = tuple(f"/dns4/{letter * 60}.example.org/tcp/1" for letter in "abcd")
    assert token.parse_untrusted(token.encode(made(long))).addresses == long[:2]


def test_how_it_is_pasted_does_not_matter():
    text = token.encode(made())
    assert token.parse_untrusted(f"  {text[:40].upper()}\n {text[40:]}\n") == made()
    assert (
        token.parse_untrusted(text.replace("0", "O").replace("1", "l").replace("vpndl", "vpnd1", 1)) == made()
    )


def test_nearly_every_wrong_character_is_found_where_it_is():
    text, dice, placed = token.encode(made()), random.Random(3), 0
    for place in range(len(token.PREFIX), len(text)):
        wrong = dice.choice([c for c in "23456789abcdefgh" if c != text[place]])
        error = refusal(text[:place] + wrong + text[place + 1 :])
        assert error.reason == "mistyped"
        if "between characters" in str(error):
            first, last = (int(word.strip(";")) for word in str(error).split() if word.strip(";").isdigit())
            placed += first <= place + 1 <= last
    assert placed > 0.8 * (len(text) - len(token.PREFIX))


MISTYPED = [
    ("cut short", lambda text: text[:60], "cut short"),
    ("one character lost at its end", lambda text: text[:-1], "token"),
    ("empty", lambda text: "", "starts? with|start with"),
    ("the prefix alone", lambda text: text[:5], "cut short"),
    ("with something behind it", lambda text: text + text[-20:], "token"),
    ("a character that is in no token", lambda text: text[:20] + "u" + text[21:], "at 21"),
    ("something else", lambda text: "https://example.org", "start with vpnd1"),
    ("a book", lambda text: text * 100, "too long"),
]


@pytest.mark.parametrize(("what", "change", "says"), MISTYPED, ids=[row[0] for row in MISTYPED])
def test_the_error_helps(what, change, says):
    text = token.encode(made())
    with pytest.raises(MembershipRefused, match=says) as caught:
        token.parse_untrusted(change(text))
    assert caught.value.reason == "mistyped"


@given(st.text(max_size=200))
def test_any_text_is_refused(text):
    for candidate in (text, token.PREFIX + text):
        refusal(candidate) if candidate.strip() else None


@settings(max_examples=200)
@given(st.text(alphabet=token._ALPHABET, max_size=200))
def test_any_text_of_the_alphabet_is_refused(text):
    assert refusal(token.PREFIX + text).reason in ("mistyped", "malformed")


def test_secrets_of_tokens_are_in_no_representation():
    assert "secret" not in repr(made()) and str(bytes(range(16))) not in repr(made())
    assert token.secret_hash(bytes(16)) != token.secret_hash(bytes(15) + b"\x01")


def test_a_token_knows_its_network():
    assert made().is_for(NETWORK.id) and not made().is_for(bytes(16))
