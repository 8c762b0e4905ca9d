"""All children of a node, control and the shards: who is introduced to whom, and what they have to hear.

A shard that was scaled away (`Scaling`) keeps its slot: its counters stay in every sum, and it goes on
counting from there when it comes back.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from supervisor.children import AnySlot, Child, State, introduce
from supervisor.datagrams import DatagramPort
from supervisor.network.tun import Tun
from supervisor.nursery import Nursery
from supervisor.overlay import Overlay
from supervisor.pacing import Priorities
from supervisor.pump import Pump
from supervisor.questions import Questions
from supervisor.relaying import RelayChild
from supervisor.slots import ControlSlot, ShardSlot
from vpnd.api import messages
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.errors import VpndError
from vpnd.metrics import CounterPage
from vpnd.printable import many

#: Shards when worker.shards is 0: one per CPU, but no more than this; a flow uses one of them.
MOST_AUTOMATIC_SHARDS = 4


class Fleet:
    """Owner: supervisor loop. `start`, then `stop`, then `close`, once each.

    `control_slot` is closed here. `overlay` hears what control says the node is in its network. `count` is how many
    shards there are meant to be.
    """

    def __init__(self, live: Live, control_slot: ControlSlot, overlay: Overlay, tun: Tun, pump: Pump) -> None:
        self._live, self._overlay, self._tun, self._pump = live, overlay, tun, pump
        self._datagrams = DatagramPort(live)
        self.questions = Questions()
        self.priorities = Priorities(live)
        self.nursery = Nursery(live)
        self.control = Child(
            control_slot,
            live,
            self.priorities,
            self.nursery,
            self._control_up,
            self._control_down,
            self._control_said,
        )
        self.relay = RelayChild(live, self.priorities, self.nursery, self.control)
        #: those that no packet of ours depends on: the relay, and what who starts them adds
        self.others: list[Child[Any]] = [self.relay.child]
        self.shards: list[Child[ShardSlot]] = []
        self.count = self.shards_of(live.config)
        self.make_shards(self.count)
        #: what is done when a peer asks why its packets do not arrive
        self.walk_wanted: Callable[[messages.WalkWanted], object] = lambda wanted: None
        live.watch(lambda config: config, self._reconfigured)

    async def start(self) -> None:
        """All at once; the slowest is control, which loads libp2p meanwhile. Raises what the first one failed with;
        `stop` then."""
        await all_or_error((self.control.start(), self._start_shards()))

    async def _start_shards(self) -> None:
        await self.nursery.start()
        await all_or_error(shard.start() for shard in self.shards)

    async def stop(self) -> None:
        """Shards first, so that their last words reach control."""
        await asyncio.gather(*(shard.stop() for shard in self.shards))
        await self.relay.stop()
        await self.control.stop()
        await self.nursery.stop()

    def close(self) -> None:
        """Give the pages and rings back. Nobody may run any more."""
        for child in (*self.children, self.relay.child):
            child.slot.close()
        self._datagrams.close()

    @staticmethod
    def shards_of(config: Config) -> int:
        """How many a configuration means."""
        return config.worker.shards or min(len(os.sched_getaffinity(0)), MOST_AUTOMATIC_SHARDS)

    @property
    def children(self) -> tuple[Child[ControlSlot] | Child[ShardSlot], ...]:
        """All of them, those that are away too."""
        return (self.control, *self.shards)

    @property
    def slots(self) -> list[ShardSlot]:
        """Of all shards there are or were."""
        return [shard.slot for shard in self.shards]

    @property
    def present(self) -> list[tuple[ShardSlot, Child[ShardSlot]]]:
        """The shards there are meant to be, and those that are still leaving."""
        return [(shard.slot, shard) for shard in self.shards if self._is_present(shard)]

    @property
    def retired(self) -> list[tuple[ShardSlot, Child[ShardSlot]]]:
        """The shards that were there and may come back."""
        return [(shard.slot, shard) for shard in self.shards if not self._is_present(shard)]

    def _is_present(self, shard: Child[ShardSlot]) -> bool:
        return shard.slot.index < self.count or shard.state is not State.STOPPED

    @property
    def ready(self) -> bool:
        """Whether all that is meant to be there works."""
        wanted = self.shards[: self.count]
        return self.control.works and all(shard.works for shard in wanted)

    @property
    def control_page(self) -> CounterPage:
        """What control counts."""
        return self.control.slot.page

    # --- control

    def _control_up(self, control: Child[ControlSlot]) -> None:
        control.slot.token = ""  # it has served
        self.priorities.usual(control.pid)
        self._catch_up(control, control.slot.given)
        opened = self._datagrams.open()
        for shard in self.shards:
            if opened:
                self._datagrams.give(shard.slot.index, shard.send)
            self._introduce(shard)
        self.relay.introduce()
        self.tell_withheld()
        if control.own is not None and self._overlay.change(control.own):
            self.tell_own()

    def _control_down(self, control: Child[ControlSlot]) -> None:
        """Sessions go on without it; shards see their channels close."""
        control.slot.page.mend()
        self.questions.gone(control)

    def _control_said(self, control: Child[ControlSlot], message: messages.Message) -> None:
        match message:
            case messages.OwnChanged(own=own):
                if self._overlay.change(own):
                    self.tell_own()
                control.own = own
            case messages.RelayWanted() if self._live.config.relay.serve:
                self.relay.want()
            case messages.WalkWanted():
                self.walk_wanted(message)
            case messages.RoutesKnown():
                self._overlay.route(message)
            case _:
                self.questions.heard(control, message)

    # --- shards

    def make_shards(self, count: int) -> list[Child[ShardSlot]]:
        """Have at least so many, those that are new not started. All of them."""
        for index in range(len(self.shards), count):
            slot = ShardSlot(index, self._live, self._overlay, self._tun, self._pump)
            self.shards.append(
                Child(
                    slot,
                    self._live,
                    self.priorities,
                    self.nursery,
                    self._shard_up,
                    self._shard_down,
                    self._shard_said,
                )
            )
        return self.shards

    def _shard_up(self, shard: Child[ShardSlot]) -> None:
        self._catch_up(shard, shard.slot.given)
        self.priorities.carries_packets(shard.pid)
        if shard.slot.own_given != self._overlay.prefixes:
            shard.send(messages.OwnPrefixes(own=self._overlay.prefixes))
        shard.slot.up()
        self._datagrams.give(shard.slot.index, shard.send)
        self._introduce(shard)

    def _shard_down(self, shard: Child[ShardSlot]) -> None:
        shard.slot.ended()
        self.questions.gone(shard)
        self.control.send(messages.ShardLeft(index=shard.slot.index))

    def _shard_said(self, shard: Child[ShardSlot], message: messages.Message) -> None:
        if isinstance(message, messages.ShardStatus):
            shard.slot.told(message.traffic)
        self.questions.heard(shard, message)

    def _introduce(self, shard: Child[ShardSlot]) -> None:
        introduce(self.control, messages.ShardArrived(index=shard.slot.index), shard)

    async def leave(self, shards: Sequence[Child[ShardSlot]]) -> int:
        """These end, their queues emptied. Returns how many flows moved."""
        moved = sum(shard.slot.leave() for shard in shards)
        for (
            shard
        ) in shards:  # what it sent and received until now; of what it does while it drains nothing is told
            self.questions.last_words(shard)
        await asyncio.gather(*(shard.stop(drain=True) for shard in shards))
        return moved

    def kill_broken(self, reason: str) -> None:
        """A shard wrote nonsense into the header of the ring to it: find out which one."""
        for slot, shard in self.present:
            if slot.port is not None and slot.port.to_shard.broken():
                slot.ended()
                shard.kill(reason)

    # --- what changes for all

    def broadcast(self, message: messages.Message) -> None:
        """To control and every shard that is up."""
        for child in self.children:
            if child.state is State.UP:
                child.send(message)

    def tell_own(self) -> None:
        """The node has other addresses. Shards that are starting hear it when they are up."""
        for shard in self.shards:
            shard.send(messages.OwnPrefixes(own=self._overlay.prefixes))
        self._overlay.give_names(self.control.send)

    def tell_withheld(self) -> None:
        """The machine forwards to other networks than before."""
        self.control.send(messages.Withheld(routes=self._overlay.withheld))

    def _reconfigured(self) -> None:
        """Children that are starting get the configuration when they are up."""
        self.broadcast(messages.Reconfigure(config=self._live.config))
        self.relay.reconfigured()
        for _, shard in self.present:
            self.priorities.carries_packets(shard.pid)

    def _catch_up(self, child: Child[AnySlot], given: Config | None) -> None:
        """It was started with `given`; the configuration may have changed before it was up."""
        if given is not self._live.config:
            child.send(messages.Reconfigure(config=self._live.config))


async def all_or_error(starts: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first error cancels the others, and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(start)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


log = logging.getLogger("supervisor")


class Scaling:
    """Owner: supervisor loop."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._changing: asyncio.Task[dict[str, Any]] | None = None

    async def scale(self, count: int) -> dict[str, Any]:
        """Change the number of shards; return when it is done: what happened, ready for JSON.

        Raises VpndError while another change is under way, ChildError when a new shard does not get ready: the
        number is then what it was. A caller that is cancelled does not stop the change.
        """
        if self._changing is not None:
            raise VpndError("the number of shards is being changed already; try again when that is done")
        self._changing = asyncio.get_running_loop().create_task(self._scale(count))
        self._changing.add_done_callback(self._changed)
        return await asyncio.shield(self._changing)

    async def stop(self) -> None:
        """Break off a change that is under way."""
        if self._changing is not None:
            self._changing.cancel()
            await asyncio.wait({self._changing})

    def _changed(self, task: asyncio.Task[dict[str, Any]]) -> None:
        self._changing = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the number of shards stays %d: %s", self._fleet.count, error)

    async def _scale(self, count: int) -> dict[str, Any]:
        fleet = self._fleet
        before, moved = fleet.count, 0
        if count > before:
            new = fleet.make_shards(count)[before:count]
            try:
                await all_or_error(shard.start() for shard in new)
            except VpndError:
                await fleet.leave(new)
                raise
            fleet.count = count
        elif count < before:
            fleet.count = count
            moved = await fleet.leave(fleet.shards[count:before])
        log.info("%s, before: %d; %s moved", many(count, "shard"), before, many(moved, "flow"))
        return {
            "before": before,
            "shards": count,
            "added": list(range(before, count)),
            "removed": list(range(count, before)),
            "flows_moved": moved,
        }
