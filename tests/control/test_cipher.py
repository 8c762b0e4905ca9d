"""Which cipher two nodes agree on, and that the keys both ends then hold carry data."""

from __future__ import annotations

import pytest
import trio
from control_harness import ControlProcess, FakeShard, Identity, config, free_port, peer
from control_nodes import Node, running

from vpnd.adapter import muxer
from vpnd.session import AESGCM, CHACHAPOLY

AGREED = [
    ("both can do it in hardware", AESGCM, AESGCM, AESGCM),
    ("neither wants it", CHACHAPOLY, CHACHAPOLY, CHACHAPOLY),
    ("the one that dials knows only the handshake's", CHACHAPOLY, AESGCM, CHACHAPOLY),
    ("the one that is dialed knows only the handshake's", AESGCM, CHACHAPOLY, CHACHAPOLY),
]


@pytest.mark.setting("session.cipher")
@pytest.mark.parametrize(("why", "dialer", "listener", "agreed"), AGREED, ids=[row[0] for row in AGREED])
def test_two_hosts_agree_on_the_best_both_have(why: str, dialer: str, listener: str, agreed: str) -> None:
    async def main() -> None:
        a, b = Node(cipher=dialer), Node(cipher=listener)
        async with running(a, b):
            detached = await a.host.dial(b.address, b.peer_id)
            detached.close()
            mine = detached.session
            yours = b.taken[0]
            assert (mine.cipher, yours.cipher) == (agreed, agreed)
            assert (mine.send_key, mine.receive_key) == (yours.receive_key, yours.send_key)
            assert (mine.send_nonce, mine.receive_nonce) == (yours.receive_nonce, yours.send_nonce)
            assert mine.send_key != mine.receive_key
            # A derived key has sealed nothing yet; the handshake's has sealed the negotiation.
            assert (mine.send_nonce == 0) is (agreed == AESGCM)

    trio.run(main)


@pytest.mark.root
@pytest.mark.parametrize(("why", "dialer", "listener", "agreed"), AGREED, ids=[row[0] for row in AGREED])
def test_what_is_agreed_carries_data_between_two_controls(
    why: str, dialer: str, listener: str, agreed: str
) -> None:
    a_identity, b_identity = Identity.pair()
    a_port, b_port = free_port(), free_port()
    with (
        ControlProcess(b_identity, config(b_port, peer("a", a_identity, 1), cipher=listener)) as b,
        ControlProcess(a_identity, config(a_port, peer("b", b_identity, 2, b_port), cipher=dialer)) as a,
    ):
        a.ready()
        b.ready()
        a_shard, b_shard = FakeShard(0), FakeShard(0)
        b.add_shard(b_shard)
        a.add_shard(a_shard)
        a_session, b_session = a_shard.session(), b_shard.session()
        assert (a_session.state.cipher, b_session.state.cipher) == (agreed, agreed)
        a_session.send(b"from a")
        b_session.send(b"from b")
        assert (b_session.receive(), a_session.receive()) == (b"from a", b"from b")


def test_a_derived_key_is_the_same_at_both_ends_and_never_the_one_it_comes_from() -> None:
    key, other = bytes(range(32)), bytes(32)
    assert muxer.derive(key) == muxer.derive(key)
    assert len(muxer.derive(key)) == 32
    assert len({key, other, muxer.derive(key), muxer.derive(other)}) == 4


def test_no_two_sessions_have_a_key_in_common() -> None:
    """Neither of one pair of nodes, nor with what the same identities made before: they come of the handshake alone."""

    async def main() -> None:
        keys: set[bytes] = set()
        a, b = Node(), Node()
        async with running(a, b):
            for _ in range(3):
                (detached := await a.host.dial(b.address, b.peer_id)).close()
                keys |= {detached.session.send_key, detached.session.receive_key}
        assert len(keys) == 6

    trio.run(main)


CPUS = [
    ("x86-64 with both", "processor\t: 0\nflags\t\t: fpu aes sse2 pclmulqdq\n", True),
    ("x86-64 without the multiplication", "flags\t\t: fpu aes sse2\n", False),
    ("x86-64 without AES", "flags\t\t: fpu pclmulqdq sse2\n", False),
    ("flags that only begin alike", "flags\t\t: aesni pclmulqdqx\n", False),
    ("ARMv8 with the cryptography extension", "Features\t: fp asimd aes pmull sha1\n", True),
    ("ARMv8 without it", "Features\t: fp asimd\n", False),
    ("a word elsewhere in the file", "model name\t: aes pclmulqdq\nflags\t: fpu\n", False),
    ("a processor that lists nothing", "", False),
]


@pytest.mark.parametrize(("what", "cpuinfo", "fast"), CPUS, ids=[row[0] for row in CPUS])
def test_the_processor_is_asked(what: str, cpuinfo: str, fast: bool) -> None:
    assert muxer.has_aes(cpuinfo) is fast


@pytest.mark.parametrize(("setting", "most"), [(AESGCM, 2), (CHACHAPOLY, 1)])
def test_every_node_offers_the_handshakes_cipher_last(setting: str, most: int) -> None:
    ciphers = muxer.offered(setting)
    assert ciphers[-1] == CHACHAPOLY and len(ciphers) == most
