"""One child process: started, watched, started again when it dies.

A child begins (supervisor/nursery.py) with one descriptor, its channel. Everything else it needs comes with its first
message. States and what leads from one to the next:

    STARTING --Ready--> UP --exit, channel closed--> WAITING --backoff over--> STARTING …
    STARTING --Failed, exit, process.ready_timeout--> WAITING
    UP --stop(drain=True)--> DRAINING --exit, or killed--> STOPPED
    any --stop()--> STOPPED --start()--> STARTING
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from supervisor.interpreter import Process
from supervisor.nursery import Nursery
from supervisor.pacing import Priorities
from vpnd import errors, seccomp
from vpnd.api import channel, ends, messages
from vpnd.api.aio import LoopChannel
from vpnd.api.reports import OwnAddresses
from vpnd.config.live import Live
from vpnd.errors import ProtocolViolation
from vpnd.printable import printable

log = logging.getLogger(__name__)


class State(enum.Enum):
    """See the module's docstring."""

    STARTING = "starting"
    UP = "up"
    WAITING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"


#: Of the supervisor's time, what the messages of one child may take at most while it goes on sending: packets wait.
CHANNEL_SHARE = 0.1
#: Messages a child may leave unread; an honest one has a handful.
MOST_UNREAD = 4096


class Slot(Protocol):
    """What is there before, between and after the processes of a child."""

    @property
    def title(self) -> str:
        """The child's name in logs and errors."""

    @property
    def role(self) -> str:
        """Its end of the channel, as vpnd.api.messages names it."""

    @property
    def module(self) -> str:
        """What its interpreter runs."""

    @property
    def more_time_s(self) -> float:
        """What its process may take to get ready beyond process.ready_timeout."""

    def begin(self) -> tuple[messages.Message, tuple[int, ...]]:
        """The first message for a new process, and its descriptors, which stay the slot's."""


AnySlot = TypeVar("AnySlot", bound=Slot)


def introduce(control: Child[Any], arrived: messages.Message, other: Child[Any]) -> None:
    """Give control and another child, if both are up, the ends of a channel of their own. `arrived` tells control who
    that is."""
    if control.state is State.UP and other.state is State.UP:
        controls, others = ends.pair()
        with controls, others:
            control.send(arrived, (controls.fileno(),))
            other.send(messages.ControlArrived(), (others.fileno(),))


class Child(Generic[AnySlot]):
    """Owner: supervisor loop.

    `on_up` is called at Ready, `on_down` whenever a process of this child is gone, before the next is started;
    `on_message` gets the rest.
    """

    def __init__(
        self,
        slot: AnySlot,
        live: Live,
        priorities: Priorities,
        nursery: Nursery,
        on_up: Callable[[Child[AnySlot]], None],
        on_down: Callable[[Child[AnySlot]], None],
        on_message: Callable[[Child[AnySlot], messages.Message], None],
    ) -> None:
        self.slot, self.title = slot, slot.title
        self._live, self._priorities, self._nursery = live, priorities, nursery
        self._on_up, self._on_down, self._on_message = on_up, on_down, on_message
        self._loop = asyncio.get_running_loop()
        self.state = State.STOPPED
        #: it is up, and its heartbeat has stopped (supervisor/watchdog.py)
        self.hung = False
        #: its system calls are limited, as the kernel says (vpnd/seccomp.py)
        self.confined = False
        self.restarts = 0
        self.listen: tuple[str, ...] = ()
        self.own: OwnAddresses | None = None
        self._begun: Process | None = None
        self._pidfd = -1
        self._channel: LoopChannel | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._started_s = 0.0
        self._backoff_s = live.config.process.restart_initial
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._gone = asyncio.Event()
        self._gone.set()

    @property
    def pid(self) -> int:
        """Of the process there is, or 0."""
        return self._begun.pid if self._begun is not None else 0

    async def start(self) -> None:
        """Start it and wait until it is up. Raises the error it reported, or ChildError; it is stopped then, as it
        is when the caller is cancelled. A stopped child may be started again."""
        if self._first.done():
            self._first = self._loop.create_future()
        self._backoff_s = self._live.config.process.restart_initial
        try:
            self._spawn()
            await self._first
        except OSError as error:  # no process, memory or descriptor to be had
            await self.stop()
            raise errors.ChildError(f"{self.title} cannot be started: {error.strerror}") from error
        except BaseException:
            await self.stop()
            raise

    def send(self, message: messages.Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send to the process there is; to none when it is neither up nor draining."""
        if self.state in (State.UP, State.DRAINING) and self._channel is not None:
            if self._channel.unread >= MOST_UNREAD:
                self.kill(f"has not read {MOST_UNREAD} messages")
                return
            self._channel.send(message, descriptors)

    async def stop(self, drain: bool = False) -> None:
        """Ask it to stop, kill it after process.stop_timeout; it is not started again. Idempotent.

        `drain`: it may take process.drain_timeout longer, to empty its queues first.
        """
        was = self.state
        self.state = State.DRAINING if drain and was is State.UP else State.STOPPED
        self._cancel_timer()
        if self._begun is None:
            return
        if was in (State.UP, State.DRAINING) and self._channel is not None:
            if was is State.UP:
                self._channel.send(messages.Stop(drain=drain))
            settings = self._live.config.process
            patience_s = settings.stop_timeout + (settings.drain_timeout if drain else 0.0)
            try:
                await asyncio.wait_for(self._gone.wait(), patience_s)
                return
            except TimeoutError:
                log.warning("%s (pid %d) did not stop in time and is killed", self.title, self.pid)
        self._kill()
        await self._gone.wait()

    # --- a process's life

    def _respawn(self) -> None:
        try:
            self._spawn()
        except OSError as error:  # no process, memory or descriptor to be had right now
            self._restart_later(f"{self.title} cannot be started: {error.strerror}")

    def _spawn(self) -> None:
        self.state = State.STARTING
        self._started_s = self._loop.time()
        self._begun, ours = self._nursery.begin(self.slot.module)
        self._gone.clear()
        self._pidfd = os.pidfd_open(self._begun.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        self._channel = LoopChannel(
            channel.Channel(ours, "supervisor", self.slot.role),
            self._receive,
            self._channel_closed,
            CHANNEL_SHARE,
        )
        if self.restarts:  # programs that send as fast as they can would leave it no CPU to start on
            self._priorities.carries_packets(self.pid)
        message, descriptors = self.slot.begin()
        self._channel.send(message, descriptors)
        patience_s = self._live.config.process.ready_timeout + self.slot.more_time_s
        self._timer = self._loop.call_later(patience_s, self._not_ready, patience_s)

    def _receive(self, message: messages.Message, descriptors: list[int]) -> None:
        for fd in descriptors:  # no message to the supervisor carries any
            os.close(fd)
        try:
            self._take(message)
        except ProtocolViolation as error:
            self.kill(str(error))
        except Exception:  # whatever a child says, the node lives on
            log.exception("%s (pid %d): its %s cannot be used", self.title, self.pid, type(message).__name__)
            self._kill()

    def _take(self, message: messages.Message) -> None:
        match message:
            case messages.Ready(listen=listen, own=own) if self.state is State.STARTING:
                self._cancel_timer()
                self.state = State.UP
                self.confined = seccomp.holds(self.pid)
                self.listen, self.own = listen, own
                if self._first.done():
                    log.info("%s is back as pid %d", self.title, self.pid)
                else:
                    self._first.set_result(None)
                self._on_up(self)
            case messages.Failed(kind=kind, error=error):
                lines = "\n".join(map(printable, error.split("\n")))
                self._fail(errors.of_kind(kind, lines, errors.ChildError))
            case _:
                self._on_message(self, message)

    def _fail(self, error: errors.VpndError) -> None:
        if not self._first.done():
            self._first.set_exception(error)
        elif self.state not in (State.STOPPED, State.DRAINING):
            log.error("%s: %s", self.title, error)

    def _not_ready(self, patience_s: float) -> None:
        self._timer = None
        self._fail(errors.ChildError(f"{self.title} was not ready after {patience_s:g} s"))
        self._kill()

    def _channel_closed(self, error: Exception) -> None:
        """It has died, which its pidfd will tell, or it broke the message table: it must not live on without us."""
        if isinstance(error, ProtocolViolation):
            log.error("%s (pid %d): %s; it is killed", self.title, self.pid, error)
        self._kill()

    @property
    def works(self) -> bool:
        """Whether it is up and its heartbeat goes on."""
        return self.state is State.UP and not self.hung

    def kill(self, reason: str) -> None:
        """It does what it must not, or nothing at all: end this process; another one takes its place."""
        log.error("%s (pid %d): %s; it is killed", self.title, self.pid, reason)
        self._kill()

    def _kill(self) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):  # it has ended, which the loop will tell next
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _exited(self) -> None:
        assert self._begun is not None
        code = self._begun.wait()
        pid = self._begun.pid
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._begun = None
        self.hung = self.confined = False
        if self._channel is not None:
            self._channel.close()
        self._cancel_timer()
        self._gone.set()
        if self.state is State.DRAINING:
            self.state = State.STOPPED
        self._on_down(self)
        if self.state is State.STOPPED:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        if not self._first.done():
            self._first.set_exception(
                errors.ChildError(f"{self.title} (pid {pid}) {how} before it was ready")
            )
            return
        self._restart_later(f"{self.title} (pid {pid}) {how}")

    def _restart_later(self, what: str) -> None:
        settings = self._live.config.process
        if self._loop.time() - self._started_s >= settings.restart_settle:
            self._backoff_s = settings.restart_initial
        self.state = State.WAITING
        self.restarts += 1
        log.warning("%s; starting it again in %.0f ms", what, self._backoff_s * 1000)
        self._timer = self._loop.call_later(self._backoff_s, self._respawn)
        self._backoff_s = min(max(self._backoff_s * 2, settings.restart_initial), settings.restart_max)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
