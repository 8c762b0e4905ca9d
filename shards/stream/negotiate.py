"""Opening a stream: multistream-select 1.0.0 for the packet protocol, then a HELLO from each side.

    opener                                             answerer
    /multistream/1.0.0, /vpnd/packet/1.0.0, HELLO  ->
                                                   <-  /multistream/1.0.0, /vpnd/packet/1.0.0, HELLO

The opener does not wait between its three items; an answerer takes them one by one as well, and answers each
as it comes. An answerer that does not know the protocol says `na`. Each item is `varint length | body`; a
line's body ends in a newline that the length counts. The subnet node's protocol has no HELLO.

Bytes that are no such items are a fault of the peer (RemoteProtocolError); a clear "no" is an outcome.
"""

from __future__ import annotations

import enum
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from shards.stream import spec
from vpnd.errors import LocalProtocolError, RemoteProtocolError
from vpnd.packet.record import MIN_PACKET_BYTES, PACKET_OFFSET, Capabilities

_U32 = 2**32 - 1


class Hello(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of a HELLO; unknown keys are ignored. `receiver`, `port`: see Beside."""

    version: Annotated[int, Meta(ge=1, le=_U32)]
    offloads: Annotated[int, Meta(ge=0, le=_U32)]
    max_record: Annotated[int, Meta(ge=PACKET_OFFSET + MIN_PACKET_BYTES, le=_U32)]
    mtu: Annotated[int, Meta(ge=spec.MIN_MTU, le=spec.MAX_MTU)]
    receiver: Annotated[int, Meta(ge=0, le=_U32)] = 0
    port: Annotated[int, Meta(ge=0, le=spec.MAX_PORT)] = 0
    outside: Annotated[int, Meta(ge=0, le=spec.MAX_PORT)] = 0


class Beside(NamedTuple):
    """Where datagrams beside the session go: the id they begin with, 0: none are taken; the node's UDP port; and what
    the NAT in front of it makes of that, 0: unknown, or there is none."""

    receiver: int = 0
    port: int = 0
    outside: int = 0


NOWHERE = Beside()


class Outcome(enum.Enum):
    """Where a negotiation stands."""

    UNDER_WAY = enum.auto()
    AGREED = enum.auto()
    REFUSED = enum.auto()  # the peer said `na`
    UNKNOWN_PROTOCOL = enum.auto()  # the peer asked for something else; `na` is in the answer


_decode_hello = msgspec.msgpack.Decoder(Hello).decode


def item(body: bytes) -> bytes:
    """Put the varint length in front. `body` is shorter than 2^14 bytes."""
    size = len(body)
    if size < 0x80:
        return bytes((size,)) + body
    return bytes((size & 0x7F | 0x80, size >> 7)) + body


def encode_hello(hello: Capabilities, beside: Beside = NOWHERE) -> bytes:
    """A HELLO as it goes on the wire. LocalProtocolError if a peer would not take it."""
    ours = Hello(
        version=spec.HELLO_VERSION,
        offloads=hello.offloads,
        max_record=hello.max_record,
        mtu=hello.mtu,
        receiver=beside.receiver,
        port=beside.port,
        outside=beside.outside,
    )
    try:
        msgspec.convert(msgspec.structs.asdict(ours), Hello)
    except msgspec.ValidationError as error:
        raise LocalProtocolError(f"HELLO out of range: {error}") from None
    return item(msgspec.msgpack.encode(ours))


def decode_hello_untrusted(body: bytes | bytearray) -> tuple[Capabilities, Beside]:
    """What the peer's HELLO, without its length, says. Raises RemoteProtocolError only."""
    try:
        hello = _decode_hello(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"bad HELLO: {error}") from None
    takes = Capabilities(offloads=hello.offloads, max_record=hello.max_record, mtu=hello.mtu)
    return takes, Beside(hello.receiver, hello.port, hello.outside)


MULTISTREAM_ITEM = item(spec.MULTISTREAM_ID + spec.LINE_END)
NOT_AVAILABLE_ITEM = item(spec.NOT_AVAILABLE + spec.LINE_END)


class StreamProtocol(NamedTuple):
    """What is agreed on for every stream of a session.

    `hello_item`: our HELLO, empty where the protocol has none; then every peer is taken to be of `assumed`.
    `ordered`: the peer's stream ids rise. go-yamux gives an id out before it sends it, so one may overtake another.
    """

    name: bytes
    hello_item: bytes
    assumed: Capabilities | None
    ordered: bool

    @property
    def item(self) -> bytes:
        return item(self.name + spec.LINE_END)


def packet_protocol(hello: Capabilities, beside: Beside = NOWHERE) -> StreamProtocol:
    """Records, for a node whose TUN takes what `hello` says. LocalProtocolError if a peer would not take that."""
    return StreamProtocol(spec.PACKET_PROTOCOL_ID, encode_hello(hello, beside), None, True)


SUBNET_NODE = StreamProtocol(
    spec.SUBNET_NODE_PROTOCOL_ID,
    b"",
    Capabilities(offloads=0, max_record=PACKET_OFFSET + spec.SUBNET_NODE_MTU, mtu=spec.SUBNET_NODE_MTU),
    False,
)


class _Expect(enum.Enum):
    """The item a side waits for; both sides wait for them in this order."""

    MULTISTREAM = enum.auto()
    PROTOCOL = enum.auto()
    HELLO = enum.auto()


class Negotiation:
    """One side of one stream's opening, fed with any cuts. Holds at most one item of the peer."""

    __slots__ = (
        "_body",
        "_expect",
        "_length",
        "_length_bytes",
        "_opener",
        "_protocol",
        "beside",
        "hello",
        "outcome",
    )

    def __init__(self, *, opener: bool, protocol: StreamProtocol) -> None:
        self._opener = opener
        self._protocol = protocol
        self._expect = _Expect.MULTISTREAM
        self._length = 0
        self._length_bytes = 0
        self._body: bytearray | None = None  # None while the length is read
        self.outcome = Outcome.UNDER_WAY
        self.hello: Capabilities | None = None
        self.beside = NOWHERE

    def opening(self) -> bytes:
        """What the opener sends with its SYN."""
        return MULTISTREAM_ITEM + self._protocol.item + self._protocol.hello_item

    def feed_untrusted(self, data: memoryview) -> tuple[int, bytes]:
        """Take bytes until there is an outcome; return how many were taken and what to answer.

        After AGREED the rest of `data` is payload. Raises RemoteProtocolError only; it is dead then.
        """
        used = 0
        answer = b""
        while used < len(data) and self.outcome is Outcome.UNDER_WAY:
            if self._body is None:
                self._take_length_byte_untrusted(data[used])
                used += 1
                continue
            part = data[used : used + self._length - len(self._body)]
            self._body += part
            used += len(part)
            if len(self._body) == self._length:
                body, self._body = self._body, None
                self._length = self._length_bytes = 0
                answer += self._take_item_untrusted(body)
        return used, answer

    def _take_length_byte_untrusted(self, byte: int) -> None:
        self._length |= (byte & 0x7F) << (7 * self._length_bytes)
        self._length_bytes += 1
        if byte & 0x80:
            if self._length_bytes == spec.MAX_VARINT_BYTES:
                raise RemoteProtocolError("an item of a negotiation is too long")
            return
        if not byte:
            # Empty, or a varint with a useless last byte, which its specification forbids.
            raise RemoteProtocolError("bad length in a negotiation")
        most = spec.MAX_HELLO_BYTES if self._expect is _Expect.HELLO else spec.MAX_LINE_BYTES
        if self._length > most:
            raise RemoteProtocolError("an item of a negotiation is too long")
        self._body = bytearray()

    def _take_item_untrusted(self, body: bytearray) -> bytes:
        if self._expect is _Expect.HELLO:
            self.hello, self.beside = decode_hello_untrusted(body)
            self.outcome = Outcome.AGREED
            return b""
        if not body.endswith(spec.LINE_END):
            raise RemoteProtocolError("a line of a negotiation has no end")
        line = bytes(body[:-1])
        if self._expect is _Expect.MULTISTREAM:
            if line != spec.MULTISTREAM_ID:
                raise RemoteProtocolError("the peer does not speak multistream-select 1.0.0")
            self._expect = _Expect.PROTOCOL
            return b"" if self._opener else MULTISTREAM_ITEM
        if line == self._protocol.name:
            if self._protocol.hello_item:
                self._expect = _Expect.HELLO
            else:
                self.hello, self.outcome = self._protocol.assumed, Outcome.AGREED
            return b"" if self._opener else self._protocol.item + self._protocol.hello_item
        if not self._opener:
            self.outcome = Outcome.UNKNOWN_PROTOCOL
            return NOT_AVAILABLE_ITEM
        if line == spec.NOT_AVAILABLE:
            self.outcome = Outcome.REFUSED
            return b""
        raise RemoteProtocolError("the peer answers with a protocol that was not asked for")
