"""What is said on a libp2p stream, or on a secured connection itself: messages, and pings.

A message is a u32 length, network byte order, and so many bytes. Pings are of libp2p's ping protocol
(https://github.com/libp2p/specs/blob/master/ping/ping.md).
"""

from __future__ import annotations

import secrets
import struct
import time
from typing import Any

import trio
from libp2p.host.ping import PING_LENGTH
from libp2p.io.utils import read_exactly

from vpnd.errors import RemoteProtocolError
from vpnd.nat import messages
from vpnd.nat.messages import Said

LENGTH = struct.Struct("!I")


async def read_message_untrusted(stream: Any, limit: int) -> bytes:
    """The next message, at most `limit` bytes. Has no deadline.

    Raises RemoteProtocolError for a longer one, of which nothing has been read; what libp2p raises at the end.
    """
    length = LENGTH.unpack(await read_exactly(stream, LENGTH.size))[0]
    if length > limit:
        raise RemoteProtocolError(f"a message of {length} bytes, where at most {limit} may come")
    return await read_exactly(stream, length) if length else b""


async def write_message(stream: Any, message: bytes) -> None:
    """Send one message. Has no deadline; raises what libp2p raises."""
    await stream.write(LENGTH.pack(len(message)) + message)


async def hear_untrusted(stream: Any, *expected: type[Said]) -> Said:
    """The next message about a meeting, one of the types `expected`. Has no deadline; raises RemoteProtocolError, and
    what libp2p raises."""
    return messages.parse_untrusted(await read_message_untrusted(stream, messages.MAX_MESSAGE), *expected)


async def say(stream: Any, message: messages.AnyMessage) -> None:
    """Send a message about a meeting, as `write_message` does."""
    await write_message(stream, messages.encode(message))


MILLISECONDS = 1000


async def measure(stream: Any, count: int, timeout_s: float) -> list[float | None]:
    """`count` round trips on a stream of the ping protocol, in milliseconds; it is ended then.

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
    except Exception:  # the connection has ended, in one of libp2p's many ways, or there was no answer
        return trips
    finally:
        with trio.move_on_after(timeout_s) as scope:
            scope.shield = True
            try:
                await stream.reset()
            except Exception:  # nothing is left to reset
                pass
    return trips
