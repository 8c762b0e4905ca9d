"""What two nodes tell each other about their directories: one msgpack array each, at most `MAX_MESSAGE` bytes.

    message      says                                             is answered with
    -----------  -----------------------------------------------  -------------------------------------------------
    Summary      the root hash of my directory                    nothing when it is yours too, otherwise Buckets
    Buckets      the hashes of my 256 buckets                     Entries of those that differ from yours
    Entries      all I have in these buckets, 16 bytes each       Announce of what you lack, Wants for what I lack
    Announce     new with me, 16 bytes each                       Wants for what is new to you
    Wants        send me what you have in these slots             Statements
    Statements   signed statements                                nothing; what was new goes on to others

Every answer follows from the message and the directory alone: nothing is kept between two messages, so a lost one
costs nothing but time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from vpnd.membership.index import BUCKET_HASH_BYTES, BUCKETS, ENTRY_BYTES, ROOT_BYTES
from vpnd.membership.refusal import MembershipRefused, decode_untrusted
from vpnd.membership.statements import SLOT_BYTES, NetworkId, Wire

VERSION = 1
#: Some sixty of the largest statements, four thousand entries.
MAX_MESSAGE = 1 << 16
#: What a page of things has besides them: tag, lengths, bucket numbers.
_OVERHEAD = 512
MAX_PAGE = MAX_MESSAGE - _OVERHEAD
#: msgpack's length of a byte string of up to 64 KB.
_LENGTH_BYTES = 3


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages."""


class Summary(Message, frozen=True, tag=1):
    """`version` of this exchange, the network, the root hash of the index."""

    version: Annotated[int, Meta(ge=VERSION, le=VERSION)]
    network: NetworkId
    root: Annotated[bytes, Meta(min_length=ROOT_BYTES, max_length=ROOT_BYTES)]


_HASHES = BUCKETS * BUCKET_HASH_BYTES


class Buckets(Message, frozen=True, tag=2):
    """The hashes of all buckets, in their order."""

    hashes: Annotated[bytes, Meta(min_length=_HASHES, max_length=_HASHES)]


class Entries(Message, frozen=True, tag=3):
    """`buckets`: one byte each. `entries`: all entries of those buckets."""

    buckets: Annotated[bytes, Meta(min_length=1, max_length=BUCKETS)]
    entries: Annotated[bytes, Meta(max_length=MAX_PAGE)]


class Announce(Message, frozen=True, tag=4):
    """Entries of statements that are new."""

    entries: Annotated[bytes, Meta(max_length=MAX_PAGE)]


class Wants(Message, frozen=True, tag=5):
    """Slots, 8 bytes each."""

    slots: Annotated[bytes, Meta(max_length=MAX_PAGE)]


class Statements(Message, frozen=True, tag=6):
    """Signed statements."""

    wires: tuple[Wire, ...]


AnyMessage = Summary | Buckets | Entries | Announce | Wants | Statements

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)
_strides: dict[type[Message], tuple[str, int]] = {
    Entries: ("entries", ENTRY_BYTES),
    Announce: ("entries", ENTRY_BYTES),
    Wants: ("slots", SLOT_BYTES),
}


def encode(message: AnyMessage) -> bytes:
    return _encoder.encode(message)


def parse_untrusted(data: bytes) -> AnyMessage:
    """The message in `data`. Raises MembershipRefused only."""
    message = decode_untrusted(_decoder, data, MAX_MESSAGE, "a message")
    field, stride = _strides.get(type(message), ("", 1))
    if field and len(getattr(message, field)) % stride:
        raise MembershipRefused("malformed", "a message is cut within an entry")
    return message


def split(data: bytes, stride: int) -> list[bytes]:
    """`data` in pieces of `stride` bytes."""
    return [data[place : place + stride] for place in range(0, len(data), stride)]


def pages(pieces: Iterable[bytes], make: Callable[[bytes], AnyMessage]) -> list[bytes]:
    """Encoded messages that carry `pieces` (of equal length) one behind another, each within the limit."""
    joined = b"".join(pieces)
    return [encode(make(page)) for page in split(joined, MAX_PAGE - MAX_PAGE % ENTRY_BYTES)]


def statement_pages(wires: Sequence[bytes]) -> list[bytes]:
    """Encoded messages that carry statements, in their order."""
    found: list[bytes] = []
    page: list[bytes] = []
    room = MAX_PAGE
    for wire in wires:
        if len(wire) + _LENGTH_BYTES > room:
            found.append(encode(Statements(tuple(page))))
            page, room = [], MAX_PAGE
        page.append(wire)
        room -= len(wire) + _LENGTH_BYTES
    if page:
        found.append(encode(Statements(tuple(page))))
    return found


def bucket_pages(buckets: Iterable[tuple[int, bytes]]) -> list[bytes]:
    """Encoded messages that carry the entries of whole buckets, given as (number, entries)."""
    found: list[bytes] = []
    numbers, entries = bytearray(), bytearray()
    for number, content in buckets:
        if numbers and len(entries) + len(content) > MAX_PAGE:
            found.append(encode(Entries(bytes(numbers), bytes(entries))))
            numbers, entries = bytearray(), bytearray()
        numbers.append(number)
        entries += content
    if numbers:
        found.append(encode(Entries(bytes(numbers), bytes(entries))))
    return found
