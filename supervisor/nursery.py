"""The nursery (vpnd/nursery.py), seen from the supervisor, and the processes that come out of it.

Where there is none, because it is not wanted, does not work on this machine or has just died, a child is a fresh
interpreter: nothing hangs on the nursery but memory and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket

from supervisor import interpreter
from supervisor.interpreter import Begun, Process
from vpnd.api import ends, messages
from vpnd.api.channel import Channel, ChannelClosed
from vpnd.config.live import Live
from vpnd.errors import ProtocolViolation
from vpnd.printable import printable

log = logging.getLogger(__name__)

#: What it has imported, and forks. Not control: see vpnd/nursery.py.
MODULES = ("shards", "vpnd.relay")


class Nursery:
    """Owner: supervisor loop. `start`, `begin`, then `stop`."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._loop = asyncio.get_running_loop()
        self._process: Process | None = None
        self._pidfd = -1
        self._channel: Channel | None = None
        self._ready = False
        self._hanging: asyncio.TimerHandle | None = None
        #: whether it is ready, or has ended
        self._known = asyncio.Event()

    async def start(self) -> None:
        """Return when it can fork, or it is known that it cannot. Raises OSError."""
        settings = self._live.config.process
        if settings.fork_timeout:
            self._open()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._known.wait(), settings.ready_timeout)

    async def stop(self) -> None:
        """End it; what it forked goes on."""
        self._end()
        if self._process is not None:
            await self._known.wait()

    def begin(self, module: str) -> tuple[Process, socket.socket]:
        """A new process that runs `module`, and our end of a channel to it. Raises OSError."""
        if module in MODULES and self._live.config.process.fork_timeout:
            if self._process is None:
                self._open()  # for the next one
            elif self._channel is not None and self._ready and (forked := self._fork(module)):
                return forked
        return interpreter.begin(module)

    def _fork(self, module: str) -> tuple[Process, socket.socket] | None:
        assert self._channel is not None
        patience_s = self._live.config.process.fork_timeout
        ours, theirs = ends.pair()
        try:
            with theirs:
                self._channel.send(messages.Fork(module=module), (theirs.fileno(),))
            if not select.select([self._channel.fileno()], [], [], patience_s)[0]:
                self._late(patience_s)
            else:
                match self._channel.receive():
                    case (messages.Forked(pid=pid), _) if pid:
                        return Begun(pid), ours
                    case (messages.Forked(error=error), _):
                        self._broken(error)
        except (ChannelClosed, ProtocolViolation) as error:
            self._broken(str(error))
        ours.close()  # what may be forked yet sees that nobody wants it
        return None

    def _late(self, patience_s: float) -> None:
        """On a busy machine it comes later, and on a machine that is not it hangs."""
        log.warning("nursery: nothing was forked within %g s", patience_s)
        self._ready = False
        assert self._channel is not None
        self._loop.add_reader(self._channel.fileno(), self._heard)
        patience_s = self._live.config.process.ready_timeout
        self._hanging = self._loop.call_later(patience_s, self._broken, f"it has hung for {patience_s:g} s")

    # --- its process

    def _open(self) -> None:
        self._process, ours = interpreter.begin("vpnd.nursery")
        self._pidfd = os.pidfd_open(self._process.pid)
        self._channel = Channel(ours, "supervisor", "nursery")
        self._ready = False
        self._known.clear()
        self._loop.add_reader(self._pidfd, self._exited)
        self._loop.add_reader(self._channel.fileno(), self._heard)
        self._channel.send(messages.NurseryStart(config=self._live.config, modules=MODULES))

    def _heard(self) -> None:
        """That it is ready, or why it cannot be, or that it has forked what is not wanted any more. Other answers are
        read where they are waited for."""
        assert self._channel is not None
        try:
            match self._channel.receive():
                case (messages.Ready(), _):
                    self._now_ready()
                case (messages.Forked(pid=pid), _):
                    self._now_ready()
                    if pid:
                        os.kill(pid, signal.SIGKILL)
                        Begun(pid).wait()
                case (messages.Failed(error=error), _):
                    self._broken(error)
        except (ChannelClosed, ProtocolViolation) as error:
            self._broken(str(error))

    def _now_ready(self) -> None:
        assert self._channel is not None
        self._loop.remove_reader(self._channel.fileno())
        self._stop_waiting()
        self._ready = True
        self._known.set()

    def _stop_waiting(self) -> None:
        if self._hanging is not None:
            self._hanging.cancel()
            self._hanging = None

    def _broken(self, reason: str) -> None:
        log.warning("nursery: %s; children are fresh interpreters meanwhile", printable(reason))
        self._end()

    def _end(self) -> None:
        self._stop_waiting()
        if self._channel is not None:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
            self._channel = None
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _exited(self) -> None:
        assert self._process is not None
        if self._channel is not None:
            self._broken("it has ended")
        self._process.wait()
        self._process = None
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._known.set()
