"""Messages of the local network: what they say to members, and to nobody else."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd.discovery import localnet
from vpnd.discovery.localnet import Recognizer, parse_untrusted
from vpnd.errors import RemoteProtocolError

NETWORK, OTHER_NETWORK = bytes(range(16)), bytes(16)
SALT, OTHER_SALT = b"saltsalt", b"pepper!!"
PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
OTHERS = [f"peer {number}" for number in range(50)]
ANSWER = localnet.answer(NETWORK, SALT, PEER, 4001)


def beacon(wire: bytes = ANSWER) -> localnet.Beacon:
    heard = parse_untrusted(wire)
    assert heard is not None
    (only,) = heard.beacons
    return only


def test_a_member_is_recognized_by_members() -> None:
    assert beacon().port == 4001
    recognizer = Recognizer(NETWORK, lambda: [*OTHERS, PEER], 10)
    assert recognizer.recognize(beacon()) == PEER
    assert recognizer.recognize(beacon()) == PEER


def test_a_member_that_is_heard_of_later_is_recognized_then() -> None:
    members = list(OTHERS)
    recognizer = Recognizer(NETWORK, lambda: members, 10)
    assert recognizer.recognize(beacon()) == ""
    members.append(PEER)
    assert recognizer.recognize(beacon()) == PEER


def test_another_network_knows_nothing_of_it_and_does_not_try() -> None:
    def members() -> list[str]:
        raise AssertionError("one hash is enough to know a stranger")

    assert Recognizer(OTHER_NETWORK, members, 10).recognize(beacon()) == ""


def test_what_is_remembered_is_bounded() -> None:
    recognizer = Recognizer(NETWORK, lambda: [PEER], 3)
    for number in range(20):
        salt = number.to_bytes(8, "big")
        assert recognizer.recognize(beacon(localnet.answer(NETWORK, salt, PEER, 4001))) == PEER
    assert len(recognizer._known) == 3


def test_the_peer_id_and_the_network_are_not_in_it() -> None:
    assert PEER.encode() not in ANSWER
    assert NETWORK.hex().encode() not in ANSWER
    after_restart = localnet.answer(NETWORK, OTHER_SALT, PEER, 4001)
    one, other = beacon(), beacon(after_restart)
    assert not {one.salt, one.tag, one.member} & {other.salt, other.tag, other.member}


def test_it_is_dns_as_other_programs_read_it() -> None:
    message = dns.message.from_wire(ANSWER)
    assert message.flags == dns.flags.QR | dns.flags.AA
    assert message.id == 0
    assert {rrset.rdtype for rrset in message.answer} == {
        dns.rdatatype.PTR,
        dns.rdatatype.SRV,
        dns.rdatatype.TXT,
    }
    question = dns.message.from_wire(localnet.question())
    assert [str(rrset.name) for rrset in question.question] == ["_vpnd._tcp.local."]


def test_a_question_is_heard() -> None:
    heard = parse_untrusted(localnet.question())
    assert heard is not None
    assert heard.asked
    assert not heard.beacons


def test_what_is_about_other_things_is_none_of_ours() -> None:
    assert parse_untrusted(dns.message.make_query("_ipp._tcp.local.", "PTR").to_wire()) is None
    assert parse_untrusted(b"") is None


BROKEN = [
    ("cut short", ANSWER[:-20]),
    ("an id of other length", ANSWER.replace(b"m=", b"m=  ", 1)),
    ("an id that is no hex", ANSWER.replace(b"\x22m=", b"\x22m=\xff\xff")),
    ("too long", ANSWER + bytes(9000)),
]


@pytest.mark.parametrize("wire", [row[1] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_what_is_broken_is_refused(wire: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_untrusted(wire)


@given(st.binary(max_size=200), st.integers(0, len(ANSWER) - 1), st.binary(min_size=1, max_size=4))
def test_nothing_else_comes_of_whatever_bytes(noise: bytes, place: int, change: bytes) -> None:
    recognizer = Recognizer(NETWORK, lambda: OTHERS, 10)
    for wire in (
        noise,
        noise + localnet.MARK + noise,
        ANSWER[:12] + localnet.MARK + noise,
        ANSWER[:place] + change + ANSWER[place + len(change) :],
    ):
        try:
            heard = parse_untrusted(wire)
        except RemoteProtocolError:
            continue
        for each in heard.beacons if heard else ():
            assert recognizer.recognize(each) == ""
