"""What rules of messages are made of: from which process to which, when, and with what (`vpnd.api.messages`)."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import msgspec

#: The kernel's limit of one SCM_RIGHTS message is 253; no message carries more than this.
MAX_DESCRIPTORS = 8


class Way(NamedTuple):
    """The roles of the sending and the receiving process."""

    sender: str
    receiver: str

    def __str__(self) -> str:
        return f"{self.sender} to {self.receiver}"


SUPERVISOR_TO_CONTROL = Way("supervisor", "control")
SUPERVISOR_TO_SHARD = Way("supervisor", "shard")
CONTROL_TO_SUPERVISOR = Way("control", "supervisor")
SHARD_TO_SUPERVISOR = Way("shard", "supervisor")
SUPERVISOR_TO_EXPORTER = Way("supervisor", "exporter")
EXPORTER_TO_SUPERVISOR = Way("exporter", "supervisor")
CONTROL_TO_SHARD = Way("control", "shard")
SHARD_TO_CONTROL = Way("shard", "control")
SUPERVISOR_TO_RELAY = Way("supervisor", "relay")
RELAY_TO_SUPERVISOR = Way("relay", "supervisor")
CONTROL_TO_RELAY = Way("control", "relay")
RELAY_TO_CONTROL = Way("relay", "control")
SUPERVISOR_TO_NURSERY = Way("supervisor", "nursery")
NURSERY_TO_SUPERVISOR = Way("nursery", "supervisor")
TO_CHILDREN = (SUPERVISOR_TO_CONTROL, SUPERVISOR_TO_SHARD)
TO_ALL = (*TO_CHILDREN, SUPERVISOR_TO_RELAY, SUPERVISOR_TO_EXPORTER)
TO_SUPERVISOR = (
    CONTROL_TO_SUPERVISOR,
    SHARD_TO_SUPERVISOR,
    RELAY_TO_SUPERVISOR,
    EXPORTER_TO_SUPERVISOR,
    NURSERY_TO_SUPERVISOR,
)


class Descriptors(NamedTuple):
    """What is passed with a message: so many file descriptors, in the order the text names them."""

    least: int
    most: int
    text: str


def single(text: str) -> Descriptors:
    """Of one file descriptor."""
    return Descriptors(1, 1, text)


class Rule(NamedTuple):
    """When a message is permitted on a channel.

    `first`: it opens its way; it comes once, and nothing else goes that way before. `once`: never a second time.
    `after`: these have gone through the channel before, either way.
    """

    ways: tuple[Way, ...]
    first: bool = False
    once: bool = False
    after: tuple[type[Message], ...] = ()
    descriptors: Descriptors = Descriptors(0, 0, "-")


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of all messages. Whatever is derived from it in `vpnd.api.messages` is one."""

    rule: ClassVar[Rule]
