"""relay: the process that joins the sockets of members that cannot reach each other.

    talks to      over                             what comes, and who serves it
    ------------  -------------------------------  ----------------------------------------------------------
    supervisor    channel (inherited descriptor)   _on_supervisor: RelayStart, ControlArrived, Reconfigure, Stop
    control       channel (from ControlArrived)    _on_control: RelayPair, RelayLeave
    members       the sockets of pairs             Pair

Rights kept after the start: the descriptors it was given, and nothing else. It has no key and sees only what two
members have encrypted for each other. Pairs go on when control dies; its successor is told of them.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import socket
from time import monotonic

import uvloop

from vpnd import logs, privileges, seccomp
from vpnd.api import messages
from vpnd.api.aio import Descriptors, LoopChannel, Recurring, end_at_bug
from vpnd.api.channel import Channel, first_message, run_child
from vpnd.config.live import Live
from vpnd.config.schema import Config
from vpnd.metrics import CounterPage, heartbeat_s
from vpnd.relay.pair import PART, Direction, Pair
from vpnd.relay.shaper import Shaper

log = logging.getLogger(__name__)

#: Linux' TCP_NOTSENT_LOWAT (include/uapi/linux/tcp.h); the socket module has no name for it.
TCP_NOTSENT_LOWAT = 25


class Relay:
    """The pairs of one node. Owner: its loop."""

    def __init__(self, config: Config, page: CounterPage) -> None:
        self._live = live = Live(config)
        self._loop, self._descriptors = asyncio.get_running_loop(), Descriptors()
        limits = config.relay
        self._shaper = Shaper(limits.bytes_per_s, limits.total_bytes_per_s, PART, monotonic())
        live.watch(lambda config: config.relay, self._other_limits)
        live.watch(lambda config: config.log.level, lambda: logs.set_level(live.config.log.level))
        self._pairs: dict[int, Pair] = {}
        self._control: LoopChannel | None = None
        self._turns: asyncio.Handle | None = None
        self._told_bytes = self._ended_bytes = 0
        Recurring(live, lambda config: config.relay.report_interval, self._report).start()
        Recurring(live, lambda config: heartbeat_s(config.process.watchdog), page.beat).start()
        self.stopped = self._loop.create_future()

    # --- supervisor

    def on_supervisor(self, message: messages.Message, descriptors: list[int]) -> None:
        match message:
            case messages.ControlArrived():
                self._meet(socket.socket(fileno=descriptors[0]))
            case messages.Reconfigure(config=config):
                self._live.take(config)
            case messages.Stop():
                self.end("stopped")

    def _other_limits(self) -> None:
        limits = self._live.config.relay
        self._shaper.limit(limits.bytes_per_s, limits.total_bytes_per_s, monotonic())

    def end(self, reason: str) -> None:
        """Close all pairs and leave."""
        if not self.stopped.done():
            for pair in list(self._pairs.values()):
                pair.close()
            self.stopped.set_result(reason)

    # --- control

    def _meet(self, sock: socket.socket) -> None:
        if self._control is not None:
            self._control.close()
        self._control = LoopChannel(Channel(sock, "relay", "control"), self._on_control, self._control_closed)
        self._control.send(
            messages.RelayHeld(pairs=tuple((pair.number, *pair.members) for pair in self._pairs.values()))
        )

    def _control_closed(self, error: Exception) -> None:
        log.info("control: %s; pairs go on", error)

    def _on_control(self, message: messages.Message, descriptors: list[int]) -> None:
        sockets = [socket.socket(fileno=fd) for fd in descriptors]
        match message:
            case messages.RelayPair():
                self._join(message, *sockets)
            case messages.RelayLeave(number=number):
                if (pair := self._pairs.get(number)) is not None:
                    pair.end("no longer permitted")

    def _join(self, message: messages.RelayPair, first: socket.socket, second: socket.socket) -> None:
        number, session = message.number, self._live.config.session
        try:
            for sock in (first, second):
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # What waits here waits in front of whatever comes behind it, a ping say.
                sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, session.not_sent_lowat_bytes)
            self._pairs[number] = Pair(self._descriptors, self, message, first, second, self._pair_ended)
        except OSError as error:  # no descriptors left for pipes, or a socket that has ended
            for sock in (first, second):
                sock.close()
            self._tell(messages.RelayPairEnded(number=number, reason=os.strerror(error.errno or 0).lower()))

    def _pair_ended(self, pair: Pair, reason: str) -> None:
        if self._pairs.pop(pair.number, None) is not None:
            self._ended_bytes += pair.bytes
            self._tell(messages.RelayPairEnded(number=pair.number, reason=reason))

    def _tell(self, message: messages.Message) -> None:
        if self._control is not None:
            self._control.send(message)

    # --- turns

    def join(self, direction: Direction) -> None:
        """A new direction, which asks `may_move` from now on."""
        self._shaper.join(direction, monotonic())

    def leave(self, direction: Direction) -> None:
        self._shaper.leave(direction)

    def may_move(self, direction: Direction) -> int:
        """Bytes it may move now; 0: its `move` will be called."""
        allowed = self._shaper.may_move(direction, monotonic())
        if not allowed and self._turns is None:
            self._turns = self._loop.call_soon(self._take_turns)
        return allowed

    def moved(self, direction: Direction, count: int) -> None:
        self._shaper.moved(direction, count)

    def _take_turns(self) -> None:
        direction, wait_s = self._shaper.due(monotonic())
        self._turns = None
        if direction is not None:
            assert isinstance(direction, Direction)
            direction.move(self._shaper.part)
        if direction is not None or wait_s < math.inf:
            self._turns = self._loop.call_later(wait_s, self._take_turns)

    # --- from time to time

    def _report(self) -> None:
        """Tell control what has moved, and end pairs in which nothing does."""
        now_s, settings = monotonic(), self._live.config.relay
        for pair in list(self._pairs.values()):
            if pair.idle_s(now_s) >= settings.idle_timeout:
                pair.end(f"nothing has moved for {settings.idle_timeout:g} s")
        moved = self._ended_bytes + sum(pair.bytes for pair in self._pairs.values())
        if moved != self._told_bytes:
            self._tell(messages.RelayMoved(bytes=moved - self._told_bytes))
            self._told_bytes = moved


def main() -> None:
    """`python -m vpnd.relay CHANNEL_FD`."""
    run_child("relay", _main)


def _main(channel: Channel, parent_pid: int) -> None:
    """Everything is imported: take the start message, give up root, run."""
    start, (page_fd,) = first_message(channel, messages.RelayStart)
    page = CounterPage((), page_fd)
    os.close(page_fd)
    logs.configure(start.config.log, "relay")
    privileges.drop(start.config.process.user, parent_pid)
    if start.config.process.seccomp:
        seccomp.confine(seccomp.RELAY)
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(channel, start, page))


async def _run(channel: Channel, start: messages.RelayStart, page: CounterPage) -> None:
    relay = Relay(start.config, page)
    end_at_bug(relay.end)
    supervisor = LoopChannel(channel, relay.on_supervisor, lambda error: relay.end(f"supervisor: {error}"))
    supervisor.send(messages.Ready())
    log.debug("ends: %s", await relay.stopped)
