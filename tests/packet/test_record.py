"""Records: how a span of them is cut into messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vpnd.packet.record import LENGTH, LENGTH_BYTES, MAX_RECORD_BYTES, MIN_RECORD_BYTES, survey

FRONT = 5


@given(
    st.lists(st.integers(MIN_RECORD_BYTES, 700) | st.just(MAX_RECORD_BYTES), min_size=1, max_size=40),
    st.integers(600, 2_000) | st.just(65_507),
)
def test_pieces_are_of_whole_records_and_no_larger_than_they_may_be(sizes: list[int], most: int) -> None:
    span = bytearray(FRONT)
    starts = []
    for size in sizes:
        starts.append(len(span))
        span += LENGTH.pack(size - LENGTH_BYTES) + bytes(size - LENGTH_BYTES)
    packets, ends = survey(memoryview(span), FRONT, len(span), len(sizes), most)
    assert packets == len(sizes)
    assert ends[-1] == len(span) and ends == sorted(set(ends))
    pieces = list(zip([FRONT, *ends], ends, strict=False))
    assert all(0 < end - start <= most for start, end in pieces)
    borders = {FRONT, *ends}
    for start, size in zip(starts, sizes, strict=True):
        inside = [border for border in borders if start < border < start + size]
        if size <= most:
            assert not inside, "a record that fits into a message is in one"
        else:
            assert start in borders and len(inside) == (size - 1) // most
    whole = [(start, end) for start, end in pieces if start in starts and end in {*starts, len(span)}]
    for (start, middle), (again, end) in zip(whole, whole[1:], strict=False):
        if middle == again:
            following = next(at for at in [*starts, len(span)] if at > again)
            assert following - start > most, "a piece takes all that fits"
            assert end > middle
