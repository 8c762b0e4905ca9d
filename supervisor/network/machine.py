"""Keeping the machine as the node needs it: what is wanted is compared with what the kernel has, and mended.

    part               what it wants                                           looked after by
    -----------------  ------------------------------------------------------  ------------------------------------
    device             name, MTU, queue, addresses, routes; no IPv6 by itself  NetworkSetup.mend, given to `begin`
    announced          the table of what members announce, and its rules       AnnouncedRoutes.make_true
    filter             nftables rules                                          Filter.mend
    taken              that nobody routes the VPN's own networks elsewhere     Machine.taken, which can only tell
    forwarding         that no firewall drops what is for announced networks   Forwarding.look, which can only tell

All is looked at whenever something may have changed (`look`: netlink, control, a reload) and every
network.reconcile_interval, for not everything is told. The first look comes at once. Another program that undoes what
is mended is met less and less often: pauses double from network.change_settle to network.change_settle_max.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Sequence

from supervisor.network import killswitch, overlap
from supervisor.network.announced import AnnouncedRoutes
from supervisor.network.forwarding import Forwarding
from supervisor.network.policy import IPNetwork, PolicyTable
from vpnd.api.messages import RoutesKnown
from vpnd.api.reports import OwnAddresses
from vpnd.config.live import Live
from vpnd.errors import MachineError
from vpnd.status import Ailment

log = logging.getLogger("supervisor")

#: Makes a part of the machine what it is to be. Blocks; returns what could not be done, a line each: "what: remedy".
Part = Callable[[], list[str]]


class Reconciler:
    """Looks after `parts`, in their order, in a thread, one pass at a time. Owner: supervisor loop; end with `close`.

    `problems`: what the last pass could not do, a line each.
    """

    def __init__(
        self, live: Live, parts: Sequence[Part], looked: Callable[[], object] = lambda: None
    ) -> None:
        """`looked` is called after each pass."""
        self._live, self._parts, self._looked = live, parts, looked
        self.problems: list[str] = []
        self._wanted, self._closing = asyncio.Event(), asyncio.Event()
        self._working = False
        self._worker = asyncio.get_running_loop().create_task(self._work())

    @property
    def busy(self) -> bool:
        """Whether a pass is under way or asked for."""
        return self._working or self._wanted.is_set()

    def look(self) -> None:
        """Something may have changed."""
        self._wanted.set()

    async def close(self) -> None:
        """Look no more; a pass under way is finished. Idempotent."""
        self._closing.set()
        self._wanted.set()
        await asyncio.wait({self._worker})

    async def _work(self) -> None:
        pause_s = 0.0
        self._wanted.set()
        while True:
            await _within(self._live.config.network.reconcile_interval, self._wanted)
            if self._closing.is_set():
                return
            self._working = True
            self._wanted.clear()
            problems = await asyncio.to_thread(self._pass)
            self._working = False
            for line in problems:
                if line not in self.problems:
                    log.warning("%s", line)
            self.problems = problems
            self._looked()
            network = self._live.config.network
            if await _within(network.change_settle_max, self._wanted):
                pause_s = min(max(2 * pause_s, network.change_settle), network.change_settle_max)
                await _within(pause_s, self._closing)
            else:
                pause_s = 0.0

    def _pass(self) -> list[str]:
        problems = []
        for part in self._parts:
            try:
                problems += part()
            except Exception as error:  # the next pass comes, whatever made this one fail
                log.exception("a part of the machine could not be checked")
                problems.append(f"a part of the machine is not checked: {type(error).__name__}: {error}")
        return problems


async def _within(time_s: float, event: asyncio.Event) -> bool:
    """Whether it is set before so long."""
    try:
        await asyncio.wait_for(event.wait(), time_s)
    except TimeoutError:
        return False
    return True


class Machine:
    """All that a node keeps in the network stack but its device. Owner: supervisor loop.

    `hold`, `begin` when the device is set up, `close` in the end; nothing of the machine is touched before. Raises
    PrivilegeError for a process.user that is not there.
    """

    def __init__(self, live: Live, *, in_network: bool) -> None:
        self._live = live
        network = live.config.network
        self._hold = killswitch.is_on(live.config, in_network=in_network)
        table = PolicyTable(killswitch.place(live.config))
        self._announced = AnnouncedRoutes(
            network.interface, table, allow_overlap=network.allow_overlap, hold=self._hold
        )
        self._filter = killswitch.filter_of(live.config, in_network=in_network)
        self._forwarding = Forwarding(live)
        self._table = table
        self._networks: tuple[IPNetwork, ...] = ()
        self._held_before = False
        self._reconciler: Reconciler | None = None
        self._told_withheld: tuple[str, ...] = ()
        #: what is done when other networks are `withheld` than before
        self.withheld_changed: Callable[[], object] = lambda: None

    def hold(self) -> None:
        """The kill switch, before children are started: one that a killed daemon left is never open in between. What
        else that left is taken away. Blocks for some milliseconds; raises MachineError."""
        try:
            self._held_before = self._table.holds()
        except OSError as error:
            raise MachineError(f"routing rules cannot be looked at: {error.strerror}") from error
        parts = self._parts if self._hold else [self._announced.make_true]
        for line in [line for part in parts for line in part()]:
            log.warning("%s", line)

    def begin(self, device: Part) -> None:
        """Look after everything from now on, `device` first."""
        self._reconciler = Reconciler(self._live, [device, *self._parts], self._looked)

    def _looked(self) -> None:
        if self.withheld != self._told_withheld:
            self._told_withheld = self.withheld
            self.withheld_changed()

    @property
    def withheld(self) -> tuple[str, ...]:
        """What this node announces and the machine does not forward to."""
        return self._announced.withheld

    @property
    def _parts(self) -> list[Part]:
        filters = [self._filter.mend] if self._live.config.network.nftables else []
        return [self._announced.make_true, *filters, self.taken, self._forwarding.look]

    def taken(self) -> list[str]:
        """Routes that take traffic out of the VPN, being no wider than its own. Blocks for some milliseconds."""
        network = self._live.config.network
        try:
            met = [] if network.allow_overlap else overlap.in_use()
        except OSError as error:
            return [f"the machine's routes cannot be looked at: {error.strerror}"]
        return [
            f"{entry.what} takes traffic of the VPN's {own} elsewhere: remove it, or set network.allow_overlap = true"
            for own in self._networks
            for entry in met
            if entry.network.prefixlen >= own.prefixlen
            and overlap.find_overlap([own], [entry], network.interface) is not None
        ]

    @property
    def warnings(self) -> list[str]:
        """One line each: what hinders, and what the user can do about it."""
        return [*self._announced.hints, *([self._filter.hint] if self._filter.hint else [])]

    @property
    def exit_peer(self) -> str:
        """The member all other traffic goes through; empty: none."""
        return self._announced.known.exit_peer

    @property
    def ailments(self) -> tuple[Ailment, ...]:
        """What is not as it has to be and could not be mended."""
        problems = self._reconciler.problems if self._reconciler is not None else []
        parted = (line.partition(": ") for line in problems)
        return tuple(Ailment(what=what, remedy=remedy) for what, _, remedy in parted)

    def look(self) -> None:
        """The machine may have changed."""
        if self._reconciler is not None:
            self._reconciler.look()

    def own_changed(self, reason: str) -> None:
        """See Watch."""
        log.debug("checking the machine: %s", reason)
        self.look()

    def is_now(self, own: OwnAddresses) -> None:
        """What the node is in the VPN."""
        self._filter.own, self._announced.advertised = own.addresses, own.advertised
        self._filter.masqueraded = own.advertised if self._live.config.network.masquerade else ()
        self._forwarding.advertised, self._forwarding.members = own.advertised, own.subnets
        self._networks = tuple(map(ipaddress.ip_network, own.subnets))
        self.look()

    def routes_known(self, known: RoutesKnown) -> None:
        """What members announce; routed from now on, in the background, instead of what was before."""
        if known != self._announced.known:
            self._announced.known = known
            self.look()

    async def close(self, *, deliberate: bool) -> None:
        """Take everything back. The kill switch only at a `deliberate` end; a start that failed leaves it as it was."""
        started = self._reconciler is not None
        if self._reconciler is not None:
            await self._reconciler.close()
        keep = self._hold and not deliberate and (started or self._held_before)
        await asyncio.to_thread(self._undo, keep)

    def _undo(self, keep: bool) -> None:
        self._announced.undo(hold=keep)
        if not keep:
            self._filter.remove()
