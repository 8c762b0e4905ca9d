"""Records through two associations: whole, in slices, over ways that lose, double and reorder; and what is refused."""

from __future__ import annotations

import os
from random import Random

import pytest
from packet.builder import V4, V6, record, tcp, udp, vnet
from packet.test_offload_slices import packets

from datagram.pair import HERE, THERE, End, Net, established
from shards.datagram import spec
from shards.datagram.sealing import Batch, Epochs, Opener, Sealer
from vpnd.errors import RemoteProtocolError
from vpnd.packet.record import LENGTH
from vpnd.session import AESGCM, CHACHAPOLY


def pair() -> tuple[End, End]:
    return Net(Random(1)).ends


def mixed(random: Random, count: int) -> list[bytes]:
    """Records of all kinds."""
    kinds = (
        lambda: record(vnet(tcp(V4, random.randbytes(random.randrange(2000, 60_000))), gso_size=1348)),
        lambda: record(vnet(udp(V6, random.randbytes(random.randrange(1201, 30_000))), gso_size=600)),
        lambda: record(vnet(udp(V4, random.randbytes(random.randrange(1, 1000))))),
        lambda: record(vnet(tcp(V4, b""))),
    )
    return [random.choice(kinds)() for _ in range(count)]


@pytest.mark.parametrize("cipher", [AESGCM, CHACHAPOLY])
def test_records_arrive_as_they_were(cipher: str) -> None:
    random = Random(3)
    sealer = Sealer(cipher, established(True).send_key, 8)
    opener = Opener(cipher, established(False).receive_key)
    body = LENGTH.pack(60) + random.randbytes(60)
    batch, plain = Batch(1 << 16), memoryview(bytearray(1 << 16))
    sealer.seal(batch, body)
    assert batch.view[0] == 0 and batch.view[3] == 8, "the receiver's id comes first"
    assert opener.open_untrusted(batch.view, 0, batch.tail, plain, 5) == (0, len(body))
    assert plain[5 : 5 + len(body)] == body


def test_small_records_share_datagrams_and_superpackets_are_cut() -> None:
    a, b = pair()
    records = mixed(Random(5), 40)
    sent = a.seal(records)
    assert max(map(len, sent)) <= spec.BASE_BYTES
    b.take(sent, HERE)
    assert b.records == records and not b.bad
    small = [record(vnet(udp(V4, bytes(100))))] * 30
    assert len(a.seal(small)) == 4


def test_datagrams_of_one_size_go_out_together_and_others_apart() -> None:
    batch = Batch(1 << 18)
    for size in [100] * 70 + [60, 100, 200]:
        batch.add(size)
    batch.end_run()
    sizes = [(end - begin, size) for begin, end, size, _ in batch.runs]
    assert sizes == [(6400, 100), (660, 100), (100, 100), (200, 200)]
    for _ in range(60):
        batch.add(1472)
    batch.end_run()
    assert all(end - begin <= spec.MAX_BATCH_BYTES for begin, end, *_ in batch.runs)


@pytest.mark.parametrize("addresses", [V4, V6])
def test_what_heeds_marks_of_congestion_goes_so_that_it_can_be_marked(addresses: tuple[str, str]) -> None:
    """What does not may have such with it, but not the other way round."""
    a, b = pair()
    order = (2, 2, 1, 0, 2, 3)
    records = [record(vnet(udp(addresses, bytes(500), tos=bits))) for bits in order]
    ring = memoryview(bytearray(64) + bytearray(b"".join(records)) + bytearray(64))
    end = len(ring) - 64
    assert a.association.seal(a.batch, ring, 64, end) == (end, len(records))
    a.batch.end_run()
    assert [bits for *_, bits in a.batch.runs] == [2, 1, 0, 3]
    for begin, stop, size, bits in a.batch.runs:
        b.association.receive_untrusted(a.batch.view, begin, stop, size, HERE, bits > 0, 0.0)
    assert b.records == [record(vnet(udp(addresses, bytes(500), tos=bits))) for bits in (3, 3, 3, 0, 2, 3)]


@pytest.mark.parametrize("addresses", [V4, V6])
def test_a_marked_slice_marks_its_part_of_a_superpacket_and_no_other(addresses: tuple[str, str]) -> None:
    a, b = pair()
    sent = a.seal([record(vnet(udp(addresses, bytes(9 * 500), tos=2), gso_size=500))])
    assert len(sent) == 5
    for at, each in enumerate(sent):
        b.take([each], HERE, marked=at == 2)
    shift = 0 if addresses == V4 else 4
    seen = [packet[1] >> shift & 3 for packet in packets(b.records)]
    assert seen == [2] * 4 + [3] * 2 + [2] * 3
    assert not b.bad


def test_what_does_not_fit_is_left_to_the_caller() -> None:
    a, _ = pair()
    large = record(vnet(udp(V4, bytes(1300))))
    ring = memoryview(bytearray(64) + bytearray(large) + bytearray(64))
    assert a.association.seal(a.batch, ring, 64, 64 + len(large)) == (64, 0)
    assert not a.association.fits(len(large))
    tight = Batch(5000)
    many = record(vnet(udp(V4, bytes(900)))) * 10
    ring = memoryview(bytearray(64) + bytearray(many) + bytearray(64))
    reached, count = a.association.seal(tight, ring, 64, 64 + len(many))
    assert count == 5 and reached == 64 + len(many) // 2


@pytest.mark.parametrize("seed", range(12))
def test_a_bad_way_costs_what_it_loses_and_nothing_comes_twice(seed: int) -> None:
    random = Random(seed)
    a, b = pair()
    for _ in range(30):
        records = mixed(random, random.randrange(1, 8))
        sent = a.seal(records)
        way = [each for each in sent if random.random() > 0.1]
        way += [each for each in way if random.random() < 0.1]
        for _ in range(random.randrange(4)):
            at = random.randrange(max(1, len(way) - 1))
            way[at : at + 2] = way[at : at + 2][::-1]
        before = b.association.opener.received
        b.records.clear()
        b.take(way, HERE)
        assert b.association.opener.received - before == len(set(way))
        packets(b.records)  # each of them is a sound packet
        assert sum(map(len, b.records)) <= sum(map(len, records)) + 80 * len(way)
    opener = b.association.opener
    assert opener.replayed > 0 and opener.forged == 0 and not b.bad
    assert opener.top + 1 == opener.received + opener.missed - opener.late, "every datagram is accounted for"


def test_forged_short_and_old_datagrams_are_counted_and_nothing_comes_of_them() -> None:
    a, b = pair()
    (whole,) = a.seal([record(vnet(udp(V4, b"x")))])
    opener = b.association.opener
    for at in (0, 4, 11, 12, len(whole) - 1):
        forged = bytearray(whole)
        forged[at] ^= 1
        b.take([bytes(forged)], THERE)
    assert opener.forged == 5
    b.take([whole[:20]], HERE)
    b.take([b""], HERE)
    assert opener.forged == 6
    assert not b.path.probes and b.path.address is None, "nothing is answered that did not authenticate"
    b.take([whole, whole], HERE)
    assert opener.replayed == 1 and len(b.records) == 1
    for _ in range(spec.WINDOW):
        late = a.seal([record(vnet(udp(V4, b"x")))])
    b.take(late, HERE)
    b.take([whole], HERE)
    assert opener.replayed == 2 and opener.missed == spec.WINDOW - 1


@pytest.mark.parametrize("seed", range(5))
def test_the_window_agrees_with_a_set_of_all_there_were(seed: int) -> None:
    random, (a, b) = Random(seed), pair()
    opener, seen = b.association.opener, set()
    sent = [a.seal([record(vnet(udp(V4, b"x")))])[0] for _ in range(6000)]
    at = 0
    while at < len(sent):
        at += random.choice((1, 1, 1, 2, 3, 70, 300))
        for number in (at, at - random.randrange(400), at - spec.WINDOW + random.randrange(-3, 3)):
            if not 0 <= number < len(sent):
                continue
            fresh = number not in seen and number > opener.top - spec.WINDOW
            before = opener.received
            b.take([sent[number]], HERE)
            assert (opener.received > before) is fresh
            seen.add(number)
    assert opener.late and opener.replayed


def test_keys_change_with_the_epoch_and_the_peer_follows() -> None:
    a, b = pair()
    sealer, opener = a.association._sealer, b.association.opener
    span = 1 << spec.EPOCH_BITS
    late = []
    for epoch in range(4):
        sealer.counter = max(sealer.counter, (epoch + 1) * span - 3)
        for _ in range(6):
            (sent,) = a.seal([record(vnet(udp(V4, b"x")))])
            if sealer.counter % span == span - 1:
                late.append(sent)
            else:
                b.take([sent], HERE)
        b.take(late, HERE)
        late.clear()
    assert len(b.records) == 24 and not opener.forged and opener.late == 4
    keys = Epochs(AESGCM, bytes(32))
    assert keys.get(1) is not None and keys.get(2) is None, "no further than the next one"


def test_a_peer_that_breaks_the_protocol_is_told_of() -> None:
    for body in (LENGTH.pack(3 << 24) + bytes(40), LENGTH.pack(2 << 24) + bytes(4)):
        a, b = pair()
        a.association._sealer.seal(a.batch, body)
        with pytest.raises(RemoteProtocolError):
            b.take([bytes(a.batch.view[: a.batch.tail])], HERE)


def test_a_slice_that_is_none_is_a_bad_packet() -> None:
    a, b = pair()
    a.association._sealer.seal(a.batch, LENGTH.pack(1 << 24) + os.urandom(60))
    b.take([bytes(a.batch.view[: a.batch.tail])], HERE)
    assert b.bad == ["bad_offload_header"] and not b.records
