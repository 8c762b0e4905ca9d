"""A span of records made fit for a peer whose TUN takes less than ours gives."""

from __future__ import annotations

from vpnd.errors import BadPacket
from vpnd.packet.capability import Capabilities
from vpnd.packet.offload import must_cut, segment
from vpnd.packet.record import LENGTH, LENGTH_BYTES
from vpnd.packet.ring import SCRATCH


def adapt(
    buffer: memoryview, start: int, end: int, capabilities: Capabilities
) -> tuple[memoryview, int, int, int]:
    """The records of buffer[start:end] as the peer takes them: (buffer, start, end, records left out).

    Without anything to cut this is the same span; else a new buffer with SCRATCH bytes in front of `start`.
    Left out is what cannot be made to fit. Such peers are rare (another kernel, offloads switched off), so
    this may copy.
    """
    fit = bytearray(SCRATCH)
    unfit = 0
    changed = False
    position = start
    while position < end:
        (count,) = LENGTH.unpack_from(buffer, position)
        following = position + LENGTH_BYTES + count
        record = buffer[position:following]
        if must_cut(buffer, position + LENGTH_BYTES, count, capabilities):
            changed = True
            try:
                for piece in segment(record, capabilities):
                    fit += piece
            except BadPacket:
                unfit += 1
        else:
            fit += record
        position = following
    if not changed:
        return buffer, start, end, 0
    return memoryview(fit), SCRATCH, len(fit), unfit
