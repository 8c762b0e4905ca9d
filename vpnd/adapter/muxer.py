"""What a member's libp2p connection may cost: streams that are open, bytes nobody has read yet.

py-libp2p's Yamux counts what a peer sends beyond a stream's receive window, writes a line, and keeps it; and takes any
number of streams. `bound` makes either the end of the connection. `limit_negotiation` bounds the messages of
multistream-select, of which a stranger can send the first before any handshake, and which are read whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import MessageTooLarge
from libp2p.protocol_muxer import multiselect_communicator
from libp2p.protocol_muxer.exceptions import (
    MultiselectClientError,
    MultiselectCommunicatorError,
    ProtocolNotSupportedError,
)
from libp2p.protocol_muxer.multiselect_client import (
    DEFAULT_NEGOTIATE_TIMEOUT,
    MULTISELECT_PROTOCOL_ID,
    PROTOCOL_NOT_FOUND_MSG,
    MultiselectClient,
)
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from vpnd.session import AESGCM, CHACHAPOLY

#: As other implementations of multistream-select have it (go-multistream); a protocol's name is far shorter.
MAX_NEGOTIATION_BYTES = 1024
#: Of what a peer said wrongly, in an error.
MAX_SHOWN = 40


class TooMuch(ConnectionAbortedError):
    """The peer goes beyond what a connection may cost."""


class _Streams(dict[int, Any]):
    """The streams of a connection, at most `most`."""

    def __init__(self, most: int, refuse: Callable[[str], TooMuch]) -> None:
        super().__init__()
        self._most, self._refuse = most, refuse

    def __setitem__(self, stream_id: int, stream: Any) -> None:
        if len(self) >= self._most:
            raise self._refuse(f"more than {self._most} streams")
        super().__setitem__(stream_id, stream)


def bound(muxed: Yamux, max_streams: int, max_bytes: int, told: Callable[[str], None]) -> None:
    """End the connection when it has more than that. Before it starts. `told` gets the reason."""

    def refuse(why: str) -> TooMuch:
        told(f"closed a connection of {muxed.peer_id}: {why}")
        return TooMuch(why)

    stock = muxed._read_data_body

    async def read_data_body(length: int) -> bytes:
        if length + sum(map(len, muxed.stream_buffers.values())) > max_bytes:
            error = refuse(f"more than {max_bytes} bytes that wait to be read")
            # Ended here: for an error in the body of a frame py-libp2p would read on behind its header.
            muxed.event_shutting_down.set()
            await muxed._cleanup_on_error()
            raise error
        return await stock(length)

    muxed.streams = _Streams(max_streams, refuse)
    muxed._read_data_body = read_data_body  # type: ignore[method-assign]


def bound_all(
    swarm: Any,
    max_streams: int,
    max_bytes: int,
    told: Callable[[str], None],
    divert: Callable[[Any, str], None],
) -> None:
    """Every libp2p connection of a swarm. Before it listens. `divert` is given the secured connection and peer id of
    each inbound one, and may take it out and raise."""
    muxers = swarm.upgrader.muxer_multistream
    stock = muxers.new_conn

    async def new_conn(conn: Any, peer_id: Any) -> Any:
        muxed = await stock(conn, peer_id)
        if isinstance(muxed, Yamux):
            if not conn.is_initiator:
                divert(conn, str(peer_id))
            bound(muxed, max_streams, max_bytes, told)
        return muxed

    muxers.new_conn = new_conn


def limit_negotiation() -> None:
    """For all hosts of the process."""
    multiselect_communicator.read_delim = _read_delimited_untrusted


def negotiate_at_once() -> None:
    """For all hosts of the process: a dialer proposes with its greeting, instead of a round trip later; twice in each
    connection. The specification permits it (https://github.com/multiformats/multistream-select)."""
    MultiselectClient.select_one_of = _select_untrusted  # type: ignore[method-assign, assignment]


async def _select_untrusted(
    client: MultiselectClient,
    protocols: Sequence[TProtocol],
    communicator: Any,
    negotiate_timeout: float = DEFAULT_NEGOTIATE_TIMEOUT,
) -> TProtocol:
    """See MultiselectClient.select_one_of. Raises MultiselectClientError."""
    with trio.move_on_after(negotiate_timeout):
        first, *others = protocols
        try:
            await communicator.write(MULTISELECT_PROTOCOL_ID)
            await communicator.write(first)
            greeting, answer = await communicator.read(), await communicator.read()
        except MultiselectCommunicatorError as error:
            raise MultiselectClientError(f"the connection ended: {error}") from error
        if greeting != MULTISELECT_PROTOCOL_ID:
            raise MultiselectClientError(f"{greeting[:MAX_SHOWN]!r} is no greeting of multistream-select")
        if answer == first:
            return first
        if answer != PROTOCOL_NOT_FOUND_MSG:
            raise MultiselectClientError(f"{answer[:MAX_SHOWN]!r} is no answer to {first}")
        for protocol in others:
            with contextlib.suppress(ProtocolNotSupportedError):
                return await client.try_select(communicator, protocol)
        raise MultiselectClientError(f"protocols not supported: {', '.join(map(str, protocols))}")
    raise MultiselectClientError(f"no answer within {negotiate_timeout:g} s")


async def _read_delimited_untrusted(reader: Any) -> bytes:
    """One message without its newline. Raises ParseError; what libp2p raises at the end."""
    try:
        message = await read_varint_prefixed_bytes_limited(reader, MAX_NEGOTIATION_BYTES)
    except (MessageTooLarge, ValueError) as error:
        raise ParseError(str(error)) from error
    if not message.endswith(b"\n"):
        raise ParseError("a message of multistream-select does not end with a newline")
    return message[:-1]


# --- which cipher
#
# libp2p's handshake always ends in ChaCha20-Poly1305. A session may go on with AES-256-GCM, Noise's other cipher
# (https://noiseprotocol.org/noise.html, 12.4), where both CPUs have instructions for it: it then costs a third. The
# muxer id says which, so a node that does not offer it is simply asked for the next one.
#
# Keys are never used under two ciphers: those for AES-GCM are derived from the ones the handshake gave, by
# HKDF-SHA256 with a label of their own, and their nonces begin at 0.

#: cipher → the muxer id that makes a connection a data session with it, in order of preference
SESSION_MUXERS = {AESGCM: "/vpnd/yamux-aesgcm/1.0.0", CHACHAPOLY: "/vpnd/yamux/1.0.0"}

_LABEL = b"vpnd session key for AES-256-GCM, version 1"
_CPU = Path("/proc/cpuinfo")
#: Flags of /proc/cpuinfo: the cipher and the multiplication of its authenticator, on x86-64 and on ARMv8.
_INSTRUCTIONS = ({"aes", "pclmulqdq"}, {"aes", "pmull"})


def offered(setting: str) -> tuple[str, ...]:
    """Ciphers this node dials and accepts with, best first. `setting` is session.cipher; "auto" asks the CPU.

    ChaCha20-Poly1305 is always among them, so that two nodes always find one.
    """
    if setting == AESGCM or setting == "auto" and has_aes(_CPU.read_text(encoding="utf-8")):
        return AESGCM, CHACHAPOLY
    return (CHACHAPOLY,)


def has_aes(cpuinfo: str) -> bool:
    """Whether the first CPU in /proc/cpuinfo has what makes AES-GCM fast."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(value.split())
            return any(wanted <= flags for wanted in _INSTRUCTIONS)
    return False


def derive(key: bytes) -> bytes:
    """The AES-256-GCM key that goes with a ChaCha20-Poly1305 key of the handshake; both ends derive the same."""
    return HKDF(algorithm=SHA256(), length=len(key), salt=None, info=_LABEL).derive(key)
