"""Keeping the directory on disk while it changes: soon, in the background, and once more at the end.

Removals are kept at once, and what this node signed as an authority before anybody hears of it: a member that its own
authority has forgotten could not come back. Of everything else little is lost with the seconds before a crash: it
comes again from the other members.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from vpnd.membership.statements import Statement
from vpnd.membership.store import Store, StoreError

log = logging.getLogger(__name__)


class Saver:
    """Writes what `statements` gives into the store, at most once in `interval_s`; what could not be written, again
    after `retry_s`. Owner: control; `run` once.

    `problem`: why what is known is not on disk; empty when it is.
    """

    def __init__(
        self, store: Store, statements: Callable[[], list[bytes]], interval_s: float, retry_s: float
    ) -> None:
        self._store = store
        self._statements = statements
        self._interval_s = interval_s
        self._retry_s = retry_s
        self.problem = ""
        self._dirty = trio.Event()
        self._urgent = trio.Event()
        self._off = False

    def changed(self, *, urgent: bool = False) -> None:
        """There is something to keep; `urgent`: do not wait for more."""
        self._dirty.set()
        if urgent:
            self._urgent.set()

    def ahead(self, signed: list[Statement]) -> None:
        """Keep everything, and what is to be known next, before returning. Raises StoreError; the file is as it was."""
        if not self._off:
            self._store.save_statements([*self._statements(), *(one.wire for one in signed)])
            self.changed()

    def stop(self) -> None:
        """From now on nothing is written: the files are of another network."""
        self._off = True

    def forget(self) -> None:
        """Leave the network: its files go, and nothing is written any more. Raises StoreError."""
        self._off = True
        self._store.forget()

    async def run(self) -> None:
        """Save until cancelled, and then what is left."""
        try:
            while True:
                await self._dirty.wait()
                with trio.move_on_after(self._interval_s):
                    await self._urgent.wait()
                self._dirty, self._urgent = trio.Event(), trio.Event()
                if not self._off:
                    # a thread, because the disk may take its time; it is waited for even when this is cancelled
                    await trio.to_thread.run_sync(self._save, self._statements())
                if self.problem:
                    self._dirty.set()
                    with trio.move_on_after(self._retry_s):
                        await self._urgent.wait()
        finally:
            if self._dirty.is_set() and not self._off:
                self._save(self._statements())

    def _save(self, wires: list[bytes]) -> None:
        try:
            self._store.save_statements(wires)
        except StoreError as error:
            if str(error) != self.problem:
                log.error("%s; trying again. Until then changes are lost if the node ends", error)
            self.problem = str(error)
        else:
            self.problem = ""
