"""`vpnd capture` writes pcapng, by a reader of its own and, where there is one, by tshark; and only what was wanted."""

from __future__ import annotations

import io
import ipaddress
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from packet.builder import V4, V6, ip, tcp, udp

from vpnd.cli import capture
from vpnd.cli.capture import Wanted
from vpnd.errors import ConfigError

TSHARK = shutil.which("tshark")
PACKETS = (tcp(V4, b"data"), udp(V6, b"x" * 700), ip(V4, 1, bytes(8)))
#: Of both, as the builder has them.
PORT = 6000


class Read(NamedTuple):
    data: bytes
    size: int
    at_ns: int
    outbound: bool


def read(content: bytes) -> tuple[dict[str, object], list[Read]]:
    """A reader of the parts that are written here, which checks lengths and padding."""
    section, interface, packets, position = {}, {}, [], 0
    while position < len(content):
        kind, length = struct.unpack_from("=II", content, position)
        assert length % 4 == 0 and struct.unpack_from("=I", content, position + length - 4) == (length,)
        body = content[position + 8 : position + length - 4]
        if kind == 0x0A0D0D0A:
            assert struct.unpack_from("=IHHq", body) == (0x1A2B3C4D, 1, 0, -1)
            section = options(body[16:])
        elif kind == 1:
            link, _, snap = struct.unpack_from("=HHI", body)
            interface = {"link": link, "snap": snap, **options(body[8:])}
        else:
            assert kind == 6
            number, high, low, kept, size = struct.unpack_from("=IIIII", body)
            flags = options(body[20 + -(-kept // 4) * 4 :])[2]
            data = body[20 : 20 + kept]
            packets.append(Read(data, size, high << 32 | low, flags == struct.pack("=I", capture.OUTBOUND)))
            assert number == 0
        position += length
    assert section and position == len(content)
    return interface, packets


def options(body: bytes) -> dict[object, object]:
    found: dict[object, object] = {}
    while True:
        code, length = struct.unpack_from("=HH", body)
        if not code:
            assert len(body) == 4
            return found
        found[code] = body[4 : 4 + length]
        body = body[4 + -(-length // 4) * 4 :]


ALL = Wanted()


def written(wanted: Wanted = ALL, snap: int = capture.MOST_SNAP) -> bytes:
    """What a packet socket with PACKETS in it comes to, the second of them going out."""
    output = io.BytesIO()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    class Sniffer:
        fileno = ours.fileno

        def recvfrom_into(self, buffer: memoryview) -> tuple[int, tuple[object, ...]]:
            size = ours.recv_into(buffer)
            return size, ("vpnd0", 0, 4 if bytes(buffer[:size]) == PACKETS[1] else 0)

    with ours, theirs:
        for packet in PACKETS:
            theirs.send(packet)
        capture.write(output, Sniffer(), "vpnd0", wanted, snap, 0, 0.2)  # type: ignore[arg-type]
    return output.getvalue()


def test_what_was_captured_is_read_as_it_was() -> None:
    interface, packets = read(written())
    assert interface["link"] == 101 and interface[2] == b"vpnd0" and interface[9] == b"\x09"
    assert [packet.data for packet in packets] == list(PACKETS)
    assert [packet.outbound for packet in packets] == [False, True, False]
    assert packets[0].at_ns <= packets[-1].at_ns


def test_no_more_of_a_packet_is_kept_than_asked_for_and_its_size_is_told() -> None:
    _, packets = read(written(snap=61))
    assert [len(packet.data) for packet in packets] == [min(61, len(packet)) for packet in PACKETS]
    assert [packet.size for packet in packets] == list(map(len, PACKETS))


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        (Wanted(protocol=socket.IPPROTO_TCP), [0]),
        (Wanted(protocol=socket.IPPROTO_UDP), [1]),
        (Wanted(protocol=socket.IPPROTO_ICMP), [2]),
        (Wanted(host=ipaddress.ip_address(V4[1])), [0, 2]),
        (Wanted(host=ipaddress.ip_address(V6[0])), [1]),
        (Wanted(host=ipaddress.ip_address("192.0.2.99")), []),
        (Wanted(port=PORT), [0, 1]),
        (Wanted(port=1), []),
    ],
    ids=str,
)
def test_only_what_is_wanted_is_kept(wanted: Wanted, places: list[int]) -> None:
    _, packets = read(written(wanted))
    assert [packet.data for packet in packets] == [PACKETS[place] for place in places]


def test_a_later_fragment_has_no_ports() -> None:
    ports = struct.pack(">HH", PORT, PORT)
    assert Wanted(port=PORT).fits_untrusted(memoryview(ip(V4, 17, ports + bytes(4), fragment=0x2000)))
    assert not Wanted(port=PORT).fits_untrusted(memoryview(ip(V4, 17, ports + bytes(4), fragment=0x2001)))


@pytest.mark.parametrize("junk", [b"", b"\x45", bytes(40), b"\x45" + bytes(10), b"\x60" + bytes(20)])
def test_what_is_no_packet_is_not_wanted(junk: bytes) -> None:
    assert not Wanted(port=7).fits_untrusted(memoryview(junk))


def test_a_disk_that_gets_full_ends_it_with_what_to_do() -> None:
    told = "--write /dev/full: No space left on device; name another"
    with pytest.raises(ConfigError, match=told), capture._output("/dev/full") as output:
        output.write(b"x")


@pytest.mark.skipif(TSHARK is None, reason="needs tshark")
def test_tshark_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "capture.pcapng"
    file.write_bytes(written())
    assert TSHARK is not None
    told = subprocess.run(
        [TSHARK, "-r", str(file), "-T", "fields", "-e", "ip.proto", "-e", "ipv6.nxt"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.split() == ["6", "17", "1"]
