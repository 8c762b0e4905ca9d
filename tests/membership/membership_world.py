"""A network in a test: deterministic keys, peer ids and authorities, and directories with round settings."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from vpnd import peerid
from vpnd.membership import network
from vpnd.membership.authority import Authority, Wish
from vpnd.membership.directory import Directory
from vpnd.membership.refusal import REASONS, MembershipRefused
from vpnd.membership.statements import Membership, Presence, Statement, parse_untrusted, sign

NOW = 1_800_000_000_000
SKEW = 300_000
DAY = 86_400_000
LIFETIME = 30 * DAY
FORGET = 30 * DAY


def key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())


def public(name: str) -> bytes:
    return key(name).public_key().public_bytes_raw()


def peer(name: str) -> str:
    return peerid.from_public_key(public(name))


NETWORK = network.create("home", public("root"), "10.86.0.0/16")


def directory(parse=parse_untrusted, max_members: int = 10_000, of=NETWORK) -> Directory:
    return Directory(of, skew_ms=SKEW, forget_ms=FORGET, max_members=max_members, parse=parse)


def membership(member: str, signer: str = "root", **changes) -> Statement:
    """A membership of `member`, valid at NOW; `changes` are fields."""
    issued_ms = changes.get("issued_ms", NOW)
    fields = {
        "network": NETWORK.id,
        "signer": public(signer),
        "peer_id": peer(member),
        "name": member,
        "addresses": (f"10.86.{hashlib.sha256(member.encode()).digest()[0]}.{1 + len(member)}",),
        "routes": (),
        "groups": (),
        "enrolled_ms": min(issued_ms, NOW),
        "issued_ms": issued_ms,
        "expires_ms": issued_ms + LIFETIME,
    }
    return sign(key(signer), Membership(**(fields | changes)))


def presence(
    name: str,
    at_ms: int = NOW,
    address: str = "/ip4/192.0.2.1/tcp/4001",
    routes: tuple[str, ...] = (),
) -> Statement:
    body = Presence(NETWORK.id, peer_id=peer(name), addresses=(address,), sequence_ms=at_ms, routes=routes)
    return sign(key(name), body)


class World:
    """One directory and the authorities that work on it; every statement is merged at once, and kept in `said`."""

    def __init__(self) -> None:
        self.directory = directory()
        self.root = self.authority("root")
        self.said: list[Statement] = []
        self.put(self.root.found(peer("root"), NOW))

    def authority(self, name: str) -> Authority:
        return Authority(key(name), self.directory, lifetime_ms=LIFETIME)

    def put(self, *statements: Statement, now_ms: int = NOW):
        self.said += statements
        merged = self.directory.merge([statement.wire for statement in statements], now_ms)
        assert not merged.refused
        return merged

    def enrol(self, name: str, by: str = "root", now_ms: int = NOW, **wish) -> Membership:
        statement = self.authority(by).enrol(peer(name), Wish(name=wish.pop("called", name), **wish), now_ms)
        self.put(statement, now_ms=now_ms)
        return statement.body

    def grant(self, name: str, by: str = "root", now_ms: int = NOW) -> Authority:
        self.put(self.authority(by).grant(public(name), peer(name), now_ms), now_ms=now_ms)
        return self.authority(name)


def reason(call, *arguments, **options) -> str:
    with pytest.raises(MembershipRefused) as caught:
        call(*arguments, **options)
    assert caught.value.reason in REASONS
    return caught.value.reason


def reasons(merged) -> list[str]:
    return [refused.reason for refused in merged.refused]
