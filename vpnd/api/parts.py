"""An answer in several messages, where one would be longer than a channel carries: a network has any number of members.

All parts have the serial of the question, if it has one, and all but the last say `more`. Rows and bytes keep their
order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from vpnd.api.messages import Answer, ControlStatus, ShardStatus, StatusTold

Whole = TypeVar("Whole", ControlStatus, ShardStatus, Answer, StatusTold)

#: Of what is in one message: so little that a socket of the kernel's default size takes it, and what is beside it.
MAX_PART_BYTES = 1 << 17

#: The fields that may be too long, and what each of them is when it is empty.
_LONG: dict[type[Any], dict[str, Any]] = {
    ControlStatus: {"peers": ()},
    ShardStatus: {"sessions": (), "traffic": ()},
    Answer: {"result": b""},
    StatusTold: {"content": b""},
}
_encoder = msgspec.msgpack.Encoder()


def split(whole: Whole) -> list[Whole]:
    """The messages to send instead of `whole`; itself, where it is short."""
    empty = _LONG[type(whole)]
    chunks = [(field, chunk) for field in empty for chunk in _chunks(getattr(whole, field))]
    if len(chunks) <= 1:
        return [whole]
    last = len(chunks) - 1
    return [
        msgspec.structs.replace(whole, **{**empty, field: chunk}, more=place < last)
        for place, (field, chunk) in enumerate(chunks)
    ]


def joined(parts: Sequence[Whole]) -> Whole:
    """What was split; `parts` in the order in which they came, one at least."""
    last = parts[-1]
    fields = {
        field: _joined([getattr(part, field) for part in parts], empty)
        for field, empty in _LONG[type(last)].items()
    }
    return msgspec.structs.replace(last, **fields)


def _joined(chunks: Sequence[Any], empty: Any) -> Any:
    return b"".join(chunks) if empty == b"" else tuple(itertools.chain.from_iterable(chunks))


def _chunks(content: Any) -> Iterator[Any]:
    if isinstance(content, bytes):
        return (content[place : place + MAX_PART_BYTES] for place in range(0, len(content), MAX_PART_BYTES))
    return _rows(content)


def _rows(rows: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
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
