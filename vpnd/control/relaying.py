"""Being a relay: who may meet here, and the link to the process that joins two sockets.

That process is started with the first member that waits for calls. Limits on pairs are kept here, on bytes there.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import trio

from vpnd import interfaces
from vpnd.adapter.arrivals import Rate
from vpnd.adapter.rendezvous import Rendezvous
from vpnd.api import messages
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.config import multiaddrs
from vpnd.config.live import Live
from vpnd.control.channels import TrioChannel
from vpnd.discovery.registry import PeerRegistry
from vpnd.endpoint import Endpoint, IPNetwork
from vpnd.errors import ProtocolViolation
from vpnd.metrics import CounterPage
from vpnd.nat import paths
from vpnd.nat.messages import FULL, NOT_MEMBER, NOT_SERVING, TOO_OFTEN

#: What is no member counts under.
GUESTS = ""

log = logging.getLogger(__name__)


class Relaying:
    """Owner: control's loop. It is the `Serving` of a Rendezvous. `want_process`: ask the supervisor to start the relay
    process, which comes by `arrived`."""

    def __init__(
        self,
        live: Live,
        registry: PeerRegistry,
        page: CounterPage,
        now_s: Callable[[], float],
        want_process: Callable[[], None],
    ) -> None:
        self._live, self._registry, self._page, self._want_process = live, registry, page, want_process
        self._rate = Rate(now_s)
        self._pairs: dict[int, tuple[str, str]] = {}
        self._of_guests: set[int] = set()
        self._next = 0
        self._channel: TrioChannel | None = None
        self._here = trio.Event()
        self.rendezvous = Rendezvous(live, self, page.add)
        page.set("relay_pairs", 0)

    # --- the process

    async def serve(self, channel: Channel) -> None:
        """A relay process is there: hear what it says, until it is gone."""
        link = self._channel = TrioChannel(channel)
        self._here.set()
        try:
            await link.run(self._on_relay)
        except* ChannelClosed:
            log.debug("the relay process is gone")
        except* ProtocolViolation as group:
            log.error("the relay process is cut off: %s", group.exceptions[0])
        link.close()
        if self._channel is link:
            self._channel = None
            self._here = trio.Event()
            self._pairs.clear()
            self._of_guests.clear()
            self._show()

    def _on_relay(self, message: messages.Message, _: list[int]) -> None:
        match message:
            case messages.RelayHeld(pairs=pairs):
                # From before a restart of control. Who is no member any more is not relayed.
                self._pairs = {number: (first, second) for number, first, second in pairs}
                self._next = max([self._next, *self._pairs])
                self.members_changed()
            case messages.RelayPairEnded(number=number, reason=reason):
                self._of_guests.discard(number)
                if self._pairs.pop(number, None) is not None:
                    log.debug("a relayed session has ended: %s", reason)
            case messages.RelayMoved(bytes=moved):
                self._page.add("relay_bytes", moved)
        self._show()

    def _show(self) -> None:
        self._page.set("relay_pairs", len(self._pairs))

    def members_changed(self) -> None:
        """Sessions of those that are no members any more are not relayed."""
        for number, pair in self._pairs.items():
            if number not in self._of_guests and any(
                self._registry.find(peer_id) is None for peer_id in pair
            ):
                self._send(messages.RelayLeave(number=number))

    def _send(self, message: messages.Message, descriptors: tuple[int, ...] = ()) -> None:
        if self._channel is not None:
            try:
                self._channel.send(message, descriptors)
            except ChannelClosed:
                log.debug("the relay process is going")

    # --- what is permitted; see vpnd.adapter.rendezvous.Serving

    def stays(self, peer_id: str, seen: Endpoint, waiting: int) -> str:
        """See Serving. A member of the same local network needs no relay here: who could reach this node could reach it
        as well."""
        settings = self._live.config.relay
        member = self._registry.find(peer_id)
        if member is None:
            return NOT_MEMBER
        told = any(f"/{seen.ip}/" in address for address in member.addresses)
        if not settings.serve or (told and any(seen.ip in network for network in local_networks())):
            return NOT_SERVING
        if waiting >= settings.max_members:
            return FULL
        if self._channel is None:
            self._want_process()
        return ""

    def is_member(self, peer_id: str) -> bool:
        return self._registry.find(peer_id) is not None

    def meets(self, caller: str, callee: str) -> str:
        settings = self._live.config.relay
        if self._registry.find(callee) is None or caller == callee:
            return NOT_MEMBER
        if not settings.serve:
            return NOT_SERVING
        # Guests together have what one member has: whoever likes can be many of them.
        who = caller if self.is_member(caller) else GUESTS
        return "" if self._rate.allows(who, settings.max_meets) else TOO_OFTEN

    async def room(self, caller: str, callee: str) -> bool:
        settings = self._live.config.relay
        load = Counter(peer_id for pair in self._pairs.values() for peer_id in pair)
        if len(self._pairs) >= settings.max_sessions:
            return False
        if max(load[caller], load[callee]) >= settings.max_sessions_per_member:
            return False
        if self._channel is None:
            self._want_process()
            with trio.move_on_after(self._live.config.nat.meet_timeout):
                await self._here.wait()
        return self._channel is not None

    def join(self, caller: str, callee: str, sockets: tuple[int, int]) -> int:
        self._next += 1
        self._pairs[self._next] = (caller, callee)
        self._send(messages.RelayPair(number=self._next, members=(caller, callee)), sockets)
        self._page.add("relay_pairs_joined")
        self._show()
        if not self.is_member(caller):
            self._of_guests.add(self._next)
        return self._next

    def part(self, number: int) -> None:
        if number in self._pairs:
            self._send(messages.RelayLeave(number=number))


def may_answer(address: str, own: Sequence[str]) -> bool:
    """Whether a multiaddr is likely to be where its owner says, seen from here: a private address of another network is
    not, nor one of this node (`own`), which bridges to containers have on many machines."""
    try:
        ip = ipaddress.ip_address(multiaddrs.parse(address).host)
    except ValueError:  # a name
        return True
    if not paths.is_private(ip):
        return True
    return any(ip in network for network in local_networks()) and address not in own


def local_networks() -> list[IPNetwork]:
    """The networks this machine has an address in."""
    return [held.address.network for held in interfaces.addresses()]
