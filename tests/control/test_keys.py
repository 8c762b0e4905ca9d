"""Wherever a key of another kind comes from, it is refused before it is decoded: decoding one takes seconds."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import multihash
import pytest
import trio
from control_nodes import Node, running
from lab.stranger import NOISE, RSA, Plain, Refused, Secured, field, public_key, rsa_bomb, with_key
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.peer.envelope import unmarshal_envelope
from libp2p.peer.id import ID

from vpnd.adapter.dial import DialError
from vpnd.adapter.noise import BadHandshake, ed25519_only, identity_untrusted

BOMB = public_key(RSA, rsa_bomb(60_000))
SOON_S = 0.1


@contextlib.contextmanager
def soon() -> Iterator[None]:
    start = time.thread_time()  # the CPU's, for other programs may have it meanwhile
    yield
    assert time.thread_time() - start < SOON_S


ENTRIES = {
    "a key": lambda: deserialize_public_key(BOMB),
    "a signed envelope": lambda: unmarshal_envelope(field(1, BOMB) + field(2, b"\x03\x01") + field(3, b"x")),
    "a handshake": lambda: identity_untrusted(field(1, BOMB) + field(2, bytes(64))),
}


@pytest.mark.parametrize("decode", ENTRIES.values(), ids=ENTRIES)
def test_it_is_refused(decode) -> None:
    ed25519_only()
    with soon(), pytest.raises((ValueError, BadHandshake)):
        decode()


def test_a_peer_id_that_holds_one_has_no_key() -> None:
    ed25519_only()
    peer_id = ID(multihash.encode(public_key(RSA, rsa_bomb(100)), 0))
    assert peer_id.extract_public_key() is None


@contextlib.contextmanager
def false_listener() -> Iterator[int]:
    """Something that a member is said to listen at, and that answers with such a key; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(Refused):
                Plain(sock).serve(NOISE)
                Secured(sock, with_key(RSA, rsa_bomb(700)), initiator=False)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def test_who_is_dialed_shows_one_in_vain() -> None:
    node = Node()

    async def main() -> None:
        async with running(node):
            with false_listener() as port, pytest.raises(DialError, match="not an ed25519 key"):
                with trio.fail_after(1.0):
                    await node.host.dial(f"/ip4/127.0.0.1/tcp/{port}", node.peer_id)

    trio.run(main)
