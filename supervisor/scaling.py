"""How many shards there are, and changes of it while packets flow.

up    start the new shards; each takes new flows from the moment it is up, flows that are there stay
down  the highest indexes leave: their flows move at once, then each empties its ring and queues and ends; control
      hears of it only then, so that the sessions work until the last packet is out
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from supervisor.fleet import Fleet, all_or_error
from vpnd.errors import VpndError

log = logging.getLogger("supervisor")


class Scaling:
    """Owner: supervisor loop. `asked_for`: the number of shards last asked for, if any."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._changing: asyncio.Task[dict[str, Any]] | None = None
        self.asked_for: int | None = None

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
        self.asked_for = count
        log.info("%d shards, there were %d; %d flows moved", count, before, moved)
        return {
            "before": before,
            "shards": count,
            "added": list(range(before, count)),
            "removed": list(range(count, before)),
            "flows_moved": moved,
        }
