"""`vpnd why`: gathering the facts that vpnd.why judges, for this node's user and for peers that ask.

On the status socket {"command": "why", "who": a name, peer id or address, "protocol": IP protocol or 0, "port": …} is
answered with a `vpnd.why.Walk`. Drops are counted twice, status.why_interval apart; meanwhile the kernel is
asked for its route, the flow's shard for its session, and the peer for its own view.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from supervisor.fleet import Fleet
from supervisor.network.netlink import IPRoute, NetlinkError, converse
from supervisor.pump import Pump
from vpnd import why
from vpnd.api.messages import ProbeAnswer, WalkTold, WalkWanted
from vpnd.config.live import Live
from vpnd.endpoint import IP
from vpnd.errors import ConfigError, VpndError
from vpnd.packet.flow import echo_key, key_to
from vpnd.status import Status

_MOST_WHO = 256


class Walking:
    """Owner: supervisor loop. `status(patience_s)`: of this node, children that do not answer in that time left out."""

    def __init__(
        self, live: Live, fleet: Fleet, pump: Pump, status: Callable[[float], Awaitable[Status]]
    ) -> None:
        self._live, self._fleet, self._pump, self._status = live, fleet, pump, status

    async def asked(self, request: Mapping[str, Any]) -> why.Walk:
        """For this node's user. Raises ConfigError."""
        who, protocol, port = request.get("who"), request.get("protocol", 0), request.get("port", 0)
        if not isinstance(who, str) or not 0 < len(who) <= _MOST_WHO:
            raise ConfigError("who: must be a name, an IP address or a peer id")
        if type(protocol) is not int or not 0 <= protocol <= 255:
            raise ConfigError("protocol: must be an IP protocol's number")
        if type(port) is not int or not 0 <= port <= 65535:
            raise ConfigError("port: must be a number from 0 to 65535")
        before = await self._status(self._interval_s)
        standing = await self._standing(who, before)
        address = _address(who) or next(map(_address, standing.virtual_ips), None)
        asking = self._ask(standing, address)
        return why.judge(await self._facts(before, address, protocol, port, standing, asking))

    async def asked_by_peer(self, wanted: WalkWanted) -> None:
        """For a peer: the way back to it, and what is dropped of what it sends."""
        control = self._fleet.control
        process = control.pid
        before = await self._status(self._interval_s)
        peer = next((row for row in before.peers if row.peer_id == wanted.peer_id), None)
        standing = why.Standing(peer_id=wanted.peer_id)
        address = _address(peer.virtual_ip) if peer is not None else None
        facts = await self._facts(before, address, 0, 0, standing, None)
        now = next((row for row in facts.after.peers if row.peer_id == wanted.peer_id), peer)
        dropped = now.drops if now is not None else {}
        earlier = peer.drops if peer is not None else {}
        walk = why.judge(facts)
        told = why.Told(
            steps=walk.steps,
            cause=walk.cause,
            dropped=dropped,
            dropping={reason: count - earlier.get(reason, 0) for reason, count in dropped.items()},
        )
        if control.pid == process:
            control.send(WalkTold(serial=wanted.serial, content=msgspec.json.encode(told)))

    @property
    def _interval_s(self) -> float:
        return self._live.config.status.why_interval

    async def _standing(self, who: str, status: Status) -> why.Standing:
        """By what status tells, which works without control; else by what control finds."""
        for row in status.peers:
            if who in (row.name, row.peer_id, *row.virtual_ips):
                return why.Standing(
                    peer_id=row.peer_id, name=row.name, state="peer", virtual_ips=row.virtual_ips
                )
        with contextlib.suppress(VpndError):
            return msgspec.json.decode(await self._control("standing", who=who), type=why.Standing)
        return why.Standing(name=who)

    async def _ask(self, standing: why.Standing, address: IP | None) -> why.Asked:
        if standing.state != "peer":
            return why.Asked(error=f"{standing.name} is no peer")
        try:
            said = await self._control("ask", peer_id=standing.peer_id, address=str(address or ""))
        except VpndError as error:
            return why.Asked(error=str(error))
        return msgspec.json.decode(said, type=why.Asked)

    async def _control(self, command: str, **arguments: str) -> bytes:
        config, fleet = self._live.config, self._fleet
        within_s = config.p2p.dial_timeout * 2 + config.p2p.handshake_timeout
        return await fleet.questions.request(fleet.control, command, {**arguments}, within_s)

    async def _facts(
        self,
        before: Status,
        address: IP | None,
        protocol: int,
        port: int,
        standing: why.Standing,
        asking: Awaitable[why.Asked] | None,
    ) -> why.Facts:
        config = self._live.config
        shard, probing = None, None
        if address is not None:
            key = key_to(address, protocol, port) if protocol else echo_key(address)
            shard = self._pump.shard_of(key)
            if shard >= 0:
                patience_s = config.health.timeout + config.status.timeout / 2
                probing = self._fleet.questions.probe(
                    self._fleet.shards[shard], str(address), patience_s, protocol, port
                )
        route, probed, asked, _ = await asyncio.gather(
            asyncio.to_thread(_route_to, address) if address is not None else _nothing(),
            probing or _nothing(),
            asking or _nothing(),
            asyncio.sleep(self._interval_s),
        )
        answer = probed or ProbeAnswer(serial=0)
        return why.Facts(
            address=str(address or ""),
            before=before,
            after=await self._status(config.status.timeout / 2),
            route=route,
            shard=shard if shard is not None and shard >= 0 else None,
            probed=probed is not None,
            owner=answer.owner,
            flow=answer.flow,
            session=answer.session,
            why_none=answer.why,
            standing=standing,
            asked=asked,
            clock_skew_s=config.membership.clock_skew,
        )


async def _nothing() -> None:
    return None


def _address(text: str) -> IP | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _route_to(address: IP) -> why.Route:
    """Blocks for some milliseconds."""

    def ask(netlink: IPRoute) -> why.Route:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        (route, *_) = netlink.route("get", dst=str(address), family=family)
        index = route.get_attr("RTA_OIF")
        (link, *_) = netlink.get_links(index)
        return why.Route(
            device=str(link.get_attr("IFLA_IFNAME")),
            table=int(route.get_attr("RTA_TABLE") or route["table"]),
        )

    try:
        return converse(ask)
    except NetlinkError as error:
        return why.Route(error=str(error.args[1]) if len(error.args) > 1 else str(error))
    except OSError as error:
        return why.Route(error=str(error.strerror))
