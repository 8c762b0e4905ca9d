"""Asking the contract who owns which address (registry.kind = "contract"), and acting on what it says.

    what is asked for, and when            `vpnd.discovery.ownership`, whose owner this is
    the asking                             `vpnd.adapter.contract`, registry.max_requests at once
    who may use what, because of it        the registry of peers, which asks `ownership`; shards and names follow it

Nothing waits for an answer but the greeting of shards, for registry.timeout at most (`settled`): what shards know from
before a restart of control goes on until then. An endpoint that does not answer keeps addresses from being used that
were not confirmed lately, and nothing else.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
import trio

from vpnd.api.reports import OwnAddresses, PeerReport
from vpnd.config import check
from vpnd.control.common import Common
from vpnd.discovery.contract import RegistryError
from vpnd.discovery.ownership import NEVER, Ownership
from vpnd.discovery.registry import PeerRegistry

if TYPE_CHECKING:
    from vpnd.adapter.contract import ContractRegistry

log = logging.getLogger(__name__)


class Owning:
    """Owner: control's trio loop; `run` once, `settled` at any time after that began.

    `registry`: the peers, with the addresses the contract leaves them. `in_network`: `own_changed` says what this node
    is, before there are members. `gauge` sets numbers of vpnd.metrics.
    """

    def __init__(
        self,
        contract: ContractRegistry,
        common: Common,
        own_id: str,
        *,
        in_network: bool,
        gauge: Callable[[str, int], None],
    ) -> None:
        config = common.live.config
        self.contract, self._settings, self._own_id = contract, config.registry, own_id
        self._count, self._gauge, self._seldom, self._now_s = common.count, gauge, common.seldom, common.now_s
        self._asking = 0
        self._woken, self._settled = trio.Event(), trio.Event()
        self.ownership = Ownership(config.registry, config.retry.multiplier, self._wake)
        self._configured: tuple[str, ...] = ()
        if config.peers or not in_network:  # a member's own virtual_ip is for its configured peers
            self.ownership.govern((str(check.subnet(config)), *config.network.routes))
            self._configured = (config.network.virtual_ip,) if config.network.virtual_ip else ()
        self.ownership.own(own_id, self._configured)
        self.registry = PeerRegistry(config.peers, self.ownership)

    def own_changed(self, own: OwnAddresses) -> None:
        """What this node is in its network."""
        self.ownership.govern(own.subnets)
        self.ownership.own(self._own_id, (*own.addresses, *self._configured))

    def _name(self, peer_id: str) -> str:
        if peer_id == self._own_id:
            return "this node"
        member = self.registry.find(peer_id)
        return member.name if member is not None else peer_id

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                self._woken = trio.Event()
                now_s = self._now_s()
                self.registry.reconsider(self.ownership.lapse(now_s))
                free = self._settings.max_requests - self._asking
                for address in self.ownership.take_due(now_s, free):
                    self._asking += 1
                    nursery.start_soon(self._ask, address)
                self._show()
                free = self._settings.max_requests - self._asking
                due_s = self.ownership.next_s() if free else self.ownership.lapses_s()
                wait_s = due_s - self._now_s()
                with trio.move_on_after(max(0.0, wait_s) if wait_s < NEVER else NEVER):
                    await self._woken.wait()

    async def settled(self) -> None:
        """Wait until everything that was claimed at the start has been asked for, registry.timeout at most."""
        with trio.move_on_after(self._settings.timeout):
            await self._settled.wait()
        self._settled.set()

    def wanted(self, number: int) -> None:
        """Packets want to go to the IPv4 address of that number, which no peer has."""
        known = 0 <= number < 1 << ipaddress.IPV4LENGTH
        if known and self.ownership.wanted(ipaddress.IPv4Address(number)):
            self._count("registry_wanted")
        else:
            self._count("registry_wanted_refused")

    # --- what is told

    def annotated(self, peers: Iterable[PeerReport]) -> tuple[PeerReport, ...]:
        """The same, each with what is to be said of its addresses."""
        return tuple(
            msgspec.structs.replace(peer, ownership=lines) if (lines := self._lines(peer.peer_id)) else peer
            for peer in peers
        )

    def warnings(self) -> tuple[str, ...]:
        """What is to be said of this node's own addresses: other nodes that ask the contract find the same."""
        return tuple(f"this node: {line}" for line in self._lines(self._own_id))

    def _lines(self, peer_id: str) -> tuple[str, ...]:
        return self.ownership.report(peer_id, self._now_s(), self._name)

    def _show(self) -> None:
        ownership = self.ownership
        self._gauge("registry_unconfirmed", ownership.unconfirmed)
        self._gauge("registry_disowned", ownership.disowned)
        self._gauge("registry_stale", ownership.stale)
        if not ownership.unasked:
            self._settled.set()

    # --- one question

    async def _ask(self, address: ipaddress.IPv4Address) -> None:
        """Whatever goes wrong stays in here."""
        concerned: frozenset[str] = frozenset()
        try:
            owner = await self.contract.ask(address)
        except RegistryError as error:
            self._failed(address, str(error))
        except Exception as error:
            log.exception("asking the contract for %s failed unexpectedly", address)
            self._failed(address, f"{type(error).__name__}: {error}")
        else:
            concerned = self.ownership.answered(address, owner.peer_id, self._now_s())
            if concerned:
                whose = self._name(owner.peer_id) if owner.peer_id else "nobody"
                log.info("the contract says that %s owns %s", whose, address)
        finally:
            self._asking -= 1
            self._wake()
        # before anybody else is settled: an address that changes hands must never be two peers'
        self.registry.reconsider(concerned)

    def _failed(self, address: ipaddress.IPv4Address, reason: str) -> None:
        self._seldom.warn("contract", f"who owns {address} could not be looked up: {reason}")
        self.ownership.failed(address, reason, self._now_s())

    def _wake(self) -> None:
        self._woken.set()
