"""What others say cannot forge lines of the log, or move the terminal it is read on."""

from __future__ import annotations

import io
import logging

from vpnd import logs


def test_a_message_is_one_line_of_what_can_be_printed() -> None:
    level = logging.getLogger().level
    handler = logs.configure("info", "control")
    assert isinstance(handler, logging.StreamHandler)
    stream = io.StringIO()
    handler.setStream(stream)
    record = logging.LogRecord(
        "test", logging.WARNING, "", 0, "a peer said %s", ("x\n2026 info forged\x1b[2J",), None
    )
    try:
        handler.handle(record)
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
    assert stream.getvalue().endswith("a peer said x\\u000a2026 info forged\\u001b[2J\n")
    assert stream.getvalue().count("\n") == 1
