"""What becomes of packets between this node and a peer, asked of the peer itself (vpnd/why.py).

Over a connection of its own, for nothing but this: that it comes about, and how far it gets, says how the way is. First
small messages go over it, then large ones, then the question. The peer's supervisor finds the answer; there is one
walk at a time for all that ask; who comes meanwhile is told so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import ip_network
from typing import Any

import msgspec
import trio

from vpnd import why
from vpnd.adapter.dial import DialError
from vpnd.adapter.framing import read_message_untrusted, write_message
from vpnd.adapter.host import Host
from vpnd.api.messages import Message, WalkTold, WalkWanted
from vpnd.control.common import Common
from vpnd.control.state import EXPIRED, LEFT, MILLISECONDS, REMOVED, OwnNetwork, end_of
from vpnd.discovery.registry import Member, PeerRegistry
from vpnd.endpoint import ip_of
from vpnd.membership.refusal import MembershipRefused
from vpnd.printable import span
from vpnd.version import __version__

_ENDS = {
    REMOVED: "was removed from the network",
    LEFT: "left the network",
    EXPIRED: "is no member any more: its membership expired",
}


class Explaining:
    """Owner: control's loop. `tell` sends to the supervisor. `own` None: peers are configured by hand."""

    def __init__(
        self,
        common: Common,
        registry: PeerRegistry,
        host: Host,
        own: OwnNetwork | None,
        tell: Callable[[Message], object],
    ) -> None:
        self._live, self._now_ms = common.live, common.now_ms
        self._registry, self._host, self._own, self._tell = registry, host, own, tell
        self._serial = 0
        self._walking = False
        self._answered = trio.Event()
        self._content = b""

    # --- commands of this node's supervisor

    async def standing(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Who that is, as `why.Standing`: a name, peer id or address."""
        who = str(arguments.get("who") or "")
        found: dict[str, Any] = msgspec.to_builtins(self._standing(who))
        return found

    def _standing(self, who: str) -> why.Standing:
        member = self._member(who)
        if member is not None:
            return why.Standing(
                peer_id=member.peer_id, name=member.name, state="peer", virtual_ips=member.virtual_ips
            )
        own = self._own
        if own is None:
            return why.Standing(name=who)
        now_ms = self._now_ms()
        for body, removal in own.directory.departed(now_ms):
            if who not in (body.name, body.peer_id, *body.addresses):
                continue
            since_s = max(0, now_ms - (removal.issued_ms if removal else body.expires_ms)) / MILLISECONDS
            state = end_of(removal)
            return why.Standing(
                peer_id=body.peer_id,
                name=body.name,
                state=state,
                says=f"{_ENDS[state]} {span(since_s)} ago",
                virtual_ips=body.addresses,
            )
        return why.Standing(name=who)

    def _member(self, who: str) -> Member | None:
        members = self._registry.members()
        for member in members:
            if who in (member.name, member.peer_id, *member.virtual_ips):
                return member
        address = ip_of(who)
        if address is None:
            return self._labelled(who)
        around = [
            (network.prefixlen, place)
            for place, member in enumerate(members)
            for network in map(ip_network, member.prefixes)
            if address in network
        ]
        return members[max(around)[1]] if around else None

    def _labelled(self, who: str) -> Member | None:
        """By another spelling of its name."""
        if self._own is None:
            return None
        try:
            return self._registry.find(self._own.whom(who))
        except MembershipRefused:
            return None

    async def ask(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What a peer says, as `why.Asked`. `peer_id`: whom; `address`: where packets are sent."""
        member = self._registry.find(str(arguments.get("peer_id") or ""))
        if member is None:
            return {"error": "it is no peer of this node"}
        question = why.Question(address=str(arguments.get("address") or ""))
        heard = why.Asked()

        async def talk(connection: Any) -> None:
            nonlocal heard
            step_s = self._live.config.p2p.dial_timeout
            with trio.fail_after(step_s):
                greeting = why.said_untrusted(await _exchange_untrusted(connection, b""), why.Greeting)
            heard = why.Asked(ahead_s=(greeting.now_ms - self._now_ms()) / MILLISECONDS)
            try:
                with trio.fail_after(step_s):
                    await _exchange_untrusted(connection, bytes(why.LARGE))
            except trio.TooSlowError:
                raise DialError(f"{why.LARGE} bytes were not answered within {step_s:g} s", "large") from None
            said = await _exchange_untrusted(connection, msgspec.json.encode(question))
            heard = msgspec.structs.replace(heard, told=why.said_untrusted(said, why.Told))

        try:
            within_s = self._live.config.p2p.handshake_timeout + self._live.config.p2p.dial_timeout
            await self._host.converse(member.addresses, member.peer_id, why.PROTOCOL, talk, within_s)
        except DialError as error:
            heard = msgspec.structs.replace(heard, error=str(error), kind=error.kind)
        result: dict[str, Any] = msgspec.to_builtins(heard)
        return result

    # --- what peers ask

    async def serve_untrusted(self, connection: Any, peer_id: str) -> None:
        """A member's connection, which the caller closes. Raises RemoteProtocolError, and what libp2p raises."""
        with trio.move_on_after(self._live.config.p2p.handshake_timeout):
            await read_message_untrusted(connection, 0)
            greeting = why.Greeting(version=__version__, now_ms=self._now_ms())
            await write_message(connection, msgspec.json.encode(greeting))
            padding = await read_message_untrusted(connection, why.LARGE)
            await write_message(connection, padding)
            question = why.said_untrusted(
                await read_message_untrusted(connection, why.MAX_MESSAGE), why.Question
            )
            await write_message(connection, await self._walk(peer_id, question.address))

    async def _walk(self, peer_id: str, address: str) -> bytes:
        """Asked of the supervisor, unless it walks for somebody else."""
        if self._walking:
            return msgspec.json.encode(why.Told(busy=True))
        self._walking = True
        try:
            self._serial += 1
            self._answered = trio.Event()
            self._tell(WalkWanted(serial=self._serial, peer_id=peer_id, address=address))
            await self._answered.wait()
            return self._content
        finally:
            self._walking = False

    def told(self, message: WalkTold) -> None:
        if message.serial == self._serial:
            self._content = message.content
            self._answered.set()


async def _exchange_untrusted(connection: Any, message: bytes) -> bytes:
    """One message and its answer. Has no deadline."""
    await write_message(connection, message)
    return await read_message_untrusted(connection, why.MAX_MESSAGE)
