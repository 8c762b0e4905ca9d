"""Asking the contract over HTTP: the `contract` back end of the registry.

httpx, because libp2p brings it anyway, it runs on trio (a cancelled look-up is gone, which a thread with a blocking
client is not), and it keeps connections and verifies certificates. Must be made before control gives up root: the
certificates of the authorities are read then, and everything that would be imported later is.
"""

from __future__ import annotations

import importlib
import ipaddress
import itertools
import logging
from collections.abc import Callable

import httpx
import trio
import trio._ssl

from vpnd.config.schema import Registry
from vpnd.discovery.contract import (
    Owner,
    OwnerCache,
    RegistryError,
    parse_answer_untrusted,
    request,
)

#: Imported by httpx and below with the first request only.
LAZY = ("httpcore", "httpcore._backends.auto", "anyio._backends._trio", "encodings.idna", "stringprep")
# Everybody else's trio is without TLS: see vpnd/adapter.
trio.SSLStream = trio._ssl.SSLStream  # type: ignore

#: They log whatever they send, and where to: the URL may hold a key.
TALKATIVE = ("httpx", "httpcore")

HEADERS = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}


class ContractRegistry:
    """Owners of virtual addresses, looked up and remembered: the contract can be asked for an address, not for a peer.

    Owner: control. Off the packet path.
    """

    def __init__(
        self,
        settings: Registry,
        count: Callable[[str], None],
        now_s: Callable[[], float],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`settings.kind` is "contract". `count` gets registry_lookups, registry_failures. `transport`: for tests."""
        for name in LAZY:
            importlib.import_module(name)
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        self._settings = settings
        self._count = count
        self._now_s = now_s
        self._cache = OwnerCache(settings)
        self._serials = itertools.count(1)
        self._slots = trio.Semaphore(settings.max_requests)
        self._under_way: dict[ipaddress.IPv4Address, trio.Event] = {}
        # the environment's proxies and netrc are the user's, not the daemon's; redirects lead elsewhere
        self._client = httpx.AsyncClient(
            headers=HEADERS,
            timeout=settings.timeout,
            limits=httpx.Limits(max_connections=settings.max_requests),
            trust_env=False,
            follow_redirects=False,
            transport=transport,
        )

    async def owner(self, address: ipaddress.IPv4Address) -> Owner:
        """The owner, from memory or from the contract, within registry.timeout of its turn.

        Raises RegistryError; a failure is remembered for registry.failure_lifetime and told again.
        """
        while (known := self._cache.get(address, self._now_s())) is None:
            under_way = self._under_way.get(address)
            if under_way is not None:
                await under_way.wait()
                continue
            try:
                return await self.ask(address)
            except RegistryError:
                standing = self._cache.standing(address, self._now_s())
                if standing is None:
                    raise
                return standing
        return known

    async def ask(self, address: ipaddress.IPv4Address) -> Owner:
        """What the contract says now, whatever is remembered, within registry.timeout of its turn.

        Raises RegistryError; `owner` goes on telling what was remembered then, as long as it stands.
        """
        while (under_way := self._under_way.get(address)) is not None:
            await under_way.wait()
        if len(self._under_way) >= self._settings.max_requests + self._settings.max_waiting:
            self._count("registry_failures")
            raise RegistryError("too many look-ups wait already")
        self._under_way[address] = trio.Event()
        try:
            async with self._slots:
                self._count("registry_lookups")
                peer_id = await self._ask(address)
        except RegistryError as error:
            self._count("registry_failures")
            self._cache.failed(address, str(error), self._now_s())
            raise
        finally:
            self._under_way.pop(address).set()
        return self._cache.confirmed(address, peer_id, self._now_s())

    async def close(self) -> None:
        """Close the connections. No question may be under way."""
        await self._client.aclose()

    async def _ask(self, address: ipaddress.IPv4Address) -> str:
        settings = self._settings
        serial = next(self._serials)
        body = request(settings.contract_address, address, serial)
        try:
            # httpx limits each read; an endpoint that drips bytes is ended here
            with trio.fail_after(settings.timeout):
                return parse_answer_untrusted(await self._post_untrusted(body), serial)
        except (httpx.TimeoutException, trio.TooSlowError):
            raise RegistryError(f"the endpoint did not answer within {settings.timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError, OSError) as error:
            raise RegistryError(f"the endpoint cannot be asked: {type(error).__name__} {error}") from None

    async def _post_untrusted(self, body: bytes) -> bytes:
        async with self._client.stream("POST", self._settings.rpc_url, content=body) as response:
            # some endpoints put a JSON-RPC error under 4xx and 5xx: the parser knows more than the number
            answer = bytearray()
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > self._settings.max_response_bytes:
                    raise RegistryError("the endpoint's answer is longer than registry.max_response_bytes")
            if response.is_success or answer.startswith(b"{"):
                return bytes(answer)
            raise RegistryError(f"the endpoint answered HTTP {response.status_code}")
