"""A message channel over a SOCK_SEQPACKET socketpair, with descriptor passing.

Without any loop: `Channel` never blocks and never waits. The owner watches `fileno()` with whatever loop
it has (asyncio in supervisor and shards, trio in control), calls `receive` until it returns None, and
`flush` when the socket is writable again while `backlog` is true.
"""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from select import select
from typing import NoReturn, TypeVar, Union

import msgspec

from vpnd.api.ends import MAX_MESSAGE_BYTES
from vpnd.api.messages import ALL, OPENERS, Failed
from vpnd.api.rules import MAX_DESCRIPTORS, Message, Way
from vpnd.errors import ProtocolViolation, VpndError, kind_of

#: Longest one to the supervisor, where packets wait while it is taken apart; what may be longer comes in parts.
MAX_TO_SUPERVISOR_BYTES = 1 << 18

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(
    Union[ALL]  # noqa: UP007 - of a tuple
)


class ChannelClosed(Exception):
    """The other process closed its end or died. Nothing more will come; close the channel."""


def _most_bytes(receiver: str) -> int:
    return MAX_TO_SUPERVISOR_BYTES if receiver == "supervisor" else MAX_MESSAGE_BYTES


class Channel:
    """One end. `here` and `there` are roles of a `rules.Way`: supervisor, control, shard.

    Owner: the loop that watches it; not thread-safe.
    """

    def __init__(self, sock: socket.socket, here: str, there: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._sending, self._receiving = Way(here, there), Way(there, here)
        self._most_out, self._most_in = _most_bytes(there), _most_bytes(here)
        self._gone: dict[Way, set[type[Message]]] = {self._sending: set(), self._receiving: set()}
        self._waiting: deque[tuple[bytes, tuple[int, ...]]] = deque()

    def fileno(self) -> int:
        """The socket's descriptor, for the loop to watch."""
        return self._sock.fileno()

    @property
    def backlog(self) -> bool:
        """True while messages wait for the socket to be writable."""
        return bool(self._waiting)

    @property
    def unread(self) -> int:
        """So many messages wait for that."""
        return len(self._waiting)

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send, or queue when the socket is full.

        Descriptors are duplicated: the caller keeps its own, whatever happens.
        Raises ChannelClosed when the other end is gone, ProtocolViolation for what the message's rule forbids.
        """
        self._check(self._sending, message, len(descriptors))
        data = _encoder.encode(message)
        if len(data) > self._most_out:
            raise ProtocolViolation(f"{type(message).__name__} is too large: {len(data)} bytes")
        if self._waiting or not self._try_send(data, descriptors):
            self._waiting.append((data, tuple(os.dup(fd) for fd in descriptors)))

    def flush(self) -> None:
        """Send what waits. Call when the socket is writable. Raises ChannelClosed."""
        while self._waiting:
            data, descriptors = self._waiting[0]
            if not self._try_send(data, descriptors):
                return
            self._waiting.popleft()
            for fd in descriptors:
                os.close(fd)

    def _try_send(self, data: bytes, descriptors: tuple[int, ...]) -> bool:
        ancillary = []
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._sock.sendmsg([data], ancillary)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        return True

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors (now the caller's to close), or None when there is none yet.

        Raises ChannelClosed at the end, ProtocolViolation for a message that is malformed or breaks its rule; after
        either the channel must be closed.
        """
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(self._most_in, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        descriptors: list[int] = []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                descriptors.extend(numbers)
        if not data:
            raise ChannelClosed("closed by the other process")
        try:
            message = _decoder.decode(data)
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ProtocolViolation(f"{self._receiving}: {type(message).__name__} was cut short")
            self._check(self._receiving, message, len(descriptors))
        except (msgspec.DecodeError, ProtocolViolation) as error:
            for fd in descriptors:
                os.close(fd)
            if isinstance(error, ProtocolViolation):
                raise
            raise ProtocolViolation(f"{self._receiving}: {error}") from error
        return message, descriptors

    def _check(self, way: Way, message: Message, descriptors: int) -> None:
        """Raise ProtocolViolation unless the message's rule permits it now; then it counts as gone."""
        kind, gone = type(message), self._gone[way]
        rule, openers = kind.rule, OPENERS[way]
        if way not in rule.ways:
            wrong = "is not sent this way"
        elif (rule.first or rule.once) and kind in gone:
            wrong = "came a second time"
        elif rule.first and gone:
            wrong = "came late, it opens this way"
        elif not rule.first and openers and gone.isdisjoint(openers):
            wrong = f"came before {' or '.join(opener.__name__ for opener in openers)}"
        elif missing := [
            each for each in rule.after if not any(each in before for before in self._gone.values())
        ]:
            wrong = f"came before {' and '.join(each.__name__ for each in missing)}"
        elif not rule.descriptors.least <= descriptors <= rule.descriptors.most:
            wrong = f"came with {descriptors} descriptors"
        else:
            gone.add(kind)
            return
        raise ProtocolViolation(f"{way}: {kind.__name__} {wrong}")

    def close(self) -> None:
        """Close this end and forget what waits; the other side sees ChannelClosed."""
        for _, descriptors in self._waiting:
            for fd in descriptors:
                os.close(fd)
        self._waiting.clear()
        self._sock.close()


def await_message(channel: Channel) -> tuple[Message, list[int]]:
    """Wait, blocking, for the next message. Raises as `receive` does."""
    while (received := channel.receive()) is None:
        select([channel.fileno()], [], [])
    return received


Start = TypeVar("Start", bound=Message)


def first_message(channel: Channel, kind: type[Start]) -> tuple[Start, list[int]]:
    """Wait, blocking, for the message a child begins its life with; `kind` opens its way. Raises as `receive` does."""
    message, descriptors = await_message(channel)
    assert isinstance(message, kind)
    return message, descriptors


def run_child(name: str, body: Callable[[Channel, int], None]) -> NoReturn:
    """Be a child of the supervisor, with a channel to it on the descriptor in the first argument.

    Runs `body(channel, parent's pid)`, then ends the process. A VpndError out of it is told to the supervisor.
    """
    # Ctrl-C reaches the whole group, and so does the end of a service; the supervisor decides
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent_pid = os.getppid()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), name, "supervisor")
    try:
        body(channel, parent_pid)
    except ChannelClosed:
        pass
    except VpndError as error:
        with contextlib.suppress(ChannelClosed):
            channel.send(Failed(kind=kind_of(error), error=str(error)))
        sys.exit(error.exit_code)
    sys.exit(0)
