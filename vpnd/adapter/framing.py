"""Messages on a libp2p stream, or on a secured connection itself: u32 length, network byte order, and so many bytes."""

from __future__ import annotations

import struct
from typing import Any

from libp2p.io.utils import read_exactly

from vpnd.errors import RemoteProtocolError

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
