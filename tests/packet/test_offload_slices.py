"""Superpackets in slices: whatever arrives of them is what the kernel would have made of that part."""

from __future__ import annotations

import os
from random import Random

import pytest

from packet.builder import V4, V6, ip, record, tcp, udp, verify, vnet
from vpnd.errors import BadPacket
from vpnd.packet.offload import inspect_untrusted, segment
from vpnd.packet.offload.slices import OFFSET_MASK, SLICE, Joiner, shape
from vpnd.packet.record import LENGTH, MAX_RECORD_BYTES, Capabilities

NOTHING = Capabilities(offloads=0, max_record=MAX_RECORD_BYTES, mtu=1400)
ROOM = 1444


def sliced(whole: bytes, room: int = ROOM) -> list[bytes]:
    """The bodies a record travels in."""
    front, most = shape(memoryview(whole), 0, room)
    head, data = whole[4:front], whole[front:]
    return [LENGTH.pack(SLICE | at) + head + data[at : at + most] for at in range(0, len(data), most)]


def joined(bodies: list[tuple[int, bytes]]) -> list[bytes]:
    """Records made of (counter, body) in the order they come."""
    joiner, records = Joiner(), []
    for counter, body in bodies:
        view = memoryview(body)
        offset = LENGTH.unpack_from(view)[0] & OFFSET_MASK
        if joiner.continues(counter, offset):
            joiner.append_untrusted(view)
            continue
        records.append(bytes(joiner.finish()))
        joiner.begin_untrusted(counter, offset, view)
    records.append(bytes(joiner.finish()))
    return [each for each in records if each]


def packets(records: list[bytes]) -> list[bytes]:
    """What a kernel without offloads would be given, each verified."""
    found = []
    for each in records:
        view = memoryview(each)
        inspect_untrusted(view, 4, len(view) - 4)
        for piece in segment(view, NOTHING):
            packet = piece[14:]
            verify(packet)
            found.append(packet)
    return found


def transport_payload(packet: bytes) -> tuple[int, bytes]:
    """(TCP's sequence number or 0, payload) of a packet."""
    start = (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40
    if (packet[9] if start < 40 else packet[6]) == 17:
        return 0, packet[start + 8 :]
    sequence = int.from_bytes(packet[start + 4 : start + 8], "big")
    return sequence, packet[start + (packet[start + 12] >> 4) * 4 :]


WHOLE = [
    ("TCP over IPv4", record(vnet(tcp(V4, os.urandom(50_001)), gso_size=1348))),
    ("TCP over IPv6", record(vnet(tcp(V6, os.urandom(50_001)), gso_size=1328))),
    ("datagrams over IPv4", record(vnet(udp(V4, os.urandom(33_333)), gso_size=1200))),
    ("small datagrams over IPv6", record(vnet(udp(V6, os.urandom(6_001)), gso_size=100))),
]
CASES = pytest.mark.parametrize("whole", [row[1] for row in WHOLE], ids=[row[0] for row in WHOLE])


@CASES
def test_all_slices_are_the_superpacket_as_it_was(whole: bytes) -> None:
    bodies = sliced(whole)
    assert len(bodies) > 3 and max(map(len, bodies)) <= ROOM
    assert joined(list(enumerate(bodies))) == [whole]


@CASES
@pytest.mark.parametrize("seed", range(8))
def test_what_arrives_of_it_is_good_packets_with_the_bytes_that_were_sent(whole: bytes, seed: int) -> None:
    random = Random(seed)
    bodies = [pair for pair in enumerate(sliced(whole)) if random.random() > 0.2]
    if seed % 2:
        random.shuffle(bodies)
    sent, stream = packets([whole]), {}
    for sequence, payload in map(transport_payload, sent):
        stream.update({(sequence + at) & 0xFFFFFFFF: byte for at, byte in enumerate(payload)})
    came = packets(joined(bodies))
    assert came
    if packets([whole])[0][9 if whole[14] >> 4 == 4 else 6] == 17:
        assert {payload for _, payload in map(transport_payload, came)} <= {
            payload for _, payload in map(transport_payload, sent)
        }
    else:
        for sequence, payload in map(transport_payload, came):
            for at, byte in enumerate(payload):
                assert stream[(sequence + at) & 0xFFFFFFFF] == byte


def test_flags_are_those_of_the_place_in_the_whole() -> None:
    whole = record(vnet(tcp(V4, os.urandom(4000), flags=0x99), gso_size=1000, gso_type=0x81))
    bodies = list(enumerate(sliced(whole)))
    first, last = packets(joined(bodies[:1])), packets(joined(bodies[-1:]))
    assert first[0][33] == 0x90, "CWR on the first, neither FIN nor PSH"
    assert last[-1][33] == 0x19, "FIN and PSH on the last, no CWR"


@pytest.mark.parametrize(
    ("whole", "room"),
    [
        (record(bytes(10) + ip(V4, 1, bytes(2000))), ROOM),
        (record(vnet(udp(V4, bytes(9000)), gso_size=3000)), ROOM),
        (record(vnet(tcp(V4, bytes(9000)), gso_size=1000)), 60),
    ],
    ids=["no superpacket", "datagrams larger than a slice", "no room for its headers"],
)
def test_what_cannot_be_sliced(whole: bytes, room: int) -> None:
    assert shape(memoryview(whole), 0, room) == (0, 0)


def test_a_slice_that_is_none_is_refused_and_what_was_joined_stays() -> None:
    whole = WHOLE[0][1]
    bodies = sliced(whole)
    joiner = Joiner()
    joiner.begin_untrusted(0, 0, memoryview(bodies[0]))
    joiner.append_untrusted(memoryview(bodies[1]))
    with pytest.raises(BadPacket):
        joiner.append_untrusted(memoryview(bodies[2] + bytes(65_000)))
    with pytest.raises(BadPacket):
        joiner.append_untrusted(memoryview(bodies[2][:40]))
    assert packets([bytes(joiner.finish())])
    assert not len(joiner.finish())
    for body in (bodies[0][:40], bodies[0][:14] + b"\x75" + bodies[0][15:], LENGTH.pack(SLICE) + bytes(60)):
        with pytest.raises(BadPacket):
            Joiner().begin_untrusted(0, 0, memoryview(body))
