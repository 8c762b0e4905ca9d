"""What a router behind a peer may send from an address that is nobody's: errors about our packets, and nothing else."""

from __future__ import annotations

import struct

import pytest
from packet.builder import ip, record, tcp, udp, vnet

from shards.counters import Counts
from shards.flow.prefixes import set_of
from shards.inbound import Inbound, Reassembly
from vpnd.packet.record import VNET_BYTES

OURS, OTHER, THEIRS, FOREIGN = "10.86.0.1", "10.86.0.9", "192.168.7.5", "198.51.100.3"
OURS6, THEIRS6, FOREIGN6 = "fd00:86::1", "fd00:7::5", "2001:db8::3"
UNREACHABLE, TOO_BIG, EXCEEDED = 3, 2, 11


def error(addresses: tuple[str, str], kind: int, about: bytes, **more: int) -> bytes:
    return ip(
        addresses, 58 if ":" in addresses[0] else 1, struct.pack(">BBHI", kind, 0, 0, 0) + about, **more
    )


SENT, SENT6 = udp((OURS, THEIRS), b"x"), tcp((OURS6, THEIRS6), b"x")
TABLE = [
    ("unreachable, about what we sent", error((FOREIGN, OURS), UNREACHABLE, SENT), True),
    ("the beginning of it alone", error((FOREIGN, OURS), EXCEEDED, SENT[:28]), True),
    ("too big, about what we sent", error((FOREIGN6, OURS6), TOO_BIG, SENT6), True),
    (
        "about what we sent to somebody else",
        error((FOREIGN, OURS), UNREACHABLE, udp((OURS, OTHER), b"x")),
        False,
    ),
    ("about what somebody else sent", error((FOREIGN, OURS), UNREACHABLE, udp((OTHER, THEIRS), b"x")), False),
    ("about what the peer sent", error((FOREIGN, OURS), UNREACHABLE, udp((THEIRS, OURS), b"x")), False),
    ("an echo reply", error((FOREIGN, OURS), 0, SENT), False),
    ("a redirect", error((FOREIGN, OURS), 5, SENT), False),
    ("too short a quotation", error((FOREIGN, OURS), UNREACHABLE, SENT[:19]), False),
    ("no quotation", error((FOREIGN, OURS), UNREACHABLE, b""), False),
    ("a fragment", error((FOREIGN, OURS), UNREACHABLE, SENT, fragment=0x2000), False),
    ("a quotation of another IP version", error((FOREIGN, OURS), UNREACHABLE, SENT6), False),
    ("UDP", udp((FOREIGN, OURS), SENT), False),
    ("a query of ICMPv6", error((FOREIGN6, OURS6), 128, SENT6), False),
    ("too short a quotation, IPv6", error((FOREIGN6, OURS6), TOO_BIG, SENT6[:39]), False),
    ("UDP over IPv6", udp((FOREIGN6, OURS6), SENT6), False),
]


@pytest.mark.parametrize(("sentence", "packet", "passes"), TABLE, ids=[row[0] for row in TABLE])
def test_foreign_sources_are_let_in_with_errors_about_our_packets_only(sentence, packet, passes) -> None:
    written: list[bytes] = []
    counts = Counts()
    local = set_of((f"{OURS}/32", f"{OURS6}/128"))
    inbound = Inbound(lambda view: written.append(bytes(view)), local, counts)
    reassembly = Reassembly(None, counts.drops)  # type: ignore[arg-type]
    is_udp = packet[0] >> 4 == 4 and packet[9] == 17
    data = record(vnet(packet) if is_udp else bytes(VNET_BYTES) + packet)
    inbound.deliver_untrusted(set_of(("192.168.7.0/24", "fd00:7::/64")), reassembly, memoryview(data), 10)
    assert written == [data[4:]] * passes
    assert counts.drops["source_not_allowed"] == (not passes)
