"""What is said to routers to have a port, byte by byte as the RFCs have it."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from vpnd.endpoint import parse
from vpnd.errors import RemoteProtocolError
from vpnd.nat import portmap
from vpnd.nat.portmap import Granted, PortRefused

HERE = ipaddress.IPv4Address("10.1.0.2")
OUTSIDE = ipaddress.IPv4Address("203.0.113.1")
NONCE = bytes(range(12))
MAPPED = bytes(10) + b"\xff\xff"


def pcp(
    *, version: int = 2, opcode: int = 0x81, result: int = 0, nonce: bytes = NONCE, port: int = 4001
) -> bytes:
    head = struct.pack("!BBBBII12x", version, opcode, 0, result, 1800, 77)
    return head + struct.pack("!12sB3xHH", nonce, 6, port, 40001) + MAPPED + OUTSIDE.packed


def test_a_pcp_request_is_as_rfc_6887_has_it() -> None:
    sent = portmap.pcp_request(NONCE, HERE, 4001, parse("203.0.113.1:40001"), 1800)
    assert sent[:8] == b"\x02\x01\x00\x00" + (1800).to_bytes(4) and sent[8:24] == MAPPED + HERE.packed
    assert sent[24:36] == NONCE and sent[36:40] == b"\x06\x00\x00\x00"
    assert sent[40:44] == struct.pack("!HH", 4001, 40001) and sent[44:] == MAPPED + OUTSIDE.packed
    # with no wish the same port outside, at whatever address
    assert portmap.pcp_request(NONCE, HERE, 4001, None, 1800)[40:] == struct.pack(
        "!HH", 4001, 4001
    ) + MAPPED + bytes(4)


def test_a_pcp_answer_grants_a_port() -> None:
    assert portmap.pcp_answer_untrusted(pcp(), NONCE, 4001) == Granted(OUTSIDE, 40001, 1800)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (pcp(result=2), "not permitted"),
        (pcp(result=8), "no room"),
        (pcp(result=99), "99"),
        (b"\x00\x81\x00\x01" + bytes(20), "NAT-PMP"),
    ],
)
def test_a_router_that_gives_no_port_says_why(data: bytes, why: str) -> None:
    with pytest.raises(PortRefused, match=why):
        portmap.pcp_answer_untrusted(data, NONCE, 4001)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        pcp()[:-1],
        pcp(opcode=1),  # a request
        pcp(nonce=bytes(12)),  # of somebody else
        pcp(port=4002),
        pcp(version=3),
        pcp()[:-16] + bytes(16),  # at an IPv6 address
    ],
)
def test_what_is_no_answer_is_not_taken_for_one(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        portmap.pcp_answer_untrusted(data, NONCE, 4001)
    assert not isinstance(caught.value, PortRefused)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x02\x80\x00\x00" + bytes(20), True),
        (b"\x00\x80\x00\x00" + bytes(8), True),
        (b"\x02\x00\x00\x00" + bytes(20), False),  # a question
        (b"\x02\x81\x00\x00" + bytes(20), False),
        (b"\x02\x80", False),
        (b"", False),
    ],
)
def test_a_router_says_that_it_has_started(data: bytes, said: bool) -> None:
    assert portmap.is_announcement_untrusted(data) == said


def test_nat_pmp_is_as_rfc_6886_has_it() -> None:
    assert portmap.pmp_address_request() == b"\x00\x00"
    assert portmap.pmp_address_untrusted(b"\x00\x80\x00\x00" + bytes(4) + OUTSIDE.packed) == OUTSIDE
    assert portmap.pmp_request(4001, 40001, 1800) == struct.pack("!BBHHHI", 0, 2, 0, 4001, 40001, 1800)
    answer = struct.pack("!BBHIHHI", 0, 130, 0, 77, 4001, 40001, 1800)
    assert portmap.pmp_answer_untrusted(answer, 4001) == Granted(None, 40001, 1800)
    with pytest.raises(PortRefused, match="not permitted"):
        portmap.pmp_answer_untrusted(b"\x00\x82\x00\x02", 4001)
    nowhere = struct.pack("!BBHIHHI", 0, 130, 0, 77, 4001, 0, 1800)
    for stray in (nowhere, answer[:-1], answer + b"x", b"\x00\x80" + answer[2:], b"\x02" + answer[1:], b""):
        with pytest.raises(RemoteProtocolError):
            portmap.pmp_answer_untrusted(stray, 4001)
    with pytest.raises(RemoteProtocolError):
        portmap.pmp_answer_untrusted(answer, 4002)
