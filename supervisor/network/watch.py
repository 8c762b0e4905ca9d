"""Watching the machine: its links, addresses and routes, and whether it was suspended.

Sessions whose way has changed would be missed only when their probes fail; a change that is told lets children look at
once. One change is many messages of the kernel, so they are gathered (`Gatherer`); a machine whose routes never stop
changing (a router) is told less and less often.

What this node itself has put on the machine (its device, its table, routing rules, its nftables rules) is told apart,
at once and each time: it has to be looked at before a packet goes astray.

The netlink sockets are read on the supervisor's loop, never blocking: pyroute2's own would bring a loop of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import socket
import time
from collections.abc import Callable

from supervisor.network import events
from supervisor.network.filter import table_name
from supervisor.network.killswitch import place
from vpnd.api.aio import Descriptors
from vpnd.config.live import Live
from vpnd.errors import MachineError

log = logging.getLogger(__name__)

#: Room for one datagram of the kernel: it fills at most 32 KiB (NLMSG_GOODSIZE and a dump's largest buffer).
DATAGRAM_BYTES = 1 << 16
#: Datagrams read before other work of the loop has its turn.
DATAGRAMS_AT_ONCE = 16
#: Reasons in one log line; more of them say no more.
REASONS_SHOWN = 4

#: linux/netlink.h; the socket module has no name for it
NETLINK_NETFILTER = 12

Changed = Callable[[str, tuple[str, ...]], None]


class Gatherer:
    """Many reasons become one change. Time is an argument.

    The first reason opens a window of `settle_s`; the change is due at its end. Each further one that comes within
    `most_s` of the last change doubles the window, up to `most_s`.
    """

    def __init__(self) -> None:
        self.due_s: float | None = None
        self._reasons: dict[str, None] = {}
        self._window_s = 0.0
        self._last_s = float("-inf")

    def add(self, reason: str, now_s: float, settle_s: float, most_s: float) -> bool:
        """Take one reason. True when it opened a window: call `take` at `due_s`."""
        if len(self._reasons) <= REASONS_SHOWN:
            self._reasons[reason] = None
        if self.due_s is not None:
            return False
        again = now_s - self._last_s <= most_s
        self._window_s = min(max(2 * self._window_s, settle_s), most_s) if again else settle_s
        self.due_s = now_s + self._window_s
        return True

    def take(self, now_s: float) -> str:
        """The window is over: its reasons on one line."""
        reasons, self._reasons = list(self._reasons), {}
        self.due_s, self._last_s = None, now_s
        more = ["…"] if len(reasons) > REASONS_SHOWN else []
        return ", ".join(reasons[:REASONS_SHOWN] + more)


class SuspendClock:
    """How much longer the machine has been on than awake; what that grows by, it slept. Time is an argument."""

    def __init__(self, boottime_s: float, monotonic_s: float) -> None:
        self._asleep_s = boottime_s - monotonic_s

    def slept_s(self, boottime_s: float, monotonic_s: float) -> float:
        """Seconds of sleep since the last call."""
        before, self._asleep_s = self._asleep_s, boottime_s - monotonic_s
        return self._asleep_s - before


class Watch:
    """Tells `changed(reason, addresses)`, and `ours(reason)` when it is the node's own. Owner: supervisor loop.

    `own_device` must exist. Raises MachineError when the kernel gives no netlink socket. Ends with `close`.
    """

    def __init__(self, own_device: str, live: Live, changed: Changed, ours: Callable[[str], None]) -> None:
        self._live = live
        self._changed, self._ours = changed, ours
        self._own_nftables = table_name(own_device).encode() + b"\0"
        self._loop, self._descriptors = asyncio.get_running_loop(), Descriptors()
        self._gatherer = Gatherer()
        self._lost = False
        self._suspend = SuspendClock(*_clocks())
        try:
            self._socket = _netlink(socket.NETLINK_ROUTE, events.GROUPS)
            self._socket.send(events.dump_addresses())
            own = socket.if_nametoindex(own_device)
        except OSError as error:
            raise MachineError(f"the kernel tells nothing of network changes: {error.strerror}") from error
        own_table = place(live.config).table
        self._state = events.NetworkState(own, own_table, self._socket.getsockname()[0], _name_of)
        self._descriptors.add_reader(self._socket.fileno(), self._readable)
        self._nftables: socket.socket | None = None
        with contextlib.suppress(OSError):  # a kernel without nftables has nothing to tell
            self._nftables = _netlink(NETLINK_NETFILTER, events.NFT_GROUPS)
            self._descriptors.add_reader(
                self._nftables.fileno(), functools.partial(self._nftables_readable, self._nftables)
            )
        self._gathering: asyncio.TimerHandle | None = None
        self._checking = self._check_later()
        live.watch(lambda config: config.network.suspend_check, self._retime)

    def _check_later(self) -> asyncio.TimerHandle:
        return self._loop.call_later(self._live.config.network.suspend_check, self._check_suspend)

    def _retime(self) -> None:
        self._checking.cancel()
        if self._socket.fileno() >= 0:
            self._checking = self._check_later()

    def close(self) -> None:
        """Stop watching. Idempotent."""
        if self._socket.fileno() < 0:
            return
        self._descriptors.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._nftables is not None:
            self._descriptors.remove_reader(self._nftables.fileno())
            self._nftables.close()
        self._checking.cancel()
        if self._gathering is not None:
            self._gathering.cancel()
        self._descriptors.close()

    def addresses(self) -> tuple[str, ...]:
        """All local addresses but loopback's and our own device's."""
        return self._state.addresses()

    def _readable(self) -> None:
        if self._socket.fileno() < 0:
            return
        for _ in range(DATAGRAMS_AT_ONCE):
            try:
                data = self._socket.recv(DATAGRAM_BYTES)
            except BlockingIOError:
                if self._lost:
                    self._ask_again()
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    log.error("network changes are no longer seen: %s", error.strerror)
                    self._descriptors.remove_reader(self._socket.fileno())
                    return
                self._descriptors.again(self._socket.fileno())
                # More happened than the socket has room for, and it has none for an answer until it is empty.
                self._lost = True
                self._state.forget()
                self._note("many changes at once")
                self._ours("many changes at once")
                continue
            for of, reason in self._state.take(data):
                if of is events.Of.OURS:
                    self._ours(reason)
                else:
                    self._note(reason)
        if self._lost:  # that may have been the last, and then nothing wakes us
            self._loop.call_soon(self._readable)

    def _nftables_readable(self, nftables: socket.socket) -> None:
        """Another program's rules, of which there may be many changes, are passed over by the name of the table."""
        for _ in range(DATAGRAMS_AT_ONCE):
            try:
                told = self._own_nftables in nftables.recv(DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError:  # more than there is room for
                self._descriptors.again(nftables.fileno())
                told = True
            if told:
                self._ours("nftables rules changed")

    def _ask_again(self) -> None:
        self._lost = False
        try:
            self._socket.send(events.dump_addresses())
        except OSError as error:  # each address comes again with its next change
            log.debug("addresses not asked for: %s", error.strerror)

    def _note(self, reason: str) -> None:
        now_s = self._loop.time()
        settings = self._live.config.network
        if self._gatherer.add(reason, now_s, settings.change_settle, settings.change_settle_max):
            self._gathering = self._loop.call_at(self._gatherer.due_s or now_s, self._tell)

    def _tell(self) -> None:
        self._gathering = None
        self._changed(self._gatherer.take(self._loop.time()), self.addresses())

    def _check_suspend(self) -> None:
        slept_s = self._suspend.slept_s(*_clocks())
        if slept_s > self._live.config.network.suspend_check:
            log.info("the machine was suspended for %.0f s", slept_s)
            self._changed("the machine was suspended", self.addresses())
        self._checking = self._check_later()


def _netlink(family: int, groups: int) -> socket.socket:
    """A socket that hears of what `groups` stand for. Raises OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    opened = socket.socket(socket.AF_NETLINK, kind, family)
    try:
        opened.bind((0, groups))
    except OSError:
        opened.close()
        raise
    return opened


def _clocks() -> tuple[float, float]:
    return time.clock_gettime(time.CLOCK_BOOTTIME), time.clock_gettime(time.CLOCK_MONOTONIC)


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # gone already
        return f"interface {index}"
