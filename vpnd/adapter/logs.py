"""What libp2p may say."""

from __future__ import annotations

import logging

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
