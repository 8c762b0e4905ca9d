"""Route netlink, blocking, from whatever thread the caller is in.

pyroute2 drives an asyncio loop of its own behind its blocking calls, so they fail in a thread whose loop is
running, and the supervisor's is. Each conversation therefore gets a thread that lives as long as it; a
thread starts in the network namespace of the one that made it. Meant for start and stop, a few milliseconds.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

__all__ = ["TABLE_LOCAL", "TABLE_MAIN", "IPRoute", "NetlinkError", "converse", "number_of"]

#: rtnetlink's RT_TABLE_MAIN and RT_TABLE_LOCAL
TABLE_MAIN, TABLE_LOCAL = 254, 255

Result = TypeVar("Result")


def converse(work: Callable[[IPRoute], Result]) -> Result:
    """Call `work` with an open IPRoute and return what it returns, or raise what it raises.

    Blocks the calling thread. The IPRoute is closed afterwards; do not keep it. Raises OSError when the kernel gives no
    descriptors.
    """
    result: list[Result] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            _check_descriptors()
            # strict: the kernel, not this process, picks what was asked for out of perhaps a million routes
            with IPRoute(strict_check=True) as netlink:
                result.append(work(netlink))
        except BaseException as error:  # handed to the caller's thread below
            failure.append(error)

    thread = threading.Thread(target=body, name="netlink")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _check_descriptors() -> None:
    """Raises OSError when there is no room for those of a conversation: an event loop that fails half-made leaves a
    traceback in the log, whoever catches what it raises."""
    with contextlib.ExitStack() as taken:
        taken.enter_context(select.epoll())
        for end in socket.socketpair():
            taken.enter_context(end)
        taken.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))


def number_of(error: NetlinkError | OSError) -> int:
    """The errno the kernel answered with."""
    return int(error.code if isinstance(error, NetlinkError) else error.errno or 0)
