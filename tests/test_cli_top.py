"""`vpnd top` adds up packets by flow, both ways under one, and shows those that move most first."""

from __future__ import annotations

import socket

import pytest
from packet.builder import V4, V6, ip, tcp, udp

from vpnd.cli import top
from vpnd.cli.capture import PACKET_OUTGOING
from vpnd.cli.top import Flow, Moved

#: Of the builder.
PORTS = (5000, 6000)


def flow_of(packet: bytes, outgoing: bool = True) -> Flow | None:
    return top.flow_untrusted(memoryview(packet)[:64], outgoing)


def test_both_ways_are_one_flow_with_this_side_first() -> None:
    here, there = V4
    sent = flow_of(udp(V4, b"x", ports=PORTS))
    received = flow_of(udp((there, here), b"x", ports=PORTS[::-1]), outgoing=False)
    assert sent == received == Flow(17, here, PORTS[0], there, PORTS[1])


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (udp(V6, b"x" * 999, ports=PORTS), Flow(17, V6[0], PORTS[0], V6[1], PORTS[1])),
        (ip(V4, 1, bytes(8)), Flow(1, V4[0], 0, V4[1], 0)),
        (ip(V4, 17, bytes(8), fragment=0x2001), Flow(17, V4[0], 0, V4[1], 0)),
        (ip(V4, 6, b""), Flow(6, V4[0], 0, V4[1], 0)),
        (b"", None),
        (b"\x45" + bytes(18), None),
        (b"\x60" + bytes(38), None),
        (b"\x15" + bytes(40), None),
    ],
    ids=["udp6", "icmp", "fragment", "short", "empty", "cut4", "cut6", "other"],
)
def test_the_flow_of_a_packet(packet: bytes, expected: Flow | None) -> None:
    assert flow_of(packet) == expected


def test_what_came_within_the_time_is_counted_at_its_real_length() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    class Sniffer:
        fileno = ours.fileno

        def recvfrom_into(self, head: memoryview, size: int, flags: int) -> tuple[int, tuple[object, ...]]:
            assert flags == socket.MSG_TRUNC
            return ours.recv_into(head, size, flags), ("vpnd0", 0, PACKET_OUTGOING)

    large, small = udp(V4, b"x" * 5000, ports=PORTS), tcp(V4, b"x")
    with ours, theirs:
        for packet in (large, small, large, b"junk"):
            theirs.send(packet)
        flows = top.counted(Sniffer(), 0.2)  # type: ignore[arg-type]
    moved = {flow.protocol: (each.packets_out, each.bytes_out, each.bytes_in) for flow, each in flows.items()}
    assert moved == {17: (2, 2 * len(large), 0), 6: (1, len(small), 0)}


def test_what_moves_most_is_shown_first_with_its_peer() -> None:
    little, much = Moved(), Moved()
    little.add(100, True)
    much.add(9_000_000, False)
    flows = {Flow(6, V4[0], 1, V4[1], 22): little, Flow(17, V6[0], 5, V6[1], 53): much}
    rows = top.rates(flows, 2.0, {V4[1]: "nas"})
    assert [row["protocol"] for row in rows] == ["udp", "tcp"]
    assert rows[0]["received_bytes_per_s"] == 4_500_000 and rows[0]["remote"] == f"[{V6[1]}]:53"
    shown = top.rendered(rows)
    assert "nas" in shown and "4.3 MiB" in shown and max(map(len, shown.splitlines())) <= 80
    assert top.rendered([]) == "nothing moves"
