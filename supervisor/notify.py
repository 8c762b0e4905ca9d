"""Telling the service manager how this node is: sd_notify(3), datagrams of KEY=VALUE lines to the socket it names.

systemd takes READY=1 for "the units behind this one may start", so it means that all processes of the node are up and
its device carries packets; whether other machines can be reached is in STATUS, which `systemctl status` shows: the
health and the ailments of `vpnd status`. WATCHDOG=1 goes out while the supervisor's loop turns; when it stops for
WatchdogSec, systemd ends the node and starts it again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping

from vpnd.errors import VpndError
from vpnd.printable import printable
from vpnd.status import Status, connected

log = logging.getLogger(__name__)

READY = "READY=1"
STOPPING = "STOPPING=1"


class Notifier:
    """Owner: one process. Where no service manager asked to be told, nothing is."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Takes its variables out of `environ`: children have nothing to say to the service manager."""
        self._address = environ.pop("NOTIFY_SOCKET", "")
        watched = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        within_us = environ.pop("WATCHDOG_USEC", "")
        #: how often it wants to hear of us, half of its patience as sd_watchdog_enabled(3) has it; 0: never
        self.interval_s = int(within_us) / 2e6 if watched and within_us.isdecimal() else 0.0

    def tell(self, *lines: str) -> None:
        """Send it; what cannot be sent is not repeated."""
        if not self._address:
            return
        # "@": the kernel's abstract names begin with a zero byte
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            try:
                sock.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, address)
            except OSError as error:
                log.debug("the service manager was not told %s: %s", lines, error)

    def reloading(self) -> None:
        """What follows may take a while; READY ends it."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def beat(self, status: Callable[[], Awaitable[Status]]) -> None:
        """Until cancelled: signs of life, if they are wanted, each with what `status` says by then."""
        while self.interval_s:
            self.tell("WATCHDOG=1")
            try:
                self.tell(in_a_line(await status()))
            except VpndError as error:
                self.tell(f"STATUS={printable(str(error))}")
            await asyncio.sleep(self.interval_s)


def in_a_line(status: Status) -> str:
    """The line for `systemctl status`."""
    what = [ailment.what for ailment in status.ailments] or [connected(status)]
    return "STATUS=" + printable(f"{status.health}: {'; '.join(what)}")
