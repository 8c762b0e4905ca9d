"""Sessions taken out of libp2p, beside connections that stay in it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from control_nodes import Node, eventually, running
from libp2p.host.ping import PingService
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP
from libp2p.utils import encode_delim
from multiaddr import Multiaddr
from noise.connection import NoiseConnection

from vpnd.adapter import dial, host, shape, transport
from vpnd.adapter.addresses import parse_endpoint
from vpnd.adapter.dial import DialError
from vpnd.adapter.muxer import SESSION_MUXERS
from vpnd.errors import ChildError
from vpnd.session import AESGCM, CHACHAPOLY


def test_sessions_and_ordinary_connections_share_the_port() -> None:
    async def main() -> None:
        a, b = Node(), Node()
        async with running(a, b):
            connection = await a.connect(b)
            assert b.connections == 1
            detached = await a.host.dial(b.address, b.peer_id)
            session = detached.session
            assert (session.send_key, session.receive_key) == (b.taken[0].receive_key, b.taken[0].send_key)
            assert (session.send_nonce, session.receive_nonce) == (
                b.taken[0].receive_nonce,
                b.taken[0].send_nonce,
            )
            assert session.send_key != session.receive_key
            assert repr(session.send_key) not in repr(detached)
            detached.close()
            assert await PingService(a.host.libp2p).ping(b.id, 2)
            await eventually(lambda: bool(a.host.libp2p.get_peerstore().get_protocols(b.id)))
            assert "/ipfs/id/1.0.0" in a.host.libp2p.get_peerstore().get_protocols(b.id)
            await connection.close()
            await eventually(lambda: b.connections == 0)

    trio.run(main)


def test_a_host_lets_go_of_one_peer_and_keeps_the_others() -> None:
    async def main() -> None:
        a, b, c = Node(), Node(), Node()
        async with running(a, b, c):
            await a.connect(b)
            await c.connect(b)
            await a.host.disconnect(c.peer_id)
            await b.host.disconnect(a.peer_id)
            await eventually(lambda: (a.connections, b.connections, c.connections) == (0, 1, 1))

    trio.run(main)


def test_what_was_read_too_far_is_handed_over() -> None:
    async def main() -> None:
        a, b = Node(), Node()
        async with running(a, b):
            raw = await a.host._tcp.dial(Multiaddr(b.address))
            session = await a.host.swarm.upgrader.upgrade_security(raw, True, b.id)
            await MultiselectClient().handshake(MultiselectCommunicator(session))
            await session.write(encode_delim(SESSION_MUXERS[CHACHAPOLY].encode()) + b"early data")
            await eventually(lambda: len(b.taken) == 1)
            assert b.taken[0].leftover == b"early data"
            assert b.taken[0].receive_nonce == a_nonce(session)
            transport.close_now(raw)

    def a_nonce(session: Any) -> int:
        return int(session.conn.noise_state.noise_protocol.cipher_state_encrypt.n)

    trio.run(main)


def test_keys_of_another_cipher_are_not_taken_over_from_what_came_too_early() -> None:
    """A peer that speaks before the answer has sealed that with the handshake's cipher: no state to go on with."""

    async def main() -> None:
        a, b = Node(), Node(cipher=AESGCM)
        async with running(a, b):
            raw = await a.host._tcp.dial(Multiaddr(b.address))
            session = await a.host.swarm.upgrader.upgrade_security(raw, True, b.id)
            await MultiselectClient().handshake(MultiselectCommunicator(session))
            await session.write(encode_delim(SESSION_MUXERS[AESGCM].encode()) + b"early data")
            with trio.fail_after(5.0), contextlib.suppress(Exception):
                while await session.read(1024):
                    pass
            assert not b.taken
            transport.close_now(raw)
            (await a.host.dial(b.address, b.peer_id)).close()
            assert len(b.taken) == 1

    trio.run(main)


def test_three_hundred_sessions_leave_nothing_behind() -> None:
    async def main() -> None:
        a, b = Node(), Node(max_connects_per_source=1000)
        async with running(a, b):
            (await a.host.dial(b.address, b.peer_id)).close()
            await trio.sleep(0.05)
            before = (len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living)
            for _ in range(300):
                (await a.host.dial(b.address, b.peer_id)).close()
            assert len(b.taken) == 301
            await eventually(
                lambda: (
                    (len(os.listdir("/proc/self/fd")), trio.lowlevel.current_statistics().tasks_living)
                    == before
                )
            )
            assert b.host.swarm._inbound_limiter.borrowed_tokens == 0
            assert b.host.swarm._resource_manager._current_connections == 0
            assert not b.counts

    trio.run(main)


def test_a_connection_without_a_socket_is_not_taken() -> None:
    class Relayed:
        pass

    async def main() -> None:
        node = Node()
        async with running(node):
            with pytest.raises(host.NotDetachable):
                node.host._session_muxer(CHACHAPOLY, RawConnection(Relayed(), False), node.id)  # type: ignore[arg-type]
            assert not node.taken

    trio.run(main)


def twice(connection: NoiseConnection, data: bytes) -> Any:
    """A Noise library that counts otherwise."""
    cipher = connection.noise_protocol.cipher_state_encrypt
    return [cipher.encrypt_with_ad(None, data) for _ in range(2)][0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: m.setattr(shape, "SUPPORTED_RELEASES", "0.9."), "vpnd needs 0.9"),
        (lambda m: m.setattr(shape, "SIGNATURES", ((TCP.dial, ("self", "address")),)), "TCP.dial takes"),
        (lambda m: m.setattr(shape, "ATTRIBUTES", ((Yamux, ("event_ended",)),)), "Yamux has no event_ended"),
        (lambda m: m.setattr(NoiseConnection, "encrypt", twice), "do not hold each other's keys"),
    ],
    ids=["release", "signature", "attribute", "keys"],
)
def test_another_libp2p_is_refused_with_a_sentence(
    spoil: Callable[[pytest.MonkeyPatch], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape.check_libp2p()
    spoil(monkeypatch)
    with pytest.raises(ChildError, match=said):
        shape.check_libp2p()


@pytest.mark.setting("p2p.connect_timeout")
def test_an_address_that_does_not_answer_costs_a_dial_connect_timeout_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A socket whose queue of connections is full drops the next SYN, like a black hole."""

    async def main() -> None:
        a, b = Node(connect_timeout=0.2), Node()
        with socket.socket() as hole, contextlib.ExitStack() as filling:
            hole.bind(("127.0.0.1", 0))
            hole.listen(0)
            port = hole.getsockname()[1]
            for _ in range(2):
                filler = filling.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            silent = f"/ip4/127.0.0.1/tcp/{port}"
            async with running(a, b):
                begun_s = trio.current_time()
                with pytest.raises(DialError, match=r"no connection within 0\.2 s"):
                    await a.host.dial(silent, b.peer_id)
                assert 0.2 <= trio.current_time() - begun_s < 5.0

                async def two(text: str) -> list[Any]:
                    return [parse_endpoint(silent), parse_endpoint(b.address)]

                monkeypatch.setattr(dial, "resolve", two)
                (await a.host.dial("/dns/b/tcp/1", b.peer_id)).close()
                assert len(b.taken) == 1, "the second endpoint behind a name has its turn"

    trio.run(main)


def test_addresses_of_a_peer_are_raced_with_a_head_start() -> None:
    class Won:
        def __init__(self, address: str) -> None:
            self.address = address

        def close(self) -> None:
            pytest.fail("the winner was closed")

    started: list[tuple[str, float]] = []

    async def attempt(address: str) -> Any:
        started.append((address, trio.current_time()))
        kind, _, seconds = address.partition(":")
        await trio.sleep(float(seconds))
        if kind == "bad":
            raise DialError(f"{address} refused")
        return Won(address)

    async def main() -> None:
        begun_s = trio.current_time()
        won: Any = await dial.dial_any(attempt, ("bad:0", "good:60", "good:1", "good:0"), 5.0)
        assert won.address == "good:1"
        assert [(address, at_s - begun_s) for address, at_s in started] == [
            ("bad:0", 0),
            ("good:60", 0),
            ("good:1", 5),
        ]
        with pytest.raises(DialError, match="bad:0 refused; bad:1 refused"):
            await dial.dial_any(attempt, ("bad:0", "bad:1"), 5.0)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
