"""Yamux frames, and the life of one stream.

    negotiating ──── HELLOs agreed ────▶ ready ──── our FIN ────▶ closing
         │                                 │                         │
         │ FIN, RST, no agreement          │ their FIN, RST          │ their FIN, RST
         └────────────────────────────▶ closed ◀─────────────────────┘

A stream is used both ways or not at all: the peer's FIN is answered with ours at once, so there is no state
in which only we may send. In `closing` the peer's payload still arrives.
"""

from __future__ import annotations

import enum
from typing import Any

from shards.stream import spec
from shards.stream.negotiate import Negotiation
from vpnd.errors import LocalProtocolError


class StreamState(enum.Enum):
    """Named for what may be done."""

    NEGOTIATING = "negotiating"
    READY = "ready"
    CLOSING = "closing"
    CLOSED = "closed"


class StreamEvent(enum.Enum):
    """What moves a stream from state to state."""

    AGREED = "agreed"
    LOCAL_FIN = "local fin"
    REMOTE_FIN = "remote fin"
    RESET = "reset"  # by either side, a timeout or a refusal


TRANSITIONS: dict[tuple[StreamState, StreamEvent], StreamState] = {
    (StreamState.NEGOTIATING, StreamEvent.AGREED): StreamState.READY,
    (StreamState.NEGOTIATING, StreamEvent.REMOTE_FIN): StreamState.CLOSED,
    (StreamState.NEGOTIATING, StreamEvent.RESET): StreamState.CLOSED,
    (StreamState.READY, StreamEvent.LOCAL_FIN): StreamState.CLOSING,
    (StreamState.READY, StreamEvent.REMOTE_FIN): StreamState.CLOSED,
    (StreamState.READY, StreamEvent.RESET): StreamState.CLOSED,
    (StreamState.CLOSING, StreamEvent.REMOTE_FIN): StreamState.CLOSED,
    (StreamState.CLOSING, StreamEvent.RESET): StreamState.CLOSED,
}


class Stream:
    """One stream of a session. Made by the session only; callers read `id`, `ours` and `state`.

    `send_window`: payload bytes the peer takes now. `receive_window`: what it may still send; `owed`: bytes
    consumed and not given back to it yet. `context` is the caller's own: the engine never looks at it.
    """

    __slots__ = ("context", "id", "negotiation", "ours", "owed", "receive_window", "send_window", "state")

    def __init__(self, stream_id: int, *, ours: bool, receive_window: int, negotiation: Negotiation) -> None:
        self.id = stream_id
        self.ours = ours
        self.state = StreamState.NEGOTIATING
        self.send_window = spec.INITIAL_WINDOW_BYTES
        self.receive_window = receive_window
        self.owed = 0
        self.negotiation: Negotiation | None = negotiation
        self.context: Any = None

    def move(self, event: StreamEvent) -> None:
        """The only place a state changes. LocalProtocolError for a move the table does not have."""
        following = TRANSITIONS.get((self.state, event))
        if following is None:
            raise LocalProtocolError(f"stream {self.id} is {self.state.value}: no {event.value} now")
        self.state = following

    def __repr__(self) -> str:
        return f"<Stream {self.id} {self.state.value}>"


# Frames. Of the flags only those named in the specification are ever set.


def data_frame(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    """A data frame with its payload; for negotiation, records are sealed without this copy."""
    return spec.HEADER.pack(spec.VERSION, spec.TYPE_DATA, flags, stream_id, len(payload)) + payload


def window_update(stream_id: int, delta: int, flags: int = 0) -> bytes:
    """`delta` more bytes; with flags and no delta, the carrier of SYN, ACK, FIN and RST."""
    return spec.HEADER.pack(spec.VERSION, spec.TYPE_WINDOW_UPDATE, flags, stream_id, delta)


def ping(value: int, flags: int) -> bytes:
    """A ping (SYN) or its answer (ACK)."""
    return spec.HEADER.pack(spec.VERSION, spec.TYPE_PING, flags, spec.SESSION_ID, value)


def go_away(code: int) -> bytes:
    """No new streams from now on."""
    return spec.HEADER.pack(spec.VERSION, spec.TYPE_GO_AWAY, 0, spec.SESSION_ID, code)
