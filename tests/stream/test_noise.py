"""Sealer and opener: format, limits, buffers."""

from __future__ import annotations

import random

import psutil
import pytest
from cryptography.hazmat.primitives.poly1305 import Poly1305
from hypothesis import given
from hypothesis import strategies as st

from shards.stream import spec
from shards.stream.noise import LITTLE, Opener, Sealer
from stream.pair import room, seal
from vpnd.errors import LocalProtocolError, RemoteProtocolError

KEY = bytes(range(32))
SIZE = 1 << 18
RESERVE = 1 << 12


def sealer(key: bytes = KEY, nonce: int = 0, size: int = SIZE) -> Sealer:
    return Sealer(key, nonce, size, RESERVE)


def opener(key: bytes = KEY, nonce: int = 0, size: int = 1 << 17) -> Opener:
    return Opener(key, nonce, size, 0)


def put(target: Opener, data: bytes) -> None:
    target.receive_buffer()[: len(data)] = data
    target.received(len(data))


def test_keystream_is_that_of_rfc_8439_block_1() -> None:
    """https://www.rfc-editor.org/rfc/rfc8439#appendix-A.1 test vector 2: zero key and nonce, counter 1."""
    keystream = bytes.fromhex(
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    out = sealer(key=bytes(32))
    assert out.seal_control(bytes(64))
    wire = bytes(out.data_to_send())
    assert wire[:2] == (64 + 16).to_bytes(2, "big")
    assert wire[2:66] == keystream


def test_counter_is_little_endian_behind_four_zero_bytes() -> None:
    """Appendix A.1 test vector 5: nonce 00 … 00 02, counter 0, is the block the tag's key is taken from."""
    block = bytes.fromhex("c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7")
    out = sealer(key=bytes(32), nonce=2 << 56)
    assert out.seal_control(b"")
    # RFC 8439, 2.8: no associated data and no ciphertext leave the two lengths, both zero.
    assert bytes(out.data_to_send()) == b"\x00\x10" + Poly1305.generate_tag(block, bytes(16))


def test_appendix_a5_key_and_nonce_open_what_was_sealed_with_them() -> None:
    """Key and nonce of A.5; its counter as Noise sees it."""
    key = bytes.fromhex("1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0")
    nonce = int.from_bytes(bytes.fromhex("0102030405060708"), "little")
    assert spec.NONCES["chachapoly"].pack(nonce) == bytes.fromhex("000000000102030405060708")
    out, into = sealer(key, nonce), opener(key, nonce)
    out.seal_control(b"Internet-Drafts are draft documents")
    put(into, bytes(out.data_to_send()))
    assert into.plain[: into.open_untrusted()] == b"Internet-Drafts are draft documents"


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
def test_a_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        sealer(key)


@pytest.mark.parametrize("nonce", [-1, spec.NONCE_LIMIT, spec.NONCE_LIMIT + 1])
def test_a_nonce_that_cannot_be_used_is_refused(nonce: int) -> None:
    for make in (sealer, opener):
        with pytest.raises(LocalProtocolError):
            make(nonce=nonce)


def test_the_reserved_nonce_is_never_used() -> None:
    out, into = sealer(nonce=spec.NONCE_LIMIT - 1), opener(nonce=spec.NONCE_LIMIT - 1)
    ring = memoryview(bytearray(100))
    seal(out, ring, 12, 20)
    put(into, bytes(out.data_to_send()))
    assert into.open_untrusted() == 20
    with pytest.raises(RemoteProtocolError, match="used up"):
        seal(out, ring, 12, 20)
    with pytest.raises(RemoteProtocolError, match="used up"):
        out.seal_control(b"x")
    put(into, b"\x00\x10" + bytes(16))
    with pytest.raises(RemoteProtocolError, match="used up"):
        into.open_untrusted()


@given(st.integers(0, SIZE))
def test_room_is_exact(first: int) -> None:
    """All that fits is sealed, header, tag and length of every message included; with one byte more, nothing is."""
    out = sealer()
    ring = memoryview(bytearray(13 + SIZE))
    first = min(first, room(out))
    assert seal(out, ring, 12, 12 + first)
    most, before = room(out), len(out.data_to_send())
    assert not seal(out, ring, 12, 12 + most + 1) and len(out.data_to_send()) == before
    assert seal(out, ring, 12, 12 + most)
    assert room(out) == 0
    # A further byte would need a message of its own.
    assert 0 <= SIZE - RESERVE - len(out.data_to_send()) <= spec.DATA_OVERHEAD_BYTES


def test_a_span_over_many_messages_overwrites_only_its_scratch_and_itself() -> None:
    out, into = sealer(size=1 << 19), opener(size=1 << 19)
    payload = random.Random(1).randbytes(200_000)
    ring = bytearray(b"front" + bytes(12) + payload + b"behind")
    before = out.nonce
    assert seal(out, memoryview(ring), 17, 17 + len(payload), 5)
    assert out.nonce - before == 4
    assert ring[:5] == b"front" and ring[-6:] == b"behind"
    put(into, bytes(out.data_to_send()))
    got = b""
    while (size := into.open_untrusted()) >= 0:
        header, body = bytes(into.plain[:12]), bytes(into.plain[12:size])
        assert header == spec.HEADER.pack(0, 0, 0, 5, len(body))
        got += body
    assert got == payload


def test_control_frames_find_the_reserve_and_then_no_room() -> None:
    out = sealer()
    ring = memoryview(bytearray(12 + SIZE))
    seal(out, ring, 12, 12 + room(out))
    answers = 0
    while out.seal_control(bytes(12)):
        answers += 1
        assert room(out) == 0
    assert answers >= RESERVE // 30
    assert len(out.data_to_send()) <= SIZE
    nonce = out.nonce
    assert not out.seal_control(bytes(12)) and out.nonce == nonce


def test_all_sent_is_all_room() -> None:
    out = sealer()
    all_of_it = room(out)
    ring = memoryview(bytearray(12 + 1000))
    for _ in range(3):
        seal(out, ring, 12, 1012)
        out.data_sent(len(out.data_to_send()))
        assert room(out) == all_of_it


def test_control_frames_use_room_in_front_when_the_back_is_full() -> None:
    out = sealer()
    ring = memoryview(bytearray(12 + SIZE))
    seal(out, ring, 12, 12 + room(out))
    while out.seal_control(bytes(12)):
        pass
    out.data_sent(100)
    waiting = bytes(out.data_to_send())
    assert out.seal_control(bytes(12))
    assert bytes(out.data_to_send())[: len(waiting)] == waiting


@given(st.lists(st.tuples(st.integers(0, 90_000), st.integers(0, 200_000)), max_size=30))
def test_bytes_leave_in_order_whatever_the_socket_takes(steps: list[tuple[int, int]]) -> None:
    out = sealer()
    ring = memoryview(bytearray(12 + 90_000))
    wire = b""
    lengths = []
    for size, taken in steps:
        size = min(size, room(out))
        seal(out, ring, 12, 12 + size)
        lengths.append(size)
        part = bytes(out.data_to_send()[:taken])
        wire += part
        out.data_sent(len(part))
    rest = bytes(out.data_to_send())
    out.data_sent(len(rest))
    wire += rest
    assert not out.data_to_send()
    into = opener(size=1 << 17)
    total = 0
    while wire:
        free = into.receive_buffer()
        part, wire = wire[: len(free)], wire[len(free) :]
        put(into, part)
        while (size := into.open_untrusted()) >= 0:
            total += size - 12
    assert total == sum(lengths)
    assert into.nonce == out.nonce


def test_more_sent_or_received_than_possible_is_the_callers_bug() -> None:
    out, into = sealer(), opener()
    for count in (-1, 1):
        with pytest.raises(LocalProtocolError):
            out.data_sent(count)
    for count in (-1, (1 << 17) + 1):
        with pytest.raises(LocalProtocolError):
            into.received(count)


BROKEN = {
    "a bit of the ciphertext": lambda wire: wire[:5] + bytes([wire[5] ^ 1]) + wire[6:],
    "a bit of the tag": lambda wire: wire[:-1] + bytes([wire[-1] ^ 0x80]),
    "a length that cuts the tag": lambda wire: (len(wire) - 3).to_bytes(2, "big") + wire[2:],
    "a message without room for a tag": lambda wire: b"\x00\x0f" + bytes(15),
    "an empty message": lambda wire: b"\x00\x00",
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_message_does_not_open(damage: str) -> None:
    out, into = sealer(), opener()
    out.seal_control(b"twelve bytes and some")
    put(into, BROKEN[damage](bytes(out.data_to_send())))
    with pytest.raises(RemoteProtocolError):
        into.open_untrusted()


def test_a_replayed_message_does_not_open() -> None:
    out, into = sealer(), opener()
    out.seal_control(b"once")
    put(into, bytes(out.data_to_send()) * 2)
    assert into.open_untrusted() == 4
    with pytest.raises(RemoteProtocolError):
        into.open_untrusted()


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_buffers_take_memory_as_they_are_used_and_give_it_back_at_rest() -> None:
    size = 1 << 26
    before = resident_bytes()
    out, into = sealer(size=size), opener(size=size)
    assert resident_bytes() - before < size // 8, "nothing is taken before it is used"
    scratch = memoryview(bytearray(spec.HEADER_BYTES + (1 << 20)))
    while room(out) > 1 << 20:
        seal(out, scratch, spec.HEADER_BYTES, len(scratch))
    put(into, bytes(out.data_to_send()))
    out.rest()
    into.rest()
    assert resident_bytes() - before > size, "what waits stays"
    while into.open_untrusted() >= 0:
        pass
    out.data_sent(len(out.data_to_send()))
    for _ in range(2):
        out.rest()
        into.rest()
    assert resident_bytes() - before < size // 2
    for _ in range(2 * LITTLE):
        assert out.seal_control(b"it goes on")
        put(into, bytes(out.data_to_send()))
        out.data_sent(len(out.data_to_send()))
        assert bytes(into.plain[: into.open_untrusted()]) == b"it goes on"
