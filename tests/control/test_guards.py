"""Each guard around py-libp2p, with it and without it: a guard that is not needed any more shows here too."""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
import trio.testing
from control_nodes import Node, eventually, offered, options, running
from libp2p.abc import INetStream
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import PingService
from libp2p.network.stream.exceptions import StreamEOF, StreamReset
from libp2p.rcmgr.manager import ResourceManager
from libp2p.utils import encode_delim

from vpnd.adapter import dial, guards, host, noise, transport
from vpnd.adapter.arrivals import Arrival, source_of
from vpnd.adapter.dial import DialError

PROTOCOL = "/test/1"
Monkey = pytest.MonkeyPatch


INSECURE = ("/plaintext/2.0.0", "/secio/1.0.0", "/tls/1.0.0")


@pytest.mark.parametrize("guarded", [True, False])
def test_nothing_but_noise_is_offered(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        stock = host.new_host
        monkeypatch.setattr(host, "new_host", lambda **settings: stock(**settings | {"sec_opt": None}))

    async def main() -> None:
        node = Node()
        async with running(node):
            assert await offered(node, "/noise")
            assert any([await offered(node, protocol) for protocol in INSECURE]) != guarded

    trio.run(main)


@pytest.mark.parametrize("guarded", [True, False])
def test_strangers_are_refused_before_the_muxer(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(
            noise.MembersOnlyNoise, "secure_inbound", lambda own, conn: own._shake_hands_untrusted(conn, None)
        )
        monkeypatch.setattr(host.Desk, "install", lambda desk, swarm: None)

    async def main() -> None:
        stranger, node = Node(), Node(members=set())
        async with running(stranger, node):
            if not guarded:
                (await stranger.host.dial(node.address, node.peer_id)).close()
                assert len(node.taken) == 1
                return
            with pytest.raises(DialError, match="does the other node list this one"):
                await stranger.host.dial(node.address, node.peer_id)
            assert not node.taken
            assert node.counts == {"refused_unknown_peer": 1}

    trio.run(main)


@pytest.mark.parametrize("guarded", [True, False])
def test_reconnects_give_their_slots_back(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(guards.InboundGate, "install", lambda gate: None)
    rounds = 12

    async def main() -> None:
        a, b = Node(), Node()
        async with running(a, b):
            limiter = b.host.swarm._inbound_limiter
            for _ in range(rounds):
                connection = await a.connect(b)
                await connection.close()
            if guarded:
                await eventually(lambda: limiter.borrowed_tokens == 0)
                await eventually(lambda: b.connections == 0)
            else:
                await trio.sleep(0.3)
                assert limiter.borrowed_tokens == rounds

    trio.run(main)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_failing_stream_handler_ends_its_stream_alone(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(host, "contained", lambda handler, **limits: handler)

    async def fails(stream: INetStream) -> None:
        raise RuntimeError("on purpose")

    async def main() -> None:
        a, b = Node(), Node()
        async with running(a, b):
            b.host.serve(PROTOCOL, fails, math.inf)
            await a.connect(b)
            for _ in range(3):
                with (
                    contextlib.suppress(Exception),
                    trio.fail_after(2.0),
                ):  # whichever
                    stream = await a.host.libp2p.new_stream(b.id, [PROTOCOL])
                    await stream.write(b"x")
                    await stream.read(1)
            assert b.counts["handler_errors"] == 3
            assert await PingService(a.host.libp2p).ping(b.id, 1), "the connection is as good as before"

    if guarded:
        trio.run(main)
    else:
        with pytest.raises(BaseException) as caught:
            trio.run(main)
        assert "on purpose" in "".join(describe(caught.value))


def describe(error: BaseException) -> list[str]:
    """The texts of an exception and of those it groups."""
    if isinstance(error, BaseExceptionGroup):
        return [text for inner in error.exceptions for text in describe(inner)]
    return [str(error)]


def test_a_handler_that_never_ends_is_ended_by_its_deadline() -> None:
    async def main() -> None:
        a, b = Node(), Node()
        async with running(a, b):
            b.host.serve(PROTOCOL, lambda stream: trio.sleep_forever(), 0.1)
            await a.connect(b)
            await a.host.libp2p.new_stream(b.id, [PROTOCOL])
            await eventually(lambda: b.counts["handler_errors"] == 1)

    trio.run(main)


@pytest.mark.parametrize("guarded", [True, False])
def test_after_the_end_the_port_is_closed(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:

        async def nothing(self: BasicHost) -> None:
            pass

        monkeypatch.setattr(BasicHost, "close", nothing)

    async def main() -> None:
        a, b = Node(), Node()
        async with running(b):
            port = b.port
            async with running(a):
                connection = await a.connect(b)
                port = a.port
            if guarded:
                assert connection.is_closed
                with pytest.raises(OSError):
                    await trio.open_tcp_stream("127.0.0.1", port)
            else:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()

    trio.run(main)


@contextlib.asynccontextmanager
async def silent(first_words: bytes) -> AsyncIterator[str]:
    """A listener that says `first_words` to whoever comes, and then nothing."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(first_words)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield f"/ip4/127.0.0.1/tcp/{port}"
        nursery.cancel_scope.cancel()


@pytest.mark.setting("p2p.dial_timeout")
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize(
    "first_words",
    [b"", encode_delim(b"/multistream/1.0.0") + encode_delim(b"/noise")],
    ids=["at once", "after /noise"],
)
def test_a_dial_to_a_silent_listener_ends(first_words: bytes, guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(dial.trio, "fail_after", lambda seconds: contextlib.nullcontext())

    async def main() -> None:
        node = Node(dial_timeout=0.3)
        async with running(node), silent(first_words) as address:
            if guarded:
                with (
                    trio.move_on_after(5) as patience,
                    pytest.raises(DialError, match="no answer within 0.3 s"),
                ):
                    await node.host.dial(address, node.peer_id)
                assert not patience.cancelled_caught
            else:
                with trio.move_on_after(1.5) as patience:
                    await node.host.dial(address, node.peer_id)
                assert patience.cancelled_caught

    trio.run(main)


def test_other_deadlines_hold_for_the_next_dial() -> None:
    async def main() -> None:
        node = Node(dial_timeout=60.0)
        async with running(node), silent(b"") as address:
            config = node.live.config
            p2p = msgspec.structs.replace(config.p2p, dial_timeout=0.3)
            node.live.take(msgspec.structs.replace(config, p2p=p2p))
            with trio.fail_after(5), pytest.raises(DialError, match=r"no answer within 0\.3 s"):
                await node.host.dial(address, node.peer_id)

    trio.run(main)


@pytest.mark.setting("session.user_timeout", "p2p.keepalive_interval")
@pytest.mark.parametrize("guarded", [True, False])
def test_sockets_notice_a_vanished_peer(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(transport.WatchfulTcp, "watch", lambda tcp, stream: None)

    async def main() -> None:
        a, b = Node(keepalive_interval=2.0), Node(keepalive_interval=2.0)
        async with running(a, b):
            session = await a.host.dial(b.address, b.peer_id)
            expected = {"user_timeout_ms": 7000, "keepalive": 1, "keepalive_s": 2, "nodelay": 1}
            assert (options(session.fd) == expected) == guarded, "on the dialing side"
            assert (b.options == expected) == guarded, "on the listening side"
            session.close()

    trio.run(main)


@pytest.mark.setting("p2p.max_connections_per_peer")
@pytest.mark.parametrize("guarded", [True, False])
def test_refused_connections_do_not_use_up_the_host(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(host, "_unlimited_resources", ResourceManager)
    limit = 3 if guarded else 100  # without, libp2p's own limit per peer is what refuses

    async def main() -> None:
        a, b = Node(max_connections_per_peer=100), Node(max_connections_per_peer=limit)
        async with running(a, b):
            resources = b.host.swarm._resource_manager
            for _ in range(10):
                with contextlib.suppress(Exception):
                    await a.connect(b)
            if guarded:
                await eventually(lambda: b.host.connections() == limit)
                assert b.counts["refused_connection_limit"] == 10 - limit
            for connection in a.host.swarm.get_connections():
                await connection.close()
            with trio.move_on_after(3 if guarded else 1):
                while b.host.connections() or resources._current_connections:
                    await trio.sleep(0.02)
            assert (resources._current_connections == 0) == guarded

    trio.run(main)


def test_a_member_may_reconnect_as_often_as_it_likes() -> None:
    """A connection that has ended does not count, though libp2p lists it a while longer."""
    rounds, limit = 40, 3

    async def main() -> None:
        a, b = Node(), Node(max_connections_per_peer=limit)
        async with running(a, b), trio.open_nursery() as nursery:
            for _ in range(rounds):
                connection = await a.connect(b)
                assert await PingService(a.host.libp2p).ping(b.id, 1)
                nursery.start_soon(connection.close)
                await trio.sleep(0.01)
            assert b.counts["refused_connection_limit"] == 0

    trio.run(main)


def test_libp2p_dials_nobody_by_itself() -> None:
    async def main() -> None:
        node = Node()
        async with running(node):
            assert node.host.swarm.auto_connector._started is False
            assert node.host.libp2p.mDNS is None
            assert node.host.libp2p.upnp is None

    trio.run(main)


@pytest.mark.setting("p2p.max_inbound_handshakes")
@pytest.mark.parametrize("guarded", [True, False])
def test_half_open_connections_do_not_keep_a_member_out(guarded: bool, monkeypatch: Monkey) -> None:
    if not guarded:
        monkeypatch.setattr(guards.InboundGate, "install", lambda gate: None)
        stock = host.ConnectionConfig
        monkeypatch.setattr(
            host,
            "ConnectionConfig",
            lambda **settings: stock(**settings | {"max_connections": 20, "high_watermark": 20}),
        )

    async def main() -> None:
        member, node = Node(), Node(max_inbound_handshakes=20)
        async with running(member, node):
            flood = [await trio.open_tcp_stream("127.0.0.1", node.port) for _ in range(200)]
            if guarded:
                (await member.host.dial(node.address, node.peer_id)).close()
                assert node.counts["refused_handshake_limit"] >= 180
                await eventually(lambda: node.counts["handshake_failures"] == 200)  # the rest by the deadline
                assert node.host.swarm._inbound_limiter.borrowed_tokens == 0
            else:
                with pytest.raises(DialError):
                    await member.host.dial(node.address, node.peer_id)
            for stream in flood:
                await stream.aclose()

    trio.run(main)


@pytest.mark.setting("p2p.handshake_timeout")
def test_who_says_nothing_is_closed_in_time() -> None:
    async def main() -> None:
        node = Node(handshake_timeout=0.3)
        async with running(node):
            stream = await trio.open_tcp_stream("127.0.0.1", node.port)
            with trio.fail_after(2.0):
                while await stream.receive_some():
                    pass

    trio.run(main)


@pytest.mark.setting("p2p.stream_timeout")
def test_a_stream_of_the_library_that_says_nothing_is_ended_in_time() -> None:
    async def main() -> None:
        member, node = Node(), Node(stream_timeout=0.3)
        async with running(member, node):
            stream = await member.host.open_stream((node.address,), node.peer_id, "/ipfs/id/push/1.0.0")
            with trio.fail_after(2.0), contextlib.suppress(StreamReset, StreamEOF):
                while await stream.read(1):
                    pass

    trio.run(main)


@pytest.mark.parametrize(("listen", "ip"), [("/ip4/127.0.0.1/tcp/0", "127.0.0.1"), ("/ip6/::1/tcp/0", "::1")])
def test_all_that_wait_come_in_at_once_and_what_is_too_much_never_does(
    listen: str, ip: str, monkeypatch: Monkey
) -> None:
    """The loop has one turn, and the kernel a queue."""
    most, came = 20, list[str]()

    async def handle(gate: guards.InboundGate, arrival: Arrival, *_: object) -> None:
        came.append(arrival.source)
        await trio.sleep_forever()

    monkeypatch.setattr(guards.InboundGate, "handle", handle)

    async def main() -> None:
        node = Node(listen=listen, max_connects_per_source=most)
        async with running(node):
            with contextlib.ExitStack() as flood:
                for _ in range(100):  # no checkpoint: all of them wait when the loop has its turn
                    flood.enter_context(socket.create_connection((ip, node.port)))
                await trio.testing.wait_all_tasks_blocked(0.1)
                assert came == [source_of(ip)] * most
                assert node.counts["refused_connect_rate"] == 100 - most

    trio.run(main)


@pytest.mark.setting("p2p.max_handshakes_per_peer")
def test_a_member_that_connects_without_end_is_refused_and_others_are_not() -> None:
    most = 8

    async def main() -> None:
        often, other = Node(), Node()
        node = Node(max_handshakes_per_peer=most, max_sessions_per_peer=most)
        async with running(often, other, node):
            for _ in range(most):
                (await often.host.dial(node.address, node.peer_id)).close()
            with pytest.raises(DialError):
                await often.host.dial(node.address, node.peer_id)
            assert len(node.taken) == most
            assert node.counts["refused_handshake_rate"] == 1
            assert node.host.coming.refused(often.peer_id) == 1
            assert node.counts["handshake_failures"] == node.counts["refused_unknown_peer"] == 0
            await trio.sleep(1.0)  # its source, which is the other's here, gets in once a second
            (await other.host.dial(node.address, node.peer_id)).close()

    trio.run(main)
