"""Datagrams sealed and opened: keys by epoch, the counter that is the nonce, and the window against replays.

A packet's bytes are touched once on the way out (ring → batch) and once on the way in (socket's buffer → plaintext); a
slice is copied once more, to where it is joined.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shards.datagram import spec
from vpnd import session
from vpnd.packet import ecn
from vpnd.packet.offload import slices
from vpnd.packet.record import LENGTH, LENGTH_BYTES, PACKET_OFFSET
from vpnd.packet.ring import lazy_buffer

_HEADER_BYTES = spec.HEADER_BYTES
_TAG_BYTES = spec.TAG_BYTES
_OVERHEAD = spec.OVERHEAD_BYTES
_EPOCH_BITS = spec.EPOCH_BITS
_WINDOW = spec.WINDOW
_MAX_BATCH_BYTES = spec.MAX_BATCH_BYTES
_SLICE = slices.SLICE
_ECN_PLACE, _ECN_EITHER, _ecn_of = ecn.PLACE, ecn.EITHER, ecn.bits_of
_header_into, _header_from = spec.HEADER.pack_into, spec.HEADER.unpack_from
_length_into, _length_from = LENGTH.pack_into, LENGTH.unpack_from

_CIPHERS: dict[str, type[AESGCM] | type[ChaCha20Poly1305]] = {
    session.AESGCM: AESGCM,
    session.CHACHAPOLY: ChaCha20Poly1305,
}
#: Every bit of the window.
_ALL = (1 << _WINDOW) - 1


def _derive(key: bytes, label: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=session.KEY_BYTES, salt=None, info=label).derive(key)


class Epochs:
    """The keys of one direction: that of `epoch`, the one before it and the next. `session_key`: of the session, the
    same direction."""

    def __init__(self, cipher: str, session_key: bytes) -> None:
        self._make = _CIPHERS[cipher]
        self.epoch = 0
        self._next_key = _derive(session_key, spec.FIRST_LABEL)
        self._ciphers: dict[int, AESGCM | ChaCha20Poly1305] = {}
        self._add(0)
        self._add(1)

    def _add(self, epoch: int) -> None:
        self._ciphers[epoch] = self._make(self._next_key)
        self._next_key = _derive(self._next_key, spec.NEXT_LABEL)
        self._ciphers.pop(epoch - 3, None)

    def get(self, epoch: int) -> AESGCM | ChaCha20Poly1305 | None:
        """None: of an epoch too far away."""
        return self._ciphers.get(epoch)

    def reach(self, epoch: int) -> None:
        """`epoch`, for which there is a key, is the current one if it is later."""
        while self.epoch < epoch:
            self.epoch += 1
            self._add(self.epoch + 1)


class Batch:
    """Sealed datagrams for one address, one behind the other, until the socket has taken them. One for a shard.

    `runs`: (begin, end, size of each, ECN bits) of datagrams of equal size, the last of them perhaps smaller: one
    system call. `ecn`: of what is added from now on, see `carry`.
    """

    __slots__ = ("_begin", "_limit", "_size", "bytes", "ecn", "runs", "tail", "view")

    def __init__(self, size: int) -> None:
        self.bytes = size
        self.view = lazy_buffer(size)
        self.runs: list[tuple[int, int, int, int]] = []
        self.tail = self._begin = self._size = self._limit = self.ecn = 0

    def carry(self, bits: int) -> None:
        """What is added from now on has these ECN bits on its way."""
        self.end_run()
        self.ecn = bits

    def add(self, size: int) -> None:
        """A datagram of `size` bytes was written at `tail`."""
        tail = self.tail
        if size > self._size or tail + size > self._limit:
            self.end_run()
            self._begin, self._size = tail, size
            self._limit = tail + min(_MAX_BATCH_BYTES, size * spec.MAX_BATCH)
        self.tail = tail + size
        if size < self._size:
            self.end_run()

    def end_run(self) -> None:
        """What was added goes out in a call of its own."""
        if self.tail > self._begin and self._size:
            self.runs.append((self._begin, self.tail, self._size, self.ecn))
        self._begin, self._size, self._limit = self.tail, 0, 0

    def clear(self) -> None:
        """All is out, or is not to go out."""
        self.runs.clear()
        self.tail = self._begin = self._size = self._limit = self.ecn = 0


class Sealer:
    """Records in, datagrams of one association out. `receiver`: the id the peer has given it. `counter`: of the next
    one, and how many there were. Owner: the association."""

    def __init__(self, cipher: str, session_key: bytes, receiver: int) -> None:
        self.counter = 0
        self._receiver = receiver
        self._epochs = Epochs(cipher, session_key)
        self._encrypt = self._cipher(0).encrypt_into

    def _cipher(self, epoch: int) -> AESGCM | ChaCha20Poly1305:
        self._epochs.reach(epoch)
        cipher = self._epochs.get(epoch)
        assert cipher is not None  # `reach` made it
        return cipher

    def seal(self, batch: Batch, body: memoryview | bytes) -> None:
        """One datagram. The batch has room for it."""
        counter, tail = self.counter, batch.tail
        if not counter & (1 << _EPOCH_BITS) - 1:
            self._encrypt = self._cipher(counter >> _EPOCH_BITS).encrypt_into
        # Stored first: a nonce must never serve twice, whatever happens to this datagram.
        self.counter = counter + 1
        view = batch.view
        start = tail + _HEADER_BYTES
        end = start + len(body) + _TAG_BYTES
        _header_into(view, tail, self._receiver, counter)
        self._encrypt(view[tail:start], body, None, view[start:end])
        batch.add(end - tail)

    def seal_records(
        self, batch: Batch, ring: memoryview, start: int, end: int, room: int
    ) -> tuple[int, int]:
        """Seal the records of ring[start:end] in bodies of at most `room` bytes: (how far it got, records).

        It stops before a record that does not fit and cannot be sliced, and before one for which the batch has no room.
        `ring` is writable; what was sealed is no longer what it was. A datagram has the ECN bits of its first record;
        where that may be marked, so may all that are with it.
        """
        seal = self.seal
        position, records = start, 0
        while position < end:
            bits = 0
            if ring[position + _ECN_PLACE] & _ECN_EITHER:
                bits = _ecn_of(ring, position + PACKET_OFFSET)
            if bits != batch.ecn:
                batch.carry(bits)
            free = batch.bytes - batch.tail
            size = LENGTH_BYTES + _length_from(ring, position)[0]
            if size > room:
                front, most = slices.shape(ring, position, room)
                pieces = -(-(size - front) // most) if most else 0
                if not most or size + pieces * (front + _OVERHEAD) > free:
                    break
                self._seal_slices(batch, ring, position, position + size, front, most)
                position += size
                records += 1
                continue
            stop = position + size
            if size + _OVERHEAD > free:
                break
            records += 1
            while stop < end:
                following = stop + LENGTH_BYTES + _length_from(ring, stop)[0]
                if following - position > room or following - position + _OVERHEAD > free:
                    break
                if bits and _ecn_of(ring, stop + PACKET_OFFSET) != bits:
                    break
                stop = following
                records += 1
            seal(batch, ring[position:stop])
            position = stop
        return position, records

    def _seal_slices(
        self, batch: Batch, ring: memoryview, start: int, end: int, front: int, most: int
    ) -> None:
        """A superpacket: each slice's headers are written over data that are sealed already."""
        seal = self.seal
        head = bytes(ring[start : start + front])
        offset, position = 0, start
        last = end - most - front  # slices that begin before this are full
        while position < last:
            _length_into(ring, position, _SLICE | offset)
            seal(batch, ring[position : position + front + most])
            offset += most
            position += most
            ring[position : position + front] = head
        _length_into(ring, position, _SLICE | offset)
        seal(batch, ring[position:end])


class Opener:
    """Datagrams of one association in, bodies out. Owner: the association.

    `top`: the highest counter that has come. `received`: datagrams that have come; `missed`: counters that were left
    out when a higher one came; `late`: of those, that came after all. What was refused: `replayed` (come before, or too
    old to tell), `forged` (they do not authenticate).
    """

    def __init__(self, cipher: str, session_key: bytes) -> None:
        self.top = -1
        self.received = self.missed = self.late = self.replayed = self.forged = 0
        self._epochs = Epochs(cipher, session_key)
        self._epoch = -1
        self._decrypt = self._epochs.get(0).decrypt_into  # type: ignore[union-attr]
        #: bit n: counter `_mark` - n has come; everything above `_mark` up to `top` has
        self._seen, self._mark = 0, -1

    def open_untrusted(
        self, view: memoryview, start: int, end: int, plain: memoryview, into: int
    ) -> tuple[int, int]:
        """Open view[start:end] into plain[into:]: (its counter, the length of its body); a length of -1: refused."""
        body = start + _HEADER_BYTES
        size = end - body - _TAG_BYTES
        if size < LENGTH_BYTES:
            self.forged += 1
            return -1, -1
        _, counter = _header_from(view, start)
        following = counter == self.top + 1  # nearly always
        if not following and not self._is_fresh(counter):
            self.replayed += 1
            return counter, -1
        epoch = counter >> _EPOCH_BITS
        decrypt = self._decrypt
        if epoch != self._epoch:
            cipher = self._epochs.get(epoch)
            if cipher is None:
                self.forged += 1
                return counter, -1
            decrypt = cipher.decrypt_into
        try:
            decrypt(view[start:body], view[body:end], None, plain[into : into + size])
        except InvalidTag:
            self.forged += 1
            return counter, -1
        if following:
            self.top = counter
        else:
            self._note(counter)
        if epoch > self._epoch:
            self._epochs.reach(epoch)
            self._epoch, self._decrypt = epoch, decrypt
        self.received += 1
        return counter, size

    def _is_fresh(self, counter: int) -> bool:
        age = self.top - counter
        if age < 0:
            return True
        if age >= _WINDOW:
            return False
        self._settle()
        return not self._seen >> age & 1

    def _settle(self) -> None:
        """Bring the window up to `top`."""
        run = self.top - self._mark
        if run:
            self._seen = _ALL if run >= _WINDOW else (self._seen << run | (1 << run) - 1) & _ALL
            self._mark = self.top

    def _note(self, counter: int) -> None:
        """A datagram that did not follow the one before has come."""
        self._settle()
        ahead = counter - self.top
        if ahead > 0:
            self._seen = (self._seen << ahead | 1) & _ALL if ahead < _WINDOW else 1
            self.missed += ahead - 1
            self.top = self._mark = counter
        else:
            self._seen |= 1 << -ahead
            self.late += 1
