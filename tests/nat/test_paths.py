"""Which addresses are tried after a meeting: never those of somebody else."""

from __future__ import annotations

import ipaddress

import pytest

from vpnd.endpoint import parse
from vpnd.nat import paths

LOCAL = [ipaddress.ip_network(text) for text in ("10.1.0.0/24", "127.0.0.0/8")]
VPN = [ipaddress.ip_network("10.86.0.0/16")]
YOU, PEER = "203.0.113.1:40001", "203.0.113.2:33949"

#: what it is, where we are seen, where the peer is seen, the candidate, whether it is tried
ROWS = [
    ("another port of where the peer is seen", YOU, PEER, "203.0.113.2:4001", True),
    ("a third machine", YOU, PEER, "198.51.100.7:443", False),
    ("a private address in a network of ours", YOU, PEER, "10.1.0.7:4001", True),
    ("a private address of somebody else's network", YOU, PEER, "192.168.1.7:4001", False),
    ("a private address, both behind one NAT", YOU, "203.0.113.1:5", "192.168.1.7:4001", True),
    ("carrier-grade NAT's own network", YOU, PEER, "100.64.1.2:4001", False),
    ("loopback", YOU, PEER, "127.0.0.1:22", False),
    ("link-local", YOU, PEER, "169.254.169.254:80", False),
    ("link-local IPv6", YOU, PEER, "[fe80::1]:80", False),
    ("multicast", YOU, PEER, "224.0.0.251:5353", False),
    ("nowhere", YOU, PEER, "0.0.0.0:4001", False),
    ("no port", YOU, PEER, "203.0.113.2:0", False),
    ("the VPN itself", YOU, PEER, "10.86.0.7:4001", False),
    ("IPv6 that nobody has seen", YOU, PEER, "[2001:db8::7]:40001", True),
]


@pytest.mark.parametrize(("what", "you", "peer", "candidate", "tried"), ROWS, ids=[row[0] for row in ROWS])
def test_a_candidate_is_tried_if_it_could_be_the_peers_own(
    what: str, you: str, peer: str, candidate: str, tried: bool
) -> None:
    found = paths.to_punch(parse(you), parse(peer), [parse(candidate)], LOCAL, VPN)
    assert found == [parse(peer), parse(candidate)] if tried else found == [parse(peer)]


def test_of_what_nobody_has_seen_there_is_little() -> None:
    many = [parse(f"[2001:db8::{place}]:1") for place in range(1, 9)]
    assert len(paths.to_punch(parse(YOU), parse(PEER), many, LOCAL, VPN)) == 1 + paths.MAX_UNSEEN


@pytest.mark.parametrize("peer", ["127.0.0.1:1", "10.86.0.1:1", "169.254.0.1:1", "224.0.0.1:1"])
def test_also_a_relay_cannot_send_us_anywhere(peer: str) -> None:
    assert paths.to_punch(parse(YOU), parse(peer), [], LOCAL, VPN) == []
