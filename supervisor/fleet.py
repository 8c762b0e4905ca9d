"""All children of a node: control and the shards, who is introduced to whom, and how many shards there are.

    scale up    start the new shards; each takes new flows from the moment it is up, flows that are there stay
    scale down  the highest indexes leave: their flows move at once, then each empties its ring and queues and ends;
                control hears of it only then, so that the sessions work until the last packet is out

A shard that left keeps its slot: its counters stay in every sum, and it goes on counting from there when it comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from supervisor.children import Child, State
from supervisor.network.tun import Tun
from supervisor.priority import Priorities
from supervisor.pump import Pump
from supervisor.slots import Slot
from vpnd.api import channel, messages, parts
from vpnd.api.reports import OwnAddresses
from vpnd.config.schema import Config
from vpnd.errors import VpndError, of_kind
from vpnd.metrics import CONTROL_COUNTERS, create_page

log = logging.getLogger("supervisor")

#: Shards when worker.shards is 0: one per CPU, but no more than this; a flow uses one of them.
MOST_AUTOMATIC_SHARDS = 4


#: What an argument of a command may be.
Argument = str | int | float | bool | None


_ANSWERS = messages.ControlStatus | messages.ShardStatus | messages.ProbeAnswer | messages.Answer


class ControlListener(Protocol):
    """Who is told what control says by itself."""

    def control_up(self, own: OwnAddresses | None) -> None:
        """Control is up, perhaps again, and says what the node is in its network (None: it is in none)."""

    def own_changed(self, own: OwnAddresses) -> None:
        """The node has other addresses from now on."""

    def routes_known(self, known: messages.RoutesKnown) -> None:
        """Members announce other networks from now on."""


class Fleet:
    """Owner: supervisor loop. `start`, then `stop`, then `close`, once each.

    `control_start` is control's first message, of which the configuration is kept up to date, and a token forgotten
    when it has served. `identity_fd`, and `network_fd` of a node that is in a network, stay the caller's. `own`: what
    packets may be addressed to, as far as known before control is up. `count` is how many shards there are meant to
    be, `scaled_to` the number last asked for, if any.
    """

    def __init__(
        self,
        config: Config,
        control_start: messages.ControlStart,
        identity_fd: int,
        network_fd: int | None,
        own: tuple[str, ...],
        tun: Tun,
        pump: Pump,
        listener: ControlListener,
    ) -> None:
        self._config, self._control_start = config, control_start
        self._tun, self._pump = tun, pump
        self._identity_fd, self._network_fd = identity_fd, network_fd
        self._own, self._listener = own, listener
        self._loop = asyncio.get_running_loop()
        self._serials = itertools.count(1)
        self._answers: dict[tuple[str, int], asyncio.Future[Any]] = {}
        self._parts: dict[tuple[str, int], list[Any]] = {}  # of answers that are not complete yet
        self._scaling: asyncio.Task[dict[str, Any]] | None = None
        self.scaled_to: int | None = None
        self._closing = contextlib.ExitStack()
        self.control_page, self._page_fd = create_page(CONTROL_COUNTERS, "vpnd-counters-control")
        self._closing.callback(self.control_page.close)
        self._closing.callback(os.close, self._page_fd)
        self._control_given = config
        self.control = Child(
            "control",
            "vpnd.control",
            "control",
            config.process,
            self._begin_control,
            self._control_up,
            self._control_down,
            self._on_control,
        )
        if control_start.token:
            self.control.more_time_s = config.membership.join_timeout
        self.priorities = Priorities()
        self.slots: list[Slot] = []
        self.shards: list[Child] = []
        self.count = config.worker.shards or min(len(os.sched_getaffinity(0)), MOST_AUTOMATIC_SHARDS)
        self._make_shards(self.count)

    async def start(self) -> None:
        """All at once; the slowest is control, which loads libp2p. Raises what the first one failed with; `stop`
        then."""
        await _all_or_error(child.start() for child in (self.control, *self.shards))

    async def stop(self) -> None:
        """Shards first, so that their last words reach control. A change of their number is broken off."""
        if self._scaling is not None:
            self._scaling.cancel()
            await asyncio.wait({self._scaling})
        await asyncio.gather(*(shard.stop() for shard in self.shards))
        await self.control.stop()

    def close(self) -> None:
        """Give the pages and rings back. Nobody may run any more."""
        for slot in self.slots:
            slot.close()
        self._closing.close()

    @property
    def present(self) -> list[tuple[Slot, Child]]:
        """The shards there are meant to be, and those that are still leaving."""
        return [pair for pair in self._pairs() if self._is_present(*pair)]

    @property
    def retired(self) -> list[tuple[Slot, Child]]:
        """The shards that were there and may come back."""
        return [pair for pair in self._pairs() if not self._is_present(*pair)]

    def _pairs(self) -> list[tuple[Slot, Child]]:
        # not strict: the exporter's thread may look when a slot is there and its child is not yet
        return list(zip(self.slots, self.shards, strict=False))

    def _is_present(self, slot: Slot, shard: Child) -> bool:
        return slot.index < self.count or shard.state is not State.STOPPED

    @property
    def ready(self) -> bool:
        """Whether all that is meant to be there is up."""
        return all(child.state is State.UP for child in (self.control, *self.shards[: self.count]))

    # --- control

    def _begin_control(self) -> tuple[messages.Message, tuple[int, ...]]:
        self.priorities.starts(self.control, self._config.process)
        os.lseek(self._identity_fd, 0, os.SEEK_SET)  # the offset is shared with the children before
        self._control_given = self._config
        first = msgspec.structs.replace(self._control_start, config=self._config)
        descriptors = (self._identity_fd, self._page_fd)
        return first, descriptors if self._network_fd is None else (*descriptors, self._network_fd)

    def _control_up(self, control: Child) -> None:
        self._control_start = msgspec.structs.replace(self._control_start, token="")
        control.more_time_s = 0.0
        self.priorities.usual(control)
        self._catch_up(control, self._control_given)
        for index, shard in enumerate(self.shards):
            if shard.state is State.UP:
                self._introduce(index, shard)
        self._listener.control_up(control.own)

    def _control_down(self, control: Child) -> None:
        """Sessions go on without it; shards see their channels close."""
        self._no_answers(control)

    def _on_control(self, message: messages.Message) -> None:
        match message:
            case messages.OwnChanged(own=own):
                self.control.own = own
                self._listener.own_changed(own)
            case messages.RoutesKnown():
                self._listener.routes_known(message)
            case _:
                self._on_answer("control", message)

    # --- shards

    def _make_shards(self, count: int) -> None:
        for index in range(len(self.slots), count):
            self._make_shard(index)

    def _make_shard(self, index: int) -> None:
        slot = Slot(index, self._pump)
        shard = Child(
            f"shard {index}",
            "shards",
            "shard",
            self._config.process,
            lambda: self._begin_shard(slot),
            lambda child: self._shard_up(slot, child),
            lambda child: self._shard_down(slot, child),
            lambda message: self._on_shard(slot, message),
        )
        self.slots.append(slot)
        self.shards.append(shard)

    def _begin_shard(self, slot: Slot) -> tuple[messages.Message, tuple[int, ...]]:
        self.priorities.starts(self.shards[slot.index], self._config.process)
        return slot.begin(self._config, self._own, self._tun)

    def _shard_up(self, slot: Slot, shard: Child) -> None:
        self._catch_up(shard, slot.given)
        self.priorities.carries_packets(shard, self._config.process)
        if slot.own_given != self._own:
            shard.send(messages.OwnPrefixes(own=self._own))
        slot.up()
        self._introduce(slot.index, shard)

    def _shard_down(self, slot: Slot, shard: Child) -> None:
        slot.ended()
        self._no_answers(shard)
        self.control.send(messages.ShardLeft(index=slot.index))

    def _introduce(self, index: int, shard: Child) -> None:
        """Give control and a shard the two ends of a channel of their own."""
        if self.control.state is not State.UP:
            return
        controls, shards = channel.pair()
        with controls, shards:
            self.control.send(messages.ShardArrived(index=index), (controls.fileno(),))
            shard.send(messages.ControlArrived(), (shards.fileno(),))

    def kill_broken(self, reason: str) -> None:
        """A shard wrote nonsense into the header of the ring to it: find out which one."""
        for slot, shard in self.present:
            if slot.port is not None and slot.port.to_shard.broken():
                slot.ended()
                shard.kill(reason)

    # --- changes

    def broadcast(self, message: messages.Message) -> None:
        """To control and every shard that is up."""
        for child in (self.control, *self.shards):
            if child.state is State.UP:
                child.send(message)

    def reconfigure(self, config: Config) -> None:
        """From now on this configuration. Children that are starting get it when they are up."""
        self._config = config
        for child in (self.control, *self.shards):
            child.settings = config.process
        self.broadcast(messages.Reconfigure(config=config))
        for _, shard in self.present:
            self.priorities.carries_packets(shard, self._config.process)

    def set_own(self, own: tuple[str, ...]) -> None:
        """From now on packets may be addressed to these. Shards that are starting get it when they are up."""
        self._own = own
        for shard in self.shards:
            if shard.state in (State.UP, State.DRAINING):
                shard.send(messages.OwnPrefixes(own=own))

    def _catch_up(self, child: Child, given: Config | None) -> None:
        """It was started with `given`; the configuration may have changed before it was up."""
        if given is not self._config:
            child.send(messages.Reconfigure(config=self._config))

    async def scale(self, count: int) -> dict[str, Any]:
        """Change the number of shards; return when it is done: what happened, ready for JSON.

        Raises VpndError while another change is under way, ChildError when a new shard does not get ready: the
        number is then what it was. A caller that is cancelled does not stop the change.
        """
        if self._scaling is not None:
            raise VpndError("the number of shards is being changed already; try again when that is done")
        self._scaling = self._loop.create_task(self._scale(count))
        self._scaling.add_done_callback(self._scaled)
        return await asyncio.shield(self._scaling)

    def _scaled(self, task: asyncio.Task[dict[str, Any]]) -> None:
        self._scaling = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the number of shards stays %d: %s", self.count, error)

    async def _scale(self, count: int) -> dict[str, Any]:
        before, moved = self.count, 0
        added, removed = list(range(before, count)), list(range(count, before))
        if added:
            self._make_shards(count)
            new = [self.shards[index] for index in added]
            try:
                await _all_or_error(shard.start() for shard in new)
            except VpndError:
                await self._leave(added)
                raise
            self.count = count
        elif removed:
            self.count = count
            moved = await self._leave(removed)
        self.scaled_to = count
        log.info("%d shards, there were %d; %d flows moved", count, before, moved)
        return {"before": before, "shards": count, "added": added, "removed": removed, "flows_moved": moved}

    async def _leave(self, indexes: list[int]) -> int:
        """These shards end, their queues emptied. Returns how many flows moved."""
        moved = sum(self.slots[index].leave() for index in indexes)
        for index in (
            indexes
        ):  # what it sent and received until now; what it does while it drains is not told any more
            self.shards[index].send(messages.StatusRequest(serial=next(self._serials)))
        await asyncio.gather(*(self.shards[index].stop(drain=True) for index in indexes))
        return moved

    # --- questions

    def _on_shard(self, slot: Slot, message: messages.Message) -> None:
        if isinstance(message, messages.ShardStatus):
            slot.traffic.told(message.traffic)
        self._on_answer(f"shard {slot.index}", message)

    def _on_answer(self, who: str, message: messages.Message) -> None:
        if isinstance(message, _ANSWERS):
            answer = self._answers.get((who, message.serial))
            if answer is None:  # nobody waits for it any more
                return
            if not isinstance(message, messages.ProbeAnswer):
                said = self._parts.setdefault((who, message.serial), [])
                said.append(message)
                if message.more:
                    return
                message = parts.joined(said)
            if not answer.done():
                answer.set_result(message)

    def _no_answers(self, child: Child) -> None:
        """It is gone: nobody need wait for what it was asked."""
        for (who, _), answer in self._answers.items():
            if who == child.title and not answer.done():
                answer.set_result(None)

    async def ask(self, child: Child, timeout_s: float) -> Any:
        """How a child is: its ControlStatus or ShardStatus, None when it is not up or does not say."""
        return await self._exchange(child, lambda serial: messages.StatusRequest(serial=serial), timeout_s)

    async def probe(self, index: int, destination: str, timeout_s: float) -> messages.ProbeAnswer | None:
        """What shard `index` measures for `vpnd ping`; None as for `ask`."""
        answer: messages.ProbeAnswer | None = await self._exchange(
            self.shards[index],
            lambda serial: messages.ProbeRequest(serial=serial, destination=destination),
            timeout_s,
        )
        return answer

    async def request(self, command: str, arguments: dict[str, Argument], timeout_s: float) -> bytes:
        """Have control carry out a command: its answer, JSON. Raises the error it refuses with, or VpndError when it
        is away or does not answer in time; it may have been carried out then."""
        answer = await self._exchange(
            self.control,
            lambda serial: messages.Request(serial=serial, command=command, arguments=arguments),
            timeout_s,
        )
        if answer is None:
            raise VpndError(f"control has not answered ({self.control.state.value}); see `vpnd status`")
        if answer.error:
            raise of_kind(answer.kind, answer.error)
        result: bytes = answer.result
        return result

    async def _exchange(
        self, child: Child, question: Callable[[int], messages.Message], timeout_s: float
    ) -> Any:
        if child.state is not State.UP:
            return None
        key = child.title, next(self._serials)
        answer = self._answers[key] = self._loop.create_future()
        child.send(question(key[1]))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            return None
        finally:
            self._answers.pop(key, None)
            self._parts.pop(key, None)


async def _all_or_error(starts: Iterable[Any]) -> None:
    """Run all; the first error cancels the others, and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(start)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
