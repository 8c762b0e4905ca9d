"""What `Session.next_event` tells.

Events are Structs that the garbage collector does not track; the caller tells them apart by type.
Every stream, whoever opened it, ends in exactly one StreamClosed unless the session dies first.
"""

from __future__ import annotations

import enum

import msgspec

from shards.stream import spec
from shards.stream.negotiate import NOWHERE, Beside
from shards.stream.yamux import Stream
from vpnd.packet.record import Capabilities


class CloseReason(enum.StrEnum):
    """Why a stream is gone; the value is for people."""

    CLOSED = "closed"  # a FIN of both sides, in either order
    RESET_BY_PEER = "reset by peer"
    RESET = "reset"  # by close_stream() before it was ready
    REFUSED = "the peer does not speak the packet protocol"
    UNKNOWN_PROTOCOL = "the peer asked for another protocol"
    CLOSED_EARLY = "closed by the peer before it was ready"
    NEGOTIATE_TIMEOUT = "not ready in time"
    CLOSE_TIMEOUT = "the peer did not close its side in time"


_FAULTS = {
    spec.GO_AWAY_NORMAL: "",
    spec.GO_AWAY_PROTOCOL_ERROR: "protocol error",
    spec.GO_AWAY_INTERNAL_ERROR: "internal error",
}


class StreamReady(msgspec.Struct, frozen=True, gc=False):
    """Both HELLOs are exchanged: send() may be called. `hello` and `beside` are the peer's."""

    stream: Stream
    hello: Capabilities
    beside: Beside = NOWHERE


class Data(msgspec.Struct, frozen=True, gc=False):
    """Payload, in order, cut anywhere.

    borrowed: `view` is valid until the next next_event() or received(). The bytes stay charged to the
    receive window until consumed() is called for them. `last`: there is no event behind it, and nothing received.
    """

    stream: Stream
    view: memoryview
    last: bool = False


class StreamClosed(msgspec.Struct, frozen=True, gc=False):
    """The stream takes and gives nothing any more. It may be one that never became ready."""

    stream: Stream
    reason: CloseReason


class WindowOpened(msgspec.Struct, frozen=True, gc=False):
    """The peer allows more on this ready stream. Room made by data_sent() is not told: the caller made it."""

    stream: Stream


class Pong(msgspec.Struct, frozen=True, gc=False):
    """The answer to the ping() that returned `value` came after so long, as seen through next_event()'s
    clock."""

    value: int
    rtt_s: float


class GoneAway(msgspec.Struct, frozen=True, gc=False):
    """The peer takes no new streams; those that are open go on. `code`: GO_AWAY_* of the spec, or any u32."""

    code: int

    def fault(self) -> str:
        """What the peer says is wrong, for people; empty when nothing is."""
        return _FAULTS.get(self.code, f"code {self.code}")


Event = StreamReady | Data | StreamClosed | WindowOpened | Pong | GoneAway
