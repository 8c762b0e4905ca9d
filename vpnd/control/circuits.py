"""Saying what has become of circuits: in the log, in the counters, to the shards."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vpnd.api import messages
from vpnd.control.dialstate import CircuitChange
from vpnd.control.planner import Planner
from vpnd.metrics import CounterPage
from vpnd.resilience.breaker import Circuit

log = logging.getLogger(__name__)


class Circuits:
    """Owner: control's loop. `tell` sends to all shards."""

    def __init__(
        self, planner: Planner, page: CounterPage, tell: Callable[[list[messages.Message]], None]
    ) -> None:
        self._planner, self._page, self._tell = planner, page, tell
        self.show()

    def announce(self) -> None:
        """Say what has changed since it was called last."""
        changes = self._planner.take_circuit_changes()
        for change in changes:
            self._changed(change)
        if changes:
            self.show()
            self._tell(
                [messages.PeerCircuit(peer_id=change.member.peer_id, state=change.new) for change in changes]
            )

    def show(self) -> None:
        """Set the gauges; also when peers with their circuits have come or gone."""
        states = list(self._planner.circuits().values())
        self._page.set("circuits_open", states.count(Circuit.OPEN))
        self._page.set("circuits_half_open", states.count(Circuit.HALF_OPEN))

    def _changed(self, change: CircuitChange) -> None:
        # From probe to probe of a peer that stays away nothing is new.
        level = logging.INFO if Circuit.CLOSED in (change.old, change.new) else logging.DEBUG
        why = f": {change.why}" if change.why else ""
        log.log(level, "the circuit of %s is %s%s", change.member.name, change.new, why)
        if change.old is Circuit.CLOSED:
            self._page.add("circuits_opened")
        elif change.new is Circuit.CLOSED:
            self._page.add("circuits_closed")
