"""A status in several messages, where one would be longer than a channel carries: a network has any number of members.

All parts have the serial of the question, and all but the last say `more`. Rows keep their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from vpnd.api.messages import ControlStatus, ShardStatus

Status = TypeVar("Status", ControlStatus, ShardStatus)

#: Of the rows in one message: so little that a socket of the kernel's default size takes it, and what is beside them.
MAX_PART_BYTES = 1 << 17

#: The fields of which there may be too many.
_ROWS = {ControlStatus: ("peers",), ShardStatus: ("sessions", "traffic")}
_encoder = msgspec.msgpack.Encoder()


def split(status: Status) -> list[Status]:
    """The messages to send instead of `status`; itself, where it is short."""
    fields = _ROWS[type(status)]
    chunks = [(field, rows) for field in fields for rows in _chunks(getattr(status, field))]
    if len(chunks) <= 1:
        return [status]
    empty: dict[str, Any] = dict.fromkeys(fields, ())
    last = len(chunks) - 1
    return [
        msgspec.structs.replace(status, **{**empty, field: rows}, more=place < last)
        for place, (field, rows) in enumerate(chunks)
    ]


def joined(parts: Sequence[Status]) -> Status:
    """What was split; `parts` in the order in which they came, one at least."""
    last = parts[-1]
    rows = {
        field: tuple(row for part in parts for row in getattr(part, field)) for field in _ROWS[type(last)]
    }
    return msgspec.structs.replace(last, **rows)


def _chunks(rows: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    chunk: list[Any] = []
    size = 0
    for row in rows:
        length = len(_encoder.encode(row))
        if chunk and size + length > MAX_PART_BYTES:
            yield tuple(chunk)
            chunk, size = [], 0
        chunk.append(row)
        size += length
    if chunk:
        yield tuple(chunk)
