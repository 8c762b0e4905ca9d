"""Destinations that no peer has, in networks where single addresses have owners: control is asked for them.

Off the packet path: asked about when a flow begins, not with its packets. An address is asked for once in
registry.negative_lifetime, and no more than registry.max_waiting addresses are; then all flows without a destination
are looked at again with their next packet, so who goes on sending goes on asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shards.flow.prefixes import Prefixes, set_of
from vpnd.config.live import Live


class Unowned:
    """Owner: shard loop. `ask(address)` asks control. `again()`: flows without a destination look for one anew.
    `later(seconds, call)` is the loop's call_later."""

    def __init__(
        self,
        live: Live,
        ask: Callable[[int], None],
        again: Callable[[], None],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._live, self._ask, self._again, self._later = live, ask, again, later
        self._networks: Prefixes[bool] = Prefixes()
        self._asked: set[int] = set()
        self._waits = False

    def govern(self, networks: Iterable[str]) -> None:
        """Ask for addresses of these; also when control is a new one, which knows nothing of what was asked before."""
        self._networks = set_of(networks)
        self._asked.clear()
        self._again()

    def seen(self, version: int, address: int) -> None:
        """A flow begins to an address that nobody has."""
        if version != 4 or address in self._asked or not self._networks.find(version, address):
            return
        if len(self._asked) >= self._live.config.registry.max_waiting:
            return
        if not self._waits:
            self._waits = True
            self._later(self._live.config.registry.negative_lifetime, self._over)
        self._asked.add(address)
        self._ask(address)

    def _over(self) -> None:
        self._waits = False
        self._asked.clear()
        self._again()
