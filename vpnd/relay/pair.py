"""Two members' sockets joined: what comes from one goes to the other, by splice(2), without passing this process.

    READING   wait for the source to be readable
    WRITING   the pipe holds bytes the other socket does not take: wait for it to be writable
    WAITING   over the limit: the shaper says when to go on
    ENDED     the source has ended and all of it has been passed on, the other socket's sending side is closed

A pair ends when both directions have, when a socket fails, or when nothing has moved for relay.idle_timeout.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from vpnd.api import messages
from vpnd.api.aio import Descriptors

#: An unprivileged user gets 16 MiB of pipes in all (fs.pipe-user-pages-soft), and pipes of 8 KiB beyond: 128 pairs of
#: this size in each direction do with the half of it.
PIPE_BYTES = 1 << 17
SPLICE_NOW = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
#: What a direction may move before others have their turn.
PART = 4 * PIPE_BYTES


class Turns(Protocol):
    """Who may move how much. See relay.main."""

    def join(self, direction: Direction) -> None: ...

    def leave(self, direction: Direction) -> None: ...

    def may_move(self, direction: Direction) -> int: ...

    def moved(self, direction: Direction, count: int) -> None: ...


class Direction:
    """From `source` to `target`. `ended(error)` is called once: empty when the source has said all it had."""

    def __init__(
        self,
        descriptors: Descriptors,
        turns: Turns,
        source: socket.socket,
        target: socket.socket,
        ended: Callable[[str], None],
    ) -> None:
        self._descriptors, self._turns, self._ended = descriptors, turns, ended
        self._source, self._target = source, target
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._room = fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except PermissionError:  # the user has too many pipes: this one stays as small as it is
            self._room = fcntl.fcntl(self._in, fcntl.F_GETPIPE_SZ)
        self._held = 0
        self._at_end = self._reading = self._writing = self._closed = False
        self.bytes = 0
        turns.join(self)
        self._watch(read=True)

    def _watch(self, *, read: bool = False, write: bool = False) -> None:
        if read != self._reading:
            self._reading = read
            if read:
                self._descriptors.add_reader(self._source.fileno(), self._ready)
            else:
                self._descriptors.remove_reader(self._source.fileno())
        if write != self._writing:
            self._writing = write
            if write:
                self._descriptors.add_writer(self._target.fileno(), self._ready)
            else:
                self._descriptors.remove_writer(self._target.fileno())

    def _ready(self) -> None:
        allowed = self._turns.may_move(self)
        if allowed:
            self.move(allowed)
        else:
            self._watch()

    def move(self, allowed: int) -> None:
        """Move up to `allowed` bytes, then wait for whatever is missing."""
        before = self.bytes
        try:
            blocked = self._move(allowed)
        except OSError as error:
            self._end(os.strerror(error.errno or 0).lower())
            return
        self._turns.moved(self, self.bytes - before)
        if self._held:
            self._watch(write=True)
        elif self._at_end:
            self._end("")
        elif blocked or self.bytes > before:
            self._watch(read=True)

    def _move(self, allowed: int) -> bool:
        """True when the source has nothing more for now. Raises OSError."""
        while allowed > 0:
            blocked, most = False, min(allowed, self._room - self._held)
            if most > 0 and not self._at_end:
                try:
                    got = os.splice(self._source.fileno(), self._in, most, flags=SPLICE_NOW)
                except BlockingIOError:
                    blocked = True
                else:
                    self._held += got
                    self._at_end = not got
                    # Less than there is room for: asking once more would most likely be in vain.
                    blocked = got < most
            if not self._held:
                return True
            try:
                put = os.splice(self._out, self._target.fileno(), self._held, flags=SPLICE_NOW)
            except BlockingIOError:
                return blocked
            self._held -= put
            self.bytes += put
            allowed -= put
            if blocked and not self._held:
                return True
        return False

    def _end(self, error: str) -> None:
        if self._closed:
            return
        self.close()
        if not error:
            try:
                self._target.shutdown(socket.SHUT_WR)
            except OSError as failure:
                error = os.strerror(failure.errno or 0).lower()
        self._ended(error)

    def close(self) -> None:
        """Stop. The sockets stay the pair's. Idempotent."""
        if not self._closed:
            self._closed = True
            self._watch()
            self._turns.leave(self)
            os.close(self._out)
            os.close(self._in)


class Pair:
    """Owns both sockets. `ended(pair, reason)` is called once, after they are closed, unless `close` was."""

    def __init__(
        self,
        descriptors: Descriptors,
        turns: Turns,
        about: messages.RelayPair,
        first: socket.socket,
        second: socket.socket,
        ended: Callable[[Pair, str], None],
    ) -> None:
        self.number, self.members = about.number, about.members
        self._sockets = (first, second)
        self._told = ended
        self._open = 2
        self._seen_bytes, self.active_s = 0, monotonic()
        self._directions = tuple(
            Direction(descriptors, turns, source, target, self._direction_ended)
            for source, target in ((first, second), (second, first))
        )

    @property
    def bytes(self) -> int:
        """Moved so far, both ways."""
        return sum(direction.bytes for direction in self._directions)

    def idle_s(self, now_s: float) -> float:
        """How long nothing has moved, as of the last call."""
        if self.bytes != self._seen_bytes:
            self._seen_bytes, self.active_s = self.bytes, now_s
        return now_s - self.active_s

    def _direction_ended(self, error: str) -> None:
        self._open -= 1
        if error or not self._open:
            self.end(error or "both ends have closed")

    def end(self, reason: str) -> None:
        """Close, and tell."""
        self.close()
        self._told(self, reason)

    def close(self) -> None:
        """Close both sockets. Idempotent."""
        for direction in self._directions:
            direction.close()
        for sock in self._sockets:
            sock.close()
