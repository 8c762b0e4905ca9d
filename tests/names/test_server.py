"""Names over real sockets on loopback, with clients of every kind."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import dns.asyncquery
import dns.flags
import dns.message
import dns.rcode
import pytest
import trio
import trio.testing
from names_tools import make_zone, rows

from vpnd.config.schema import Dns
from vpnd.control.dns_service import NameServer

A = {"a.home.vpn. A 10.86.0.1"}
QUERY = dns.message.make_query("a.home.vpn.", "A").to_wire()
FRAMED = len(QUERY).to_bytes(2, "big") + QUERY
LONG_S = 20.0


class Served(NamedTuple):
    host: str
    port: int
    counts: Counter[str]


def serve(test: Callable[[Served], Awaitable[None]], host: str = "127.0.0.1", zone=None, **settings) -> None:
    """Run `test` beside a server; nothing of the server is left behind."""

    async def main() -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tcp = socket.socket(family, socket.SOCK_STREAM)
        tcp.bind((host, 0))
        udp = socket.socket(family, socket.SOCK_DGRAM)
        udp.bind((host, tcp.getsockname()[1]))
        counts: Counter[str] = Counter()
        server = NameServer(zone or make_zone(), Dns(**settings), lambda name: counts.update([name]))
        with trio.fail_after(LONG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.run, [udp], [tcp])
                await trio.testing.wait_all_tasks_blocked()
                await test(Served(host, tcp.getsockname()[1], counts))
                nursery.cancel_scope.cancel()
        assert udp.fileno() == -1 and tcp.fileno() == -1, "its sockets are closed"
        assert not server._connections and not server._per_client

    trio.run(main)


async def connect(served: Served) -> trio.SocketStream:
    return await trio.open_tcp_stream(served.host, served.port)


async def good_answer(served: Served) -> None:
    query = dns.message.from_wire(QUERY)
    for ask in (dns.asyncquery.udp, dns.asyncquery.tcp):
        got = await ask(query, served.host, timeout=LONG_S, port=served.port)
        assert rows(got.answer) == A


async def closed_by_server(stream: trio.SocketStream) -> bool:
    try:
        return await stream.receive_some() == b""
    except trio.BrokenResourceError:
        return True


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_udp_and_tcp_answer(host: str) -> None:
    async def test(served: Served) -> None:
        await good_answer(served)
        assert served.counts == {"dns_queries": 2}

    serve(test, host)


def test_what_is_cut_over_udp_is_whole_over_tcp() -> None:
    async def test(served: Served) -> None:
        query = dns.message.make_query("many.home.vpn.", "A")
        short = await dns.asyncquery.udp(query, served.host, timeout=LONG_S, port=served.port)
        assert short.flags & dns.flags.TC
        whole = await dns.asyncquery.tcp(query, served.host, timeout=LONG_S, port=served.port)
        assert len(rows(whole.answer)) == 200

    serve(test)


def test_queries_come_in_any_pieces_and_several_at_once() -> None:
    async def test(served: Served) -> None:
        stream = await connect(served)
        for byte in FRAMED:
            await stream.send_all(bytes([byte]))
        await stream.send_all(FRAMED * 3 + FRAMED[:5])
        await stream.send_all(FRAMED[5:])
        received = b""
        for _ in range(5):
            while len(received) < 2 or len(received) < 2 + int.from_bytes(received[:2], "big"):
                received += await stream.receive_some()
            end = 2 + int.from_bytes(received[:2], "big")
            assert rows(dns.message.from_wire(received[2:end]).answer) == A
            received = received[end:]
        await stream.aclose()

    serve(test)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\0\0", id="an empty message"),
        pytest.param(b"\0\5hello", id="less than a header"),
        pytest.param(b"\xff\xff" + bytes(100), id="a message longer than allowed"),
        pytest.param(FRAMED[:9], id="half a query, then silence"),
        pytest.param(b"", id="silence"),
        pytest.param(FRAMED[:2] + b"\0\0\x80" + FRAMED[5:], id="an answer"),
    ],
)
def test_a_bad_connection_is_closed_and_the_others_are_served(data: bytes) -> None:
    async def test(served: Served) -> None:
        stream = await connect(served)
        await stream.send_all(data)
        await good_answer(served)
        assert await closed_by_server(stream)
        await good_answer(served)

    serve(test, idle_timeout=0.2, query_timeout=0.2)


def test_a_client_that_takes_no_answer_is_let_go() -> None:
    async def test(served: Served) -> None:
        many = dns.message.make_query("many.home.vpn.", "A").to_wire()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
        await stream.socket.connect((served.host, served.port))
        framed = len(many).to_bytes(2, "big") + many
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(framed * 100)
        await good_answer(served)

    serve(test, query_timeout=0.2, idle_timeout=0.2)


@pytest.mark.parametrize(
    "datagram", [b"", b"x", bytes(12)[:11], b"\0\0\x80\0" + bytes(8), QUERY + bytes(4096)]
)
def test_a_bad_datagram_is_ignored_and_counted(datagram: bytes) -> None:
    async def test(served: Served) -> None:
        with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
            await client.sendto(datagram, (served.host, served.port))
            await good_answer(served)
        assert served.counts["dns_ignored"] == 1

    serve(test)


@pytest.mark.setting("dns.max_connections_per_client")
def test_one_client_has_only_so_many_connections() -> None:
    async def test(served: Served) -> None:
        kept = [await connect(served) for _ in range(3)]
        for stream in kept:
            await stream.send_all(FRAMED)
            assert await stream.receive_some()
        refused = await connect(served)
        assert await closed_by_server(refused)
        await kept[0].send_all(FRAMED)
        assert await kept[0].receive_some()
        assert served.counts["dns_connections_refused"] == 1
        await kept[0].aclose()
        await trio.testing.wait_all_tasks_blocked()
        await good_answer(served)

    serve(test, max_connections_per_client=3)


@pytest.mark.setting("dns.max_connections")
def test_the_oldest_connection_makes_room() -> None:
    async def test(served: Served) -> None:
        kept = []
        for _ in range(3):
            kept.append(await connect(served))
            await kept[-1].send_all(FRAMED)
            assert await kept[-1].receive_some()
        assert await closed_by_server(kept[0])
        for stream in kept[1:]:
            await stream.send_all(FRAMED)
            assert await stream.receive_some()
        assert served.counts["dns_connections_refused"] == 1

    serve(test, max_connections=2)


def test_a_fault_of_ours_costs_one_answer_only(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty:
        def __init__(self) -> None:
            self.zone = make_zone()
            self.faults = 1

        def answer_untrusted(self, wire: bytes, *, tcp: bool) -> bytes | None:
            if self.faults:
                self.faults -= 1
                raise RuntimeError("a bug")
            return self.zone.answer_untrusted(wire, tcp=tcp)

    async def test(served: Served) -> None:
        stream = await connect(served)
        await stream.send_all(FRAMED)
        assert await closed_by_server(stream)
        await good_answer(served)

    serve(test, zone=Faulty())
    assert "could not be answered" in caplog.text


@pytest.mark.setting("dns.max_query_bytes")
def test_a_query_may_be_so_long_and_no_longer() -> None:
    async def test(served: Served) -> None:
        with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
            await client.sendto(QUERY + bytes(512), (served.host, served.port))
            await good_answer(served)
        assert served.counts["dns_ignored"] == 1
        stream = await connect(served)
        await stream.send_all((513).to_bytes(2, "big"))
        assert await closed_by_server(stream)

    serve(test, max_query_bytes=512)


@pytest.mark.setting("dns.idle_timeout", "dns.query_timeout")
@pytest.mark.parametrize(
    ("begun", "settings"),
    [
        (b"", {"idle_timeout": 0.2, "query_timeout": 60.0}),
        (FRAMED[:9], {"idle_timeout": 60.0, "query_timeout": 0.2}),
    ],
    ids=["it says nothing", "it does not go on"],
)
def test_who_keeps_a_connection_waiting_is_closed_in_time(begun: bytes, settings: dict[str, float]) -> None:
    async def test(served: Served) -> None:
        stream = await connect(served)
        if begun:
            await stream.send_all(begun)
        with trio.fail_after(2.0):
            assert await closed_by_server(stream)

    serve(test, **settings)
