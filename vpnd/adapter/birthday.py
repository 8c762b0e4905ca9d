"""Connections through a NAT that takes another outside port for each destination: by many tries at once.

    open     who is behind that NAT connects from many ports to the one place where the other was seen: as many outside
             ports lead to it, and nobody knows which
    guess    the other one connects from there to ports of that NAT's address, at random

Of 64512 ports 256 are open, so one guess of 252 finds one; the SYNs have crossed then, as in `punch`. Each port is an
entry in a table of somebody's gateway: how many there are, and how many a second, is limited on both sides.
"""

from __future__ import annotations

import contextlib
import secrets
from typing import NamedTuple

import trio

from vpnd.adapter.punch import Use, connected, reserve
from vpnd.config.multiaddrs import MAX_PORT
from vpnd.endpoint import IP, Endpoint

#: Ports below are not given to anybody (RFC 4787, REQ-3).
FIRST_PORT = 1024


class Chances(NamedTuple):
    """How many ports are open at once on either side, and how many each side opens or guesses a second."""

    ports: int
    rate: int


async def open_many(target: Endpoint, here: IP, chances: Chances, segment: int, use: Use) -> None:
    """Connect to `target` from so many fresh ports, each again when it was refused; `use` gets what comes of it."""

    async def keep() -> None:
        content = False
        while not content:
            with contextlib.suppress(OSError):
                content = await use(await connected(reserve(Endpoint(here, 0), segment), target))
            await trio.sleep(chances.ports / chances.rate)

    async with trio.open_nursery() as nursery:
        for _ in range(chances.ports):
            await trio.sleep(1 / chances.rate)
            nursery.start_soon(keep)


async def guess(ip: IP, here: Endpoint, chances: Chances, segment: int, use: Use) -> None:
    """Connect from `here` to random ports of `ip`, until cancelled; `use` gets what comes of it. The oldest try is
    given up for the next one where there are as many as may be."""
    waiting: dict[trio.CancelScope, None] = {}

    async def one(target: Endpoint, scope: trio.CancelScope) -> None:
        with contextlib.suppress(OSError), scope:
            connection = await connected(reserve(here, segment), target)
            waiting.pop(scope, None)  # it is there: it is not given up any more
            await use(connection)
        waiting.pop(scope, None)

    async with trio.open_nursery() as nursery:
        for port in secrets.SystemRandom().sample(range(FIRST_PORT, MAX_PORT + 1), MAX_PORT + 1 - FIRST_PORT):
            if len(waiting) == chances.ports:
                oldest = next(iter(waiting))
                del waiting[oldest]
                oldest.cancel()
            await trio.sleep(1 / chances.rate)
            scope = trio.CancelScope()
            waiting[scope] = None
            nursery.start_soon(one, Endpoint(ip, port), scope)
