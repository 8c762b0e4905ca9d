"""Who may send what to whom: the table of `vpnd.api.messages` as data."""

from __future__ import annotations

from vpnd.api.messages import (
    Answer,
    ControlArrived,
    ControlStart,
    ControlStatus,
    Failed,
    Message,
    NameSockets,
    NetworkChanged,
    OwnChanged,
    OwnersAsked,
    OwnerWanted,
    OwnPrefixes,
    PeerCircuit,
    PeerDialed,
    PeerForgotten,
    PeerKnown,
    PeersComplete,
    ProbeAnswer,
    ProbeRequest,
    Ready,
    Reconfigure,
    Request,
    RoutesKnown,
    SessionDown,
    SessionHandover,
    SessionsHeld,
    SessionUp,
    SessionWanted,
    ShardArrived,
    ShardLeft,
    ShardStart,
    ShardStatus,
    StatusRequest,
    Stop,
)

#: (from, to) -> messages permitted on that way
PERMITTED: dict[tuple[str, str], frozenset[type[Message]]] = {
    ("supervisor", "control"): frozenset(
        {
            ControlStart,
            Stop,
            ShardArrived,
            ShardLeft,
            StatusRequest,
            Reconfigure,
            NetworkChanged,
            NameSockets,
            Request,
        }
    ),
    ("supervisor", "shard"): frozenset(
        {
            ShardStart,
            Stop,
            ControlArrived,
            StatusRequest,
            ProbeRequest,
            Reconfigure,
            NetworkChanged,
            OwnPrefixes,
        }
    ),
    ("control", "supervisor"): frozenset({Ready, Failed, ControlStatus, OwnChanged, RoutesKnown, Answer}),
    ("shard", "supervisor"): frozenset({Ready, Failed, ShardStatus, ProbeAnswer}),
    ("control", "shard"): frozenset(
        {PeerKnown, PeerForgotten, PeerCircuit, PeerDialed, PeersComplete, SessionHandover, OwnersAsked}
    ),
    ("shard", "control"): frozenset({SessionsHeld, SessionUp, SessionDown, SessionWanted, OwnerWanted}),
}
