"""The messages of the process that forks children; part of `vpnd.api.messages`, where they are to be had."""

from __future__ import annotations

from vpnd.api.rules import NURSERY_TO_SUPERVISOR, SUPERVISOR_TO_NURSERY, Message, Rule, single
from vpnd.config.schema import Config


class NurseryStart(Message, frozen=True):
    """What children of this node run: the packages whose module `main` is imported, and may be forked."""

    rule = Rule((SUPERVISOR_TO_NURSERY,), first=True)

    config: Config
    modules: tuple[str, ...]


class Fork(Message, frozen=True):
    """Fork a child that runs `module`, with its end of a channel to the supervisor."""

    rule = Rule((SUPERVISOR_TO_NURSERY,), descriptors=single("the child's channel"))

    module: str


class Forked(Message, frozen=True):
    """It is there. `pid`: 0 if it could not be forked, `error` says why."""

    rule = Rule((NURSERY_TO_SUPERVISOR,), after=(Fork,))

    pid: int
    error: str
