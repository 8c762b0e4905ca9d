"""The tables of what happens between a shard and its peers: sessions, streams, their health, and trying again.

The rest, and what a table is, in `schema`.
"""

from __future__ import annotations

from typing import Annotated

from vpnd.config.units import Table, duration, number, share, size, text


class Retry(Table, frozen=True):
    """Exponential backoff with full jitter: dials, stream opens, changes of addresses and routes."""

    max_attempts: Annotated[
        int,
        number(
            "Failures in a row after which a thing is given up: a peer's circuit opens, a session whose stream "
            "does not open is replaced, a change of routes is an error.",
            1,
            1000,
            "attempts",
        ),
    ] = 5

    initial_interval: Annotated[float, duration("Longest wait before the first retry.", 0.01, 3600.0)] = 0.25
    max_interval: Annotated[float, duration("Longest wait before any retry.", 0.01, 86400.0)] = 15.0
    multiplier: Annotated[float, share("Growth of the wait from one try to the next.", 1.0, 10.0)] = 2.0


class Session(Table, frozen=True):
    """One encrypted TCP connection to a peer's shard."""

    window_bytes: Annotated[int, size("Receive window of one stream.", 1 << 18, 1 << 30)] = 1 << 24
    send_buffer_bytes: Annotated[int, size("Sealed bytes waiting for the socket.", 1 << 17, 1 << 26)] = (
        1 << 19
    )
    control_reserve_bytes: Annotated[
        int,
        size(
            "Part of the send buffer kept for answers and window updates; a peer that fills it is cut off.",
            1 << 12,
            1 << 15,
        ),
    ] = 1 << 14
    receive_buffer_bytes: Annotated[int, size("Room for one read from the socket.", 1 << 17, 1 << 26)] = (
        1 << 19
    )
    queue_bytes: Annotated[
        int, size("Packets waiting for a session that cannot take more.", 1 << 17, 1 << 30)
    ] = 1 << 20
    not_sent_lowat_bytes: Annotated[
        int,
        size(
            "TCP_NOTSENT_LOWAT: unsent bytes in the kernel before the socket counts as full.",
            1 << 14,
            1 << 30,
        ),
    ] = 1 << 18
    cipher: Annotated[
        str,
        text(
            "auto (AES-GCM where both CPUs have instructions for it), aesgcm or chachapoly.",
            "cipher",
        ),
    ] = "auto"
    congestion_control: Annotated[
        str, text("TCP congestion control where the kernel offers it; empty: the system's.", "name")
    ] = "bbr"
    retransmit_min: Annotated[
        float,
        duration(
            "TCP_RTO_MIN_US (Linux 6.15): what is not acknowledged is sent again no sooner than a round trip and this.",
            0.001,
            0.2,
        ),
    ] = 0.01
    ack_delay_max: Annotated[
        float,
        duration(
            "TCP_DELACK_MAX_US (Linux 6.15): what has arrived is acknowledged no later than this.", 0.001, 0.2
        ),
    ] = 0.005
    max_streams: Annotated[int, number("Streams one peer may open in a session.", 1, 65536, "streams")] = 64
    negotiate_timeout: Annotated[float, duration("Deadline for a stream to open.", 0.1, 300.0)] = 10.0
    close_timeout: Annotated[
        float, duration("Deadline for a peer to close its side of a stream.", 0.1, 300.0)
    ] = 10.0
    quantum_bytes: Annotated[
        int,
        size("What one waiting flow may send before the next one's turn.", 1 << 10, 1 << 20),
    ] = 1 << 16
    delay_target: Annotated[
        float, duration("Waiting time that is fine even when it lasts (CoDel's target).", 0.0001, 10.0)
    ] = 0.005
    delay_interval: Annotated[
        float,
        duration("Waiting longer than delay_target for so long begins to cost packets (CoDel).", 0.001, 60.0),
    ] = 0.1
    hold_bytes: Annotated[
        int,
        size(
            "Packets held back, to keep order, while flows move from one session to another.",
            1 << 17,
            1 << 32,
        ),
    ] = 1 << 25
    drain_timeout: Annotated[
        float, duration("Deadline for a session that is replaced to become empty.", 0.1, 300.0)
    ] = 5.0
    max_age: Annotated[
        float, duration("A session is replaced by a fresh one, with new keys, after so long.", 1.0, 2592000.0)
    ] = 43200.0
    max_bytes: Annotated[
        int, size("A session is replaced by a fresh one after so many bytes each way.", 1 << 20, 1 << 50)
    ] = 1 << 40
    user_timeout: Annotated[
        float, duration("TCP_USER_TIMEOUT: unacknowledged for so long ends the session.", 1.0, 3600.0)
    ] = 15.0


class StreamPool(Table, frozen=True):
    """Streams to one peer, in each shard."""

    min_streams_per_peer: Annotated[int, number("Streams kept open.", 1, 256, "streams")] = 1
    max_streams_per_peer: Annotated[int, number("Most streams open at once.", 1, 256, "streams")] = 8
    idle_timeout: Annotated[
        float, duration("A stream without flows for so long is closed, down to the minimum.", 0.1, 86400.0)
    ] = 60.0
    cleanup_interval: Annotated[float, duration("How often idle streams are looked for.", 0.05, 3600.0)] = 5.0


class Multiplexer(Table, frozen=True):
    """How flows to one peer are spread over streams and sessions, in each shard."""

    min_sessions: Annotated[int, number("Sessions (TCP connections) kept to a peer.", 1, 64, "sessions")] = 1
    max_sessions: Annotated[int, number("Most sessions to a peer at once.", 1, 64, "sessions")] = 2
    auto_scaling_interval: Annotated[
        float, duration("How often load is looked at, and streams or sessions are added.", 0.01, 3600.0)
    ] = 0.25
    scale_up_delay: Annotated[
        float,
        duration("Packets waiting for so long all through an interval ask for another stream.", 0.0001, 60.0),
    ] = 0.001
    busy_bytes: Annotated[
        int,
        size(
            "A session that carries so much in an interval is busy: small flows move elsewhere.", 1, 1 << 40
        ),
    ] = 1 << 21


class CircuitBreaker(Table, frozen=True):
    """When a peer that cannot be reached is left alone."""

    failure_threshold: Annotated[
        int, number("Failed dials and sessions in a row that open the circuit.", 1, 1000, "failures")
    ] = 5
    reset_timeout: Annotated[
        float, duration("How long the circuit stays open before one dial may try.", 0.01, 3600.0)
    ] = 1.0
    success_threshold: Annotated[
        int, number("Sessions that must work before a half-open circuit closes.", 1, 1000, "sessions")
    ] = 1


class Health(Table, frozen=True):
    """Whether sessions that say nothing are alive."""

    interval: Annotated[
        float, duration("How often a session is probed; anything received counts as well.", 0.05, 3600.0)
    ] = 5.0
    timeout: Annotated[
        float,
        duration(
            "Without any sign of life for so long a probe has failed; vpnd ping waits so long, too.",
            0.01,
            300.0,
        ),
    ] = 2.0
    max_consecutive_failures: Annotated[
        int,
        number("Failed probes in a row that end a session; the first makes it suspect.", 1, 100, "probes"),
    ] = 2
    urgent_timeout: Annotated[
        float,
        duration(
            "As timeout, for probes on an occasion: the network changed, the peer dialed anew.", 0.01, 300.0
        ),
    ] = 0.5
    warm_interval: Annotated[
        float, duration("How often sessions to recently used peers are made sure of.", 0.05, 86400.0)
    ] = 30.0
    warm_for: Annotated[
        float, duration("A peer is recently used for so long after its last packet.", 0.0, 86400.0)
    ] = 300.0
