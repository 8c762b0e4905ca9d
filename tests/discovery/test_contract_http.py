"""Asking a contract over HTTP, of endpoints that answer, fail, drip and lie."""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from vpnd import peerid
from vpnd.adapter.contract import ContractRegistry
from vpnd.config.schema import Registry
from vpnd.discovery.contract import RegistryError

PEER = peerid.from_public_key(bytes(32))
A = ipaddress.IPv4Address("10.86.0.1")
Handler = Callable[[trio.SocketStream, dict], Awaitable[None]]


def result(peer_id: str, serial: int) -> bytes:
    data = peer_id.encode()
    words = (32).to_bytes(32, "big") + len(data).to_bytes(32, "big") + data + bytes(-len(data) % 32)
    return json.dumps({"jsonrpc": "2.0", "id": serial, "result": "0x" + words.hex()}).encode()


async def reply(stream: trio.SocketStream, body: bytes, status: str = "200 OK") -> None:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    await stream.send_all(head.encode() + body)


async def owned(stream: trio.SocketStream, question: dict) -> None:
    await reply(stream, result(PEER, question["id"]))


class Endpoint:
    """A server on loopback that gives each question to `handler`."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.questions: list[dict] = []
        self.counts: Counter[str] = Counter()
        self.under_way = self.most_under_way = 0

    async def _serve(self, stream: trio.SocketStream) -> None:
        data = b""
        try:
            while b"\r\n\r\n" not in data or not data.endswith(b"}"):
                more = await stream.receive_some()
                if not more:
                    return
                data += more
            question = json.loads(data.partition(b"\r\n\r\n")[2])
            self.questions.append(question)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            await self.handler(stream, question)
        except trio.BrokenResourceError:
            pass
        finally:
            self.under_way -= 1
            await stream.aclose()

    def run(self, test: Callable[[ContractRegistry], Awaitable[None]], **settings) -> None:
        async def main() -> None:
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    (listener,) = await nursery.start(lambda task_status: self._listen(task_status))
                    url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/rpc"
                    table = {"rpc_url": url, "contract_address": "0x" + "00" * 20, "timeout": 5.0} | settings
                    registry = ContractRegistry(
                        Registry(kind="contract", **table),
                        lambda name: self.counts.update([name]),
                        trio.current_time,
                    )
                    await test(registry)
                    await registry.close()
                    nursery.cancel_scope.cancel()

        trio.run(main)

    async def _listen(self, task_status) -> None:
        await trio.serve_tcp(self._serve, 0, host="127.0.0.1", task_status=task_status)


@pytest.mark.setting("registry.rpc_url")
def test_an_owner_is_asked_for_once() -> None:
    endpoint = Endpoint(owned)

    async def test(registry: ContractRegistry) -> None:
        first = await registry.owner(A)
        assert first.peer_id == PEER and await registry.owner(A) == first

    endpoint.run(test)
    assert len(endpoint.questions) == 1 and endpoint.counts == {"registry_lookups": 1}


def test_many_who_ask_for_one_address_are_one_question() -> None:
    async def slow(stream: trio.SocketStream, question: dict) -> None:
        await trio.sleep(0.1)
        await owned(stream, question)

    endpoint = Endpoint(slow)

    async def test(registry: ContractRegistry) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(registry.owner, A)

    endpoint.run(test)
    assert len(endpoint.questions) == 1


def test_a_cancelled_question_is_taken_over_by_who_waits() -> None:
    async def stuck_first(stream: trio.SocketStream, question: dict) -> None:
        if len(endpoint.questions) == 1:
            await trio.sleep_forever()
        await owned(stream, question)

    endpoint = Endpoint(stuck_first)

    async def test(registry: ContractRegistry) -> None:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def impatient() -> None:
                with scope:
                    await registry.owner(A)

            nursery.start_soon(impatient)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(registry.owner, A)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
        assert (await registry.owner(A)).peer_id == PEER

    endpoint.run(test)
    assert len(endpoint.questions) == 2


def test_whoever_asks_now_is_told_what_the_contract_says_now() -> None:
    async def once(stream: trio.SocketStream, question: dict) -> None:
        await (owned if len(endpoint.questions) < 3 else hang_up)(stream, question)

    endpoint = Endpoint(once)

    async def test(registry: ContractRegistry) -> None:
        first = await registry.owner(A)
        second = await registry.ask(A)
        assert second.confirmed_s > first.confirmed_s and await registry.owner(A) == second
        with pytest.raises(RegistryError, match="cannot be asked"):
            await registry.ask(A)
        assert await registry.owner(A) == second, "who asks for what is remembered is told that"

    endpoint.run(test)
    assert len(endpoint.questions) == 3


@pytest.mark.setting("registry.max_requests", "registry.max_waiting")
def test_so_many_at_once_and_so_many_waiting() -> None:
    async def slow(stream: trio.SocketStream, question: dict) -> None:
        await trio.sleep(0.05)
        await owned(stream, question)

    endpoint = Endpoint(slow)
    refused = []

    async def test(registry: ContractRegistry) -> None:
        async def ask(last: int) -> None:
            try:
                await registry.owner(A + last)
            except RegistryError as error:
                refused.append(str(error))

        async with trio.open_nursery() as nursery:
            for last in range(10):
                nursery.start_soon(ask, last)

    endpoint.run(test, max_requests=2, max_waiting=5)
    assert refused == ["too many look-ups wait already"] * 3
    assert endpoint.most_under_way == 2 and len(endpoint.questions) == 7


async def silence(stream: trio.SocketStream, question: dict) -> None:
    await trio.sleep_forever()


async def drip(stream: trio.SocketStream, question: dict) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        await stream.send_all(b"x")
        await trio.sleep(0.02)


async def hang_up(stream: trio.SocketStream, question: dict) -> None:
    await stream.aclose()


async def no_http(stream: trio.SocketStream, question: dict) -> None:
    await stream.send_all(b"\x16\x03\x01 what?\r\n\r\n")


async def endless(stream: trio.SocketStream, question: dict) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        await stream.send_all(bytes(4096))


async def elsewhere(stream: trio.SocketStream, question: dict) -> None:
    await stream.send_all(b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.setting("registry.timeout")
@pytest.mark.parametrize(
    ("handler", "reason"),
    [
        pytest.param(silence, "did not answer within 0.3 s", id="no answer"),
        pytest.param(drip, "did not answer within 0.3 s", id="a byte now and then"),
        pytest.param(hang_up, "cannot be asked: RemoteProtocolError", id="closed"),
        pytest.param(no_http, "cannot be asked: RemoteProtocolError", id="another protocol"),
        pytest.param(endless, "longer than registry.max_response_bytes", id="an answer without end"),
        pytest.param(elsewhere, "HTTP 307", id="a redirect is not followed"),
        pytest.param(lambda s, q: reply(s, b"sorry", "503 No"), "HTTP 503", id="an error of HTTP"),
        pytest.param(
            lambda s, q: reply(
                s, b'{"jsonrpc":"2.0","id":1,"error":{"code":-1,"message":"slow down"}}', "429 Too Many"
            ),
            "slow down",
            id="an error of JSON-RPC under one of HTTP",
        ),
        pytest.param(
            lambda s, q: reply(s, result(PEER, 99)), "not one to the question", id="another's answer"
        ),
    ],
)
def test_endpoints_that_fail(handler: Handler, reason: str) -> None:
    endpoint = Endpoint(handler)

    async def test(registry: ContractRegistry) -> None:
        for _ in range(2):
            with pytest.raises(RegistryError, match=reason):
                await registry.owner(A)

    endpoint.run(test, timeout=0.3, failure_lifetime=60.0)
    assert len(endpoint.questions) == 1, "a failure is remembered"
    assert endpoint.counts == {"registry_lookups": 1, "registry_failures": 1}


def test_an_endpoint_that_is_not_there() -> None:
    async def test(registry: ContractRegistry) -> None:
        with pytest.raises(RegistryError, match="cannot be asked: ConnectError"):
            await registry.owner(A)

    Endpoint(owned).run(test, rpc_url="http://127.0.0.1:1")


def test_an_owner_stands_while_the_endpoint_is_down() -> None:
    async def once(stream: trio.SocketStream, question: dict) -> None:
        await (owned if len(endpoint.questions) == 1 else hang_up)(stream, question)

    endpoint = Endpoint(once)

    async def test(registry: ContractRegistry) -> None:
        assert not (await registry.owner(A)).stale
        assert (await registry.owner(A)).stale

    endpoint.run(test, positive_lifetime=0.0)


@pytest.mark.setting("registry.max_response_bytes")
def test_an_answer_longer_than_allowed_is_refused() -> None:
    async def padded(stream: trio.SocketStream, question: dict) -> None:
        await reply(stream, result(PEER, question["id"]) + b" " * 2000)

    async def test(registry: ContractRegistry) -> None:
        with pytest.raises(RegistryError, match="max_response_bytes"):
            await registry.owner(A)

    Endpoint(padded).run(test, max_response_bytes=1 << 10)


@pytest.mark.setting("registry.contract_address")
def test_the_contract_that_is_asked_is_the_one_set() -> None:
    endpoint, contract = Endpoint(owned), "0x" + "5e" * 20

    async def test(registry: ContractRegistry) -> None:
        await registry.owner(A)

    endpoint.run(test, contract_address=contract)
    assert endpoint.questions[0]["params"][0]["to"] == contract
