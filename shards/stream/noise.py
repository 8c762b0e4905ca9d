"""Noise transport messages between a socket and plaintext: sealing out, opening in.

Both ends own their buffer, made once and never resized. Ciphertext is written by the cipher straight to
where the socket takes it from, plaintext straight to where it is parsed; the only other copies move an
unfinished remainder to the front of a buffer.

The handshake is not here: keys and counters come from the process that did it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from shards.stream import spec
from vpnd import session
from vpnd.errors import LocalProtocolError, RemoteProtocolError
from vpnd.packet.ring import give_back, lazy_buffer

_pack_length = spec.MESSAGE_LENGTH.pack_into
_unpack_length = spec.MESSAGE_LENGTH.unpack_from
_pack_header = spec.HEADER_WORDS.pack_into
# What the packet path needs, as globals of this module: one look-up instead of two.
_PLAIN_DATA = spec.PLAIN_DATA
_HEADER_BYTES = spec.HEADER_BYTES
_TAG_BYTES = spec.TAG_BYTES
_LENGTH_BYTES = spec.MESSAGE_LENGTH_BYTES
_NONCE_LIMIT = spec.NONCE_LIMIT
_DATA_OVERHEAD = spec.DATA_OVERHEAD_BYTES
#: Messages between two `rest`s with which a buffer is hardly used: probes, and a ping or two.
LITTLE = 16


_CIPHERS: dict[str, type[ChaCha20Poly1305] | type[AESGCM]] = {
    session.CHACHAPOLY: ChaCha20Poly1305,
    session.AESGCM: AESGCM,
}


def _cipher(name: str, key: bytes, nonce: int) -> ChaCha20Poly1305 | AESGCM:
    """Check what was handed over; LocalProtocolError if it cannot be a cipher state."""
    if name not in _CIPHERS:
        raise LocalProtocolError(f"no such cipher: {name}")
    if len(key) != session.KEY_BYTES:
        raise LocalProtocolError(f"a key has {session.KEY_BYTES} bytes, not {len(key)}")
    if not 0 <= nonce < spec.NONCE_LIMIT:
        raise LocalProtocolError("nonce out of range")
    return _CIPHERS[name](key)


class _Use:
    """How much a buffer is used: messages, by the nonce, which counts them."""

    __slots__ = ("_given_back", "_rested")

    def __init__(self, nonce: int) -> None:
        #: at the last `ends`, and when that was last true
        self._rested = self._given_back = nonce

    def ends(self, nonce: int) -> bool:
        """Whether few messages have come since it was asked last, and many since this was last true."""
        few = nonce - self._rested <= LITTLE < nonce - self._given_back
        self._rested = nonce
        if few:
            self._given_back = nonce
        return few


class Sealer:
    """Plaintext in, sealed messages for the socket out.

        0        head          tail                    size - reserve     size
        |  sent  |  to be sent  |  room for data        |  control only    |

    Owner: the session; not thread-safe.
    """

    __slots__ = (
        "_encrypt",
        "_head",
        "_limit",
        "_nonce",
        "_size",
        "_tail",
        "_use",
        "_view",
        "nonce",
    )

    def __init__(
        self, key: bytes, nonce: int, buffer_bytes: int, reserve_bytes: int, cipher: str = session.CHACHAPOLY
    ) -> None:
        """`reserve_bytes` of the buffer are kept from seal_data(), for seal_control()."""
        self._encrypt = _cipher(cipher, key, nonce).encrypt_into
        self._nonce = spec.NONCES[cipher].pack
        self.nonce = nonce
        self._view = lazy_buffer(buffer_bytes)
        self._size = buffer_bytes
        self._limit = buffer_bytes - reserve_bytes
        self._head = 0
        self._tail = 0
        self._use = _Use(nonce)

    @property
    def most_bytes(self) -> int:
        """Payload that seal_data() always has room for while nothing waits to be sent, cut up by `survey`: of two
        messages in a row one is at least half full."""
        messages = 2 * self._limit // spec.MAX_FRAME_PAYLOAD_BYTES + 1
        return self._limit - messages * _DATA_OVERHEAD

    def seal_data(self, stream_id: int, ring: memoryview, start: int, ends: Sequence[int]) -> bool:
        """Seal ring[start:ends[0]], ring[ends[0]:ends[1]] and so on as plain data frames, one to a message; False, and
        nothing done, without room for all.

        The caller has checked start >= HEADER_BYTES, and that none is larger than MAX_FRAME_PAYLOAD_BYTES. Each frame's
        header is written into the twelve bytes in front of its payload: scratch for the first, bytes already sealed for
        the others. Raises RemoteProtocolError when the nonces are used up.
        """
        view, tail = self._view, self._tail
        if ends[-1] - start + len(ends) * _DATA_OVERHEAD > self._limit - tail:
            return False
        encrypt, pack_nonce, nonce = self._encrypt, self._nonce, self.nonce
        for end in ends:
            if nonce >= _NONCE_LIMIT:
                raise RemoteProtocolError("the session's nonces are used up")
            front = start - _HEADER_BYTES
            _pack_header(ring, front, _PLAIN_DATA, stream_id, end - start)
            sealed = end - front + _TAG_BYTES
            _pack_length(view, tail, sealed)
            begin = tail + _LENGTH_BYTES
            tail = begin + sealed
            encrypt(pack_nonce(nonce), ring[front:end], None, view[begin:tail])
            # Stored at once: a nonce must never serve twice, whatever happens to the next message.
            self.nonce = nonce = nonce + 1
            self._tail = tail
            start = end
        return True

    def seal_control(self, frames: bytes) -> bool:
        """Seal small frames as one message, also into the reserve; False, and nothing done, without room.

        Raises RemoteProtocolError when the nonces are used up.
        """
        sealed = len(frames) + spec.TAG_BYTES
        if self._tail + spec.MESSAGE_LENGTH_BYTES + sealed > self._size:
            self._to_front()
            if self._tail + spec.MESSAGE_LENGTH_BYTES + sealed > self._size:
                return False
        if self.nonce >= spec.NONCE_LIMIT:
            raise RemoteProtocolError("the session's nonces are used up")
        _pack_length(self._view, self._tail, sealed)
        start = self._tail + spec.MESSAGE_LENGTH_BYTES
        self._encrypt(self._nonce(self.nonce), frames, None, self._view[start : start + sealed])
        self.nonce += 1
        self._tail = start + sealed
        return True

    def data_to_send(self) -> memoryview:
        """borrowed: valid until data_sent() or until something is sealed."""
        return self._view[self._head : self._tail]

    def data_sent(self, count: int) -> memoryview | None:
        """The first `count` bytes of data_to_send() are out; what it gives now, None for nothing. LocalProtocolError if
        there were not so many."""
        head = self._head + count
        if count < 0 or head > self._tail:
            raise LocalProtocolError("more was sent than there was to send")
        self._head = head
        if head == self._tail:
            self._head = self._tail = 0
            return None
        if self._limit - self._tail < spec.MAX_WIRE_BYTES and head >= self._tail - head:
            # Moving no more than has been sent since the last move: at most one move a byte, ever.
            self._to_front()
        return self.data_to_send()

    def rest(self) -> None:
        """Called now and then: without the memory of the buffer while that is empty and hardly used."""
        if self._use.ends(self.nonce) and not self._tail:
            give_back(self._view)

    def _to_front(self) -> None:
        waiting = self._tail - self._head
        if self._head:
            self._view[:waiting] = self._view[self._head : self._tail]
            self._head = 0
            self._tail = waiting


class Opener:
    """Bytes of the socket in, plaintext of one message at a time out.

    `plain` holds the plaintext of the last message opened; `more`: bytes received behind it. Owner: the session; not
    thread-safe.
    """

    __slots__ = ("_decrypt", "_end", "_nonce", "_size", "_start", "_use", "_view", "more", "nonce", "plain")

    def __init__(
        self, key: bytes, nonce: int, buffer_bytes: int, plain_bytes: int, cipher: str = session.CHACHAPOLY
    ) -> None:
        """`plain_bytes`: size of `plain`; at least MAX_PLAINTEXT_BYTES are made."""
        self._decrypt = _cipher(cipher, key, nonce).decrypt_into
        self._nonce = spec.NONCES[cipher].pack
        self.nonce = nonce
        self._view = lazy_buffer(buffer_bytes)
        self._size = buffer_bytes
        self._start = 0
        self._end = 0
        self._use = _Use(nonce)
        self.more = 0
        self.plain = lazy_buffer(max(plain_bytes, spec.MAX_PLAINTEXT_BYTES))

    def receive_buffer(self) -> memoryview:
        """borrowed: free room behind what was received, until received(); empty only if much is unopened."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._size - self._end < spec.MAX_WIRE_BYTES and self._start:
            # Once the buffer's messages are opened, less than one message is left to be moved.
            waiting = self._end - self._start
            self._view[:waiting] = self._view[self._start : self._end]
            self._start = 0
            self._end = waiting
        return self._view[self._end :]

    def rest(self) -> None:
        """As Sealer's."""
        if self._use.ends(self.nonce) and self._start == self._end:
            give_back(self._view)

    def received(self, count: int) -> None:
        """`count` bytes were put into receive_buffer(). LocalProtocolError if they cannot have been."""
        if count < 0 or self._end + count > self._size:
            raise LocalProtocolError("more was received than there was room for")
        self._end += count

    def open_untrusted(self) -> int:
        """Open the next message into `plain`; return its length, or -1 if it is not all there yet.

        Raises RemoteProtocolError for a message that is too short or does not authenticate.
        """
        view = self._view
        start = self._start
        have = self._end - start
        if have < _LENGTH_BYTES:
            return -1
        (sealed,) = _unpack_length(view, start)
        if have - _LENGTH_BYTES < sealed:
            return -1
        if sealed < _TAG_BYTES:
            raise RemoteProtocolError(f"a message of {sealed} bytes has no room for its tag")
        nonce = self.nonce
        if nonce >= _NONCE_LIMIT:
            raise RemoteProtocolError("the session's nonces are used up")
        start += _LENGTH_BYTES
        end = start + sealed
        sealed -= _TAG_BYTES
        try:
            self._decrypt(self._nonce(nonce), view[start:end], None, self.plain[:sealed])
        except InvalidTag:
            raise RemoteProtocolError("a message does not authenticate") from None
        self.nonce = nonce + 1
        self._start = end
        self.more = self._end - end
        return int(sealed)
