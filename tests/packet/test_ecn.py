"""The ECN bits of packets, against packets that were made with them."""

from __future__ import annotations

import pytest

from packet.builder import V4, V6, ip, record, slow_sum, udp, vnet
from vpnd.packet import ecn
from vpnd.packet.record import PACKET_OFFSET

NAMES = {0: "not capable", 1: "ECT(1)", 2: "ECT(0)", 3: "marked"}


@pytest.mark.parametrize("addresses", [V4, V6])
@pytest.mark.parametrize("tos", [*range(4), *(0xB8 | bits for bits in range(4)), 0x04 | 2])
def test_a_packet_is_marked_if_its_sender_heeds_it(addresses: tuple[str, str], tos: int) -> None:
    for payload in (b"", b"x" * 99):
        packet = bytearray(ip(addresses, 17, payload, tos=tos))
        view = memoryview(packet)
        assert ecn.bits_of(view, 0) == tos & 3, NAMES[tos & 3]
        assert ecn.mark_untrusted(view, 0) == bool(tos & 3)
        assert packet == ip(addresses, 17, payload, tos=tos | 3 if tos & 3 else tos)


def test_every_checksum_of_a_header_stays_right() -> None:
    for identity in range(0x10000):
        packet = memoryview(bytearray(ip(V4, 17, b"", identity=identity, tos=2)))
        ecn.mark_untrusted(packet, 0)
        assert slow_sum(bytes(packet)) == 0xFFFF


def test_one_byte_of_a_record_tells_that_nobody_there_heeds_marks() -> None:
    for addresses in (V4, V6):
        for bits in range(4):
            made = record(vnet(udp(addresses, b"", tos=bits)))
            assert bool(made[ecn.PLACE] & ecn.EITHER) == bool(bits)


def test_all_records_of_a_datagram_are_marked_and_what_is_none_does_no_harm() -> None:
    records = [record(vnet(udp(addresses, bytes(9), tos=2))) for addresses in (V4, V6, V4)]
    whole = memoryview(bytearray(b"".join(records)))
    ecn.mark_records_untrusted(whole)
    assert whole == b"".join(record(vnet(udp(to, bytes(9), tos=3))) for to in (V4, V6, V4))
    for junk in (b"", bytes(40), b"\xff" * 60, bytes(whole[: PACKET_OFFSET + 3]), bytes(whole[:-1])):
        ecn.mark_records_untrusted(memoryview(bytearray(junk)))
