"""Settings reach the code of a process in one way: through its `Live` cell.

    live = Live(start.config)                                     # one in each process
    self._live.config.worker.idle_timeout                         # read where it is used, off the packet path
    live.watch(lambda config: config.metrics.interval, retime)    # for what must act: a timer, a limit kept elsewhere
    live.take(message.config)                                     # on Reconfigure

What is made from a setting when a connection or a queue is made keeps that value; everything else reads the cell again.
"""

from __future__ import annotations

from collections.abc import Callable

from vpnd.config.schema import Config


class Live:
    """The configuration in force in this process. Keep no part of `config`. Owner: the process's loop."""

    __slots__ = ("_watchers", "config")

    def __init__(self, config: Config) -> None:
        self.config = config
        self._watchers: list[tuple[Callable[[Config], object], Callable[[], object]]] = []

    def watch(self, part: Callable[[Config], object], changed: Callable[[], object]) -> None:
        """Call `changed` whenever `part` of the configuration has another value, for as long as the process lives:
        what comes and goes (a peer, a session) is called by what holds it."""
        self._watchers.append((part, changed))

    def take(self, config: Config) -> None:
        """`config` is in force from now on. Watchers are called in the order in which they were added, and find
        the whole of it in the cell."""
        before, self.config = self.config, config
        for part, changed in self._watchers:
            if part(config) != part(before):
                changed()
