"""Talking to the router of the local network: a port of its outside address that leads to one of this machine.

PCP, NAT-PMP    `vpnd.nat.portmap`, to the default gateway; only its answers are heard, the socket is connected
UPnP IGD        miniupnpc, which libp2p brings: C, so it waits in a thread, and is asked only where a router does not
                speak the others
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import miniupnpc
import trio

from vpnd.endpoint import Endpoint
from vpnd.errors import RemoteProtocolError, VpndError
from vpnd.nat import portmap
from vpnd.nat.portmap import Granted, PortRefused

Result = TypeVar("Result")

PCP, NAT_PMP, UPNP = "PCP", "NAT-PMP", "UPnP"
#: The first wait for an answer (RFC 6886 section 3.1); it doubles with each of TRIES.
FIRST_WAIT_S, TRIES = 0.25, 3
#: Outside ports asked of UPnP, which refuses one that another machine has.
UPNP_PORTS = 8
DESCRIPTION = "vpnd"


class NoPort(VpndError):
    """The router gives no port, for the reason in words."""


class PortMap(NamedTuple):
    """A port of the router's that leads to `port` here, for `lifetime_s` from when it was asked."""

    protocol: str
    outside: Endpoint
    port: int
    lifetime_s: int


class Router:
    """The default gateway of IPv4, `ip`; `client` is this machine on its way there. `nonce`: names to PCP what is asked
    as ours, and is the same at the next start, which can then take over what it finds."""

    def __init__(self, ip: ipaddress.IPv4Address, client: ipaddress.IPv4Address, nonce: bytes) -> None:
        self.ip, self.client, self._nonce = ip, client, nonce

    async def give(self, port: int, lifetime_s: int, before: PortMap | None, timeout_s: float) -> PortMap:
        """A port map, by the first protocol that gives one; `before`: to be renewed. Raises NoPort."""
        wanted = before.outside if before is not None else None
        refusals: list[str] = []
        for protocol, ask in (
            (PCP, lambda: self._pcp(port, wanted, lifetime_s)),
            (NAT_PMP, lambda: self._pmp(port, wanted, lifetime_s)),
            (UPNP, lambda: self._upnp(port, wanted, lifetime_s, timeout_s)),
        ):
            if before is not None and before.protocol != protocol:
                continue
            try:
                granted = await ask()
            except (RemoteProtocolError, OSError, NoPort) as error:
                refusals.append(f"{protocol}: {error}")
                continue
            assert granted.ip is not None
            return PortMap(protocol, Endpoint(granted.ip, granted.port), port, granted.lifetime_s)
        raise NoPort("; ".join(refusals))

    async def take_back(self, held: PortMap, timeout_s: float) -> None:
        """End a port map, as far as the router listens."""
        with contextlib.suppress(RemoteProtocolError, OSError, NoPort), trio.move_on_after(timeout_s):
            nothing = Endpoint(ipaddress.IPv4Address(0), 0)
            if held.protocol == PCP:
                await self._pcp(held.port, nothing, 0)
            elif held.protocol == NAT_PMP:
                await self._exchange(portmap.pmp_request(held.port, 0, 0), lambda data: data)
            else:
                await _in_thread(_upnp_remove, held.outside.port, timeout_s)

    async def _pcp(self, port: int, wanted: Endpoint | None, lifetime_s: int) -> Granted:
        request = portmap.pcp_request(self._nonce, self.client, port, wanted, lifetime_s)
        return await self._exchange(
            request, lambda data: portmap.pcp_answer_untrusted(data, self._nonce, port)
        )

    async def _pmp(self, port: int, wanted: Endpoint | None, lifetime_s: int) -> Granted:
        outside = await self._exchange(portmap.pmp_address_request(), portmap.pmp_address_untrusted)
        request = portmap.pmp_request(port, wanted.port if wanted is not None else port, lifetime_s)
        granted = await self._exchange(request, lambda data: portmap.pmp_answer_untrusted(data, port))
        return granted._replace(ip=outside)

    async def _upnp(self, port: int, wanted: Endpoint | None, lifetime_s: int, timeout_s: float) -> Granted:
        first = wanted.port if wanted is not None else port
        outside = [first, *(1024 + (first * 7 + 4999 * n) % 60000 for n in range(1, UPNP_PORTS))]
        with trio.move_on_after(timeout_s * 2):
            return await _in_thread(_upnp_give, port, outside, lifetime_s, timeout_s)
        raise NoPort("no answer")

    async def _exchange(self, request: bytes, parse: Callable[[bytes], Result]) -> Result:
        """What `parse` makes of the answer. Raises PortRefused, OSError when there is none."""
        wait_s = FIRST_WAIT_S
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((str(self.ip), portmap.ROUTER_PORT))
            for _ in range(TRIES):
                await sock.send(request)
                with trio.move_on_after(wait_s):
                    while True:
                        try:
                            return parse(await sock.recv(portmap.MAX_DATAGRAM))
                        except PortRefused:
                            raise
                        except RemoteProtocolError:
                            continue  # an answer to an earlier question
                wait_s *= 2
        raise TimeoutError("no answer")


async def hear_announcements(heard: Callable[[ipaddress.IPv4Address], None]) -> None:
    """Tell of each router that has started, by its own word, until cancelled. Raises OSError when the port is taken."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # others of this machine listen, too
        await sock.bind(portmap.ANNOUNCED_TO)
        while True:
            data, (source, _) = await sock.recvfrom(portmap.MAX_DATAGRAM)
            if portmap.is_announcement_untrusted(data):
                heard(ipaddress.IPv4Address(source))


def default_router(nonce: bytes) -> Router | None:
    """The default gateway of IPv4; None where there is none. Format: proc(5), /proc/net/route."""
    with contextlib.suppress(OSError), open("/proc/net/route") as lines:
        for words in map(str.split, lines):
            if len(words) > 7 and words[1] == words[7] == "00000000" and words[2] != "00000000":
                gateway = ipaddress.IPv4Address(socket.ntohl(int(words[2], 16)))
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.connect((str(gateway), portmap.ROUTER_PORT))
                    return Router(gateway, ipaddress.IPv4Address(sock.getsockname()[0]), nonce)
    return None


# --- UPnP, in a thread


async def _in_thread(work: Callable[..., Result], *arguments: object) -> Result:
    """Nobody waits for a thread that was left: it ends by itself."""
    return await trio.to_thread.run_sync(partial(work, *arguments), abandon_on_cancel=True)  # type: ignore[call-arg]


def _upnp_device(timeout_s: float) -> miniupnpc.UPnP:
    """The router, found by asking the local network. Raises NoPort."""
    upnp = miniupnpc.UPnP()
    upnp.discoverdelay = round(timeout_s * 1000)
    try:
        if not upnp.discover():
            raise NoPort("no answer")
        upnp.selectigd()
    except Exception as error:  # it raises what it likes
        raise error if isinstance(error, NoPort) else NoPort(str(error)) from error
    return upnp


def _upnp_give(port: int, outside: Sequence[int], lifetime_s: int, timeout_s: float) -> Granted:
    upnp = _upnp_device(timeout_s)
    why = ""
    for number in outside:
        # 0, without end: some routers know no other lease; at the next start it is found again
        for lease_s in (lifetime_s, 0):
            try:
                upnp.addportmapping(number, "TCP", upnp.lanaddr, port, DESCRIPTION, "", lease_s)
                return Granted(ipaddress.IPv4Address(upnp.externalipaddress()), number, lifetime_s)
            except Exception as error:
                why = str(error)
                if "Conflict" in why:
                    break
    raise NoPort(why)


def _upnp_remove(outside_port: int, timeout_s: float) -> None:
    with contextlib.suppress(Exception):  # it raises what it likes, and there is nothing more to do
        _upnp_device(timeout_s).deleteportmapping(outside_port, "TCP")
