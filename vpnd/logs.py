"""Log lines of all processes of a node: one line each on standard error, which the children inherit.

2026-01-31T12:00:00.123 info  shard 2: session 1f with b is up
"""

from __future__ import annotations

import logging
import sys

from vpnd.printable import printable


class _Format(logging.Formatter):
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line, whatever a peer has put into an error that is logged."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def configure(level: str, process: str) -> logging.Handler:
    """Send this process's log to standard error, each line named after `process`. Returns the handler, for
    libraries whose loggers do not propagate."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format(f"%(asctime)s %(levelname)-7s {process}: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)
    return handler


def set_level(level: str) -> None:
    """Another level from now on: debug, info, warning or error."""
    logging.getLogger().setLevel(level.upper())
