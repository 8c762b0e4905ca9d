"""A member against the libp2p part of another: what it says there costs control little, and others nothing."""

from __future__ import annotations

import time
from statistics import mean

import pytest
from attack_tools import (
    ATTACK_S,
    assert_unharmed,
    beside,
    dialed,
    knock,
    say,
    stranger_of,
)
from lab import Node
from lab.stranger import NOISE, Plain, Secured, honest
from libp2p.identity.identify.pb.identify_pb2 import Identify

from vpnd import identity

pytestmark = [pytest.mark.root, pytest.mark.alone]  # round trips are compared

#: By how much longer control may keep others waiting meanwhile, on average; and how many messages come at once.
LONGER_S = 0.05
AT_ONCE = 24
KNOCKS = 5
PUSH = "/ipfs/id/push/1.0.0"


def address(number: int) -> bytes:
    """/ip4/192.0.x.y/tcp/4001"""
    return b"\x04\xc0\x00" + number.to_bytes(2, "big") + b"\x06\x0f\xa1"


#: Each costs libp2p a tenth of a second.
MESSAGES = (
    Identify(listen_addrs=map(address, range(1000))).SerializeToString(),
    Identify(protocols=[f"/{number:x}" for number in range(30_000)]).SerializeToString(),
)


def test_what_a_member_says_of_itself_holds_up_nobody(nodes: list[Node]) -> None:
    a, b, c = nodes
    key, source = identity.read_private(c.state_dir / "identity.pem"), stranger_of(a)
    c.stop()
    waits, before = [], [knock(source, b) for _ in range(KNOCKS)]
    with beside(a, b) as during:
        end = time.monotonic() + ATTACK_S
        while time.monotonic() < end:
            with dialed(c.namespace, b) as sock:
                Plain(sock).select(NOISE)
                member = Secured(sock, honest(key), initiator=True)
                member.select("/yamux/1.0.0")
                for number in range(AT_ONCE):
                    say(member, 2 * number + 1, PUSH, MESSAGES[number % len(MESSAGES)])
                waits += [knock(source, b) for _ in range(KNOCKS)]
    assert mean(waits) < mean(before) + LONGER_S
    assert_unharmed(during)
