"""What libp2p may say, and how often anything may be said that a stranger can provoke."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vpnd.config.live import Live

#: Logger of libp2p, lowest level let through, why. Everything else of libp2p is let through from WARNING up.
QUIETER = (
    # A remote that closes during a handshake is reported at ERROR, several lines each.
    ("libp2p.protocol_muxer", logging.CRITICAL),
    ("libp2p.security", logging.CRITICAL),
    ("libp2p.network.swarm", logging.CRITICAL),
    ("libp2p.transport", logging.CRITICAL),
    # One line per broken frame or stream of a peer.
    ("libp2p.stream_muxer", logging.CRITICAL),
    ("libp2p.identity", logging.CRITICAL),
    ("libp2p.host", logging.CRITICAL),
    # A line for every question whose stream ends, and whole records that were refused.
    ("libp2p.kad_dht", logging.CRITICAL),
    # Sets itself to INFO when it is made; it is stopped anyway.
    ("libp2p.network.auto_connector", logging.CRITICAL),
    # Its debug lines are a trace of every address that is parsed.
    ("multiaddr", logging.WARNING),
)
#: Source file whose module logs through the root logger instead of one of its own.
ROOT_NOISE = "swarm_connection.py"


class _NotFromSwarm(logging.Filter):
    """Drops the teardown chatter that libp2p sends through the root logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.name == "root" and record.filename == ROOT_NOISE)


def tame_libp2p(handler: logging.Handler) -> None:
    """Route libp2p's loggers into `handler`, the worth-reading part. After importing libp2p, which takes them
    out of the hierarchy."""
    handler.addFilter(_NotFromSwarm())
    top = logging.getLogger("libp2p")
    top.handlers[:] = [handler]
    top.propagate = False
    top.setLevel(logging.WARNING)
    for name, level in QUIETER:
        logging.getLogger(name).setLevel(level)


class Seldom:
    """A log line that strangers can provoke: written at most once in log.refusal_interval, with what was left out.

    `now_s` is a clock. Owner: the loop that logs; not thread-safe.
    """

    def __init__(self, log: logging.Logger, live: Live, now_s: Callable[[], float]) -> None:
        self._log, self._live = log, live
        self._now_s = now_s
        self._last_s: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warn(self, kind: str, text: str) -> None:
        """Log `text` unless a line of the same `kind` was logged within the interval."""
        now_s = self._now_s()
        last_s = self._last_s.get(kind)
        if last_s is not None and now_s < last_s + self._live.config.log.refusal_interval:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._last_s[kind] = now_s
        more = self._left_out.pop(kind, 0)
        self._log.warning("%s%s", text, f" (and {more} more like it)" if more else "")
