"""Measuring round trips with libp2p's ping protocol (https://github.com/libp2p/specs/blob/master/ping/ping.md)."""

from __future__ import annotations

import secrets
import time
from typing import Any

import trio
from libp2p.host.ping import PING_LENGTH
from libp2p.io.utils import read_exactly

MILLISECONDS = 1000


async def measure(stream: Any, count: int, timeout_s: float) -> list[float | None]:
    """`count` round trips on a stream that speaks the protocol, in milliseconds; it is ended then.

    None for one that took longer than `timeout_s` or was answered wrongly, and for those after it.
    """
    trips: list[float | None] = [None] * count
    try:
        for place in range(count):
            payload = secrets.token_bytes(PING_LENGTH)
            begun_s = time.monotonic()
            with trio.fail_after(timeout_s):
                await stream.write(payload)
                if await read_exactly(stream, PING_LENGTH) != payload:
                    break
            trips[place] = (time.monotonic() - begun_s) * MILLISECONDS
    except (
        Exception
    ):  # the connection has ended, in one of libp2p's many ways, or there was no answer: None says so
        return trips
    finally:
        with trio.move_on_after(timeout_s) as scope:
            scope.shield = True
            try:
                await stream.reset()
            except Exception:  # nothing is left to reset
                pass
    return trips
