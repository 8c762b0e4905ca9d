"""Offloads against a real kernel: it cuts what we cut, takes what we accept, and undoes what we merge."""

from __future__ import annotations

import os
import random
import select
import selectors
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from packet.builder import packet_of, record, tcp, udp, vnet
from packet.test_offload_check import ENCAPSULATED

from supervisor.network.routes import NetworkSetup
from supervisor.network.tun import Tun
from vpnd.errors import BadPacket
from vpnd.packet.offload import UdpCoalescer, inspect_untrusted, segment
from vpnd.packet.record import (
    FLAG_NEEDS_CSUM,
    LENGTH,
    LENGTH_BYTES,
    MAX_PACKET_BYTES,
    MAX_RECORD_BYTES,
    VNET_BYTES,
    Capabilities,
    Offload,
)

pytestmark = pytest.mark.root

V4 = ("10.86.0.1", "10.86.0.2")
V6 = ("fd00:86::1", "fd00:86::2")
SO_RCVBUFFORCE = 33  # Linux include/uapi/asm-generic/socket.h
NOTHING = Capabilities(offloads=0, max_record=MAX_RECORD_BYTES, mtu=1400)


def read_all(tun: Tun, wait_s: float = 1.0) -> list[bytes]:
    """What the device has, each behind its virtio_net_hdr; waits for the first. Less a router's multicast."""
    packets = []
    with selectors.DefaultSelector() as selector:
        selector.register(tun.fd, selectors.EVENT_READ)
        while selector.select(wait_s if not packets else 0.02):
            data = os.read(tun.fd, VNET_BYTES + MAX_PACKET_BYTES)
            if data[VNET_BYTES] >> 4 == 4 or data[VNET_BYTES + 24] != 0xFF:
                packets.append(data)
    return packets


@pytest.fixture
def router(namespaces, entered) -> Iterator[tuple[Tun, Tun]]:
    """A namespace that forwards from one TUN (with offloads) to another (without any), which makes it cut."""
    with entered(namespaces[0]):
        into, out = Tun.open("tnin", 1400, True), Tun.open("tnout", 1400, False)
        NetworkSetup().apply("tnin", 1400, ["10.87.0.1/24"], ["fd00:87::/64"], 1000)
        NetworkSetup().apply("tnout", 1400, ["10.88.0.1/24"], ["10.86.0.0/16", "fd00:86::/64"], 1000)
        for path, value in (
            ("ipv4/ip_forward", "1"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/tnin/rp_filter", "0"),
            ("ipv6/conf/all/forwarding", "1"),
        ):
            with open(f"/proc/sys/net/{path}", "w") as file:
                file.write(value)
        try:
            yield into, out
        finally:
            into.close()
            out.close()


def unforwarded(packet: bytes) -> bytes:
    """Less what forwarding changes: TTL and IPv4 header checksum, or hop limit."""
    if packet[0] >> 4 == 6:
        return packet[:7] + packet[8:]
    return packet[:8] + packet[9:10] + packet[12:]


BODY = random.Random(1).randbytes(50_000)
CUTS = [
    (
        f"{name} {'IPv4' if addresses is V4 else 'IPv6'}, {size} bytes by {gso_size}",
        make(addresses, BODY[:size], **more),
        gso_size,
    )
    for addresses in (V4, V6)
    for name, make, size, gso_size, more in (
        ("UDP", udp, 5500, 1000, {}),
        ("UDP", udp, 60 * 333, 333, {"identity": 65530}),
        ("UDP without DF", udp, 3000, 1001, {"fragment": 0}),
        ("TCP", tcp, 50_000, 1328, {}),
        ("TCP of odd sizes", tcp, 4001, 777, {"identity": 65534, "options": b""}),
        ("TCP with FIN", tcp, 3000, 1000, {"flags": 0x19}),
        ("TCP with TOS", tcp, 3000, 1000, {"tos": 0x28}),
    )
]


@pytest.mark.parametrize(("packet", "gso_size"), [row[1:] for row in CUTS], ids=[row[0] for row in CUTS])
def test_cut_as_the_kernel_cuts(router: tuple[Tun, Tun], packet: bytes, gso_size: int) -> None:
    into, out = router
    data = vnet(packet, gso_size=gso_size)
    ours = [packet_of(piece) for piece in segment(memoryview(record(data)), NOTHING)]
    os.write(into.fd, data)
    kernels = [one[VNET_BYTES:] for one in read_all(out)]
    assert len(kernels) == len(ours) > 1
    assert [unforwarded(one) for one in kernels] == [unforwarded(one) for one in ours]


@pytest.mark.parametrize("addresses", [V4, V6], ids=["IPv4", "IPv6"])
def test_cut_with_cwr(router: tuple[Tun, Tun], addresses: tuple[str, str]) -> None:
    """CWR stays on the first segment when the header says ECN."""
    into, out = router
    data = vnet(tcp(addresses, BODY[:3000], flags=0x98), gso_size=1000)
    data = data[:1] + bytes([data[1] | 0x80]) + data[2:]
    ours = [packet_of(piece) for piece in segment(memoryview(record(data)), NOTHING)]
    os.write(into.fd, data)
    assert [unforwarded(one[VNET_BYTES:]) for one in read_all(out)] == [unforwarded(one) for one in ours]


@pytest.mark.parametrize("addresses", [V4, V6], ids=["IPv4", "IPv6"])
def test_checksum_left_to_the_receiver(router: tuple[Tun, Tun], addresses: tuple[str, str]) -> None:
    """Cut for a peer with CSUM only, the pieces leave its kernel as if it had cut them itself."""
    into, out = router
    data = vnet(udp(addresses, BODY[:5500]), gso_size=1000)
    pieces = segment(
        memoryview(record(data)), Capabilities(offloads=Offload.CSUM, max_record=65600, mtu=1400)
    )
    for piece in pieces:
        os.write(into.fd, piece[LENGTH_BYTES:])
    ours = [packet_of(piece) for piece in segment(memoryview(record(data)), NOTHING)]
    assert [unforwarded(one[VNET_BYTES:]) for one in read_all(out)] == [unforwarded(one) for one in ours]


def merged(tun: Tun) -> tuple[list[bytes], int]:
    """What a TUN has, read and merged as the supervisor does: records, and how many were merged away."""
    buffer = memoryview(bytearray(1 << 20))
    coalescer = UdpCoalescer()
    starts: list[int] = []
    end = merges = 0
    for data in read_all(tun):
        buffer[end + LENGTH_BYTES : end + LENGTH_BYTES + len(data)] = data
        grown = coalescer.merge(buffer, starts[-1], end, len(data)) if starts else 0
        if grown:
            merges += 1
            end += grown
        else:
            LENGTH.pack_into(buffer, end, len(data))
            starts.append(end)
            end += LENGTH_BYTES + len(data)
    coalescer.finish()
    return [bytes(buffer[a:b]) for a, b in pairwise([*starts, end])], merges


@pytest.mark.parametrize("pair", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_socket_gets_the_datagrams_that_were_merged(namespaces, entered, pair: tuple[str, str]) -> None:
    family = socket.AF_INET if pair is V4 else socket.AF_INET6
    prefixlen = 16 if pair is V4 else 64
    tuns, sockets = [], []
    for name, address in zip(namespaces, pair, strict=False):
        with entered(name):
            tuns.append(Tun.open("tn0", 1400, True))
            NetworkSetup().apply("tn0", 1400, [f"{address}/{prefixlen}"], [], 1000)
            sockets.append(socket.socket(family, socket.SOCK_DGRAM))
    sender, receiver = sockets
    receiver.bind((pair[1], 9000))
    receiver.settimeout(2)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 23)
    sender.connect((pair[1], 9000))
    sizes = (
        [1000] * 10 + [300] + [1000] * 70 + [1300, 1200, 1200, 1, 1, 1] + [1372 if pair is V4 else 1352] * 50
    )
    datagrams = [bytes([count & 0xFF]) * size for count, size in enumerate(sizes)]
    for datagram in datagrams:
        sender.send(datagram)
    records, merges = merged(tuns[0])
    assert merges > len(datagrams) // 2
    for one in records:
        inspect_untrusted(memoryview(one), LENGTH_BYTES, len(one) - LENGTH_BYTES)
        os.write(tuns[1].fd, one[LENGTH_BYTES:])
    assert [receiver.recv(2000) for _ in datagrams] == datagrams
    for closing in (*tuns, *sockets):
        closing.close()


@pytest.mark.parametrize("addresses", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_router_cuts_a_merged_record_into_the_originals(
    router: tuple[Tun, Tun], addresses: tuple[str, str]
) -> None:
    into, out = router
    packets = [vnet(udp(addresses, BODY[i : i + 900], identity=i, fragment=0)) for i in range(50)]
    buffer = memoryview(bytearray(1 << 17))
    coalescer = UdpCoalescer()
    end = LENGTH_BYTES + len(packets[0])
    buffer[:end] = record(packets[0])
    for data in packets[1:]:
        buffer[end + LENGTH_BYTES : end + LENGTH_BYTES + len(data)] = data
        grown = coalescer.merge(buffer, 0, end, len(data))
        assert grown == 900
        end += grown
    coalescer.finish()
    for data in packets:
        os.write(into.fd, data)
    singly = read_all(out)
    os.write(into.fd, buffer[LENGTH_BYTES:end])
    assert read_all(out) == singly
    assert len(singly) == 50


def test_what_passes_the_check_the_kernel_takes(namespaces, entered) -> None:
    """Mutated superpackets by the thousand: write(2) refuses none that `inspect_untrusted` lets through."""
    chance = random.Random(20)
    bases = [
        vnet(make(addresses, BODY[:size], **more), gso_size=gso_size)
        for addresses in (V4, V6)
        for make in (udp, tcp)
        for size, gso_size in ((3000, 1000), (3000, 50), (64 * 20, 20), (60_000, 1300), (10, 0), (1300, 0))
        for more in ({}, {"fragment": 0})
    ]
    bases += [data for _, data in ENCAPSULATED]
    # Values that mean something somewhere, beside random ones.
    telling = (
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        8,
        16,
        17,
        20,
        28,
        40,
        43,
        44,
        60,
        0x45,
        0x46,
        0x60,
        0x80,
        0x81,
        0x84,
        0xFF,
    )
    accepted = refused = 0
    with entered(namespaces[0]), Tun.open("tn0", 1400, True) as tun:
        NetworkSetup().apply("tn0", 1400, ["10.86.0.2/16"], ["fd00:86::/64"], 1000)
        for _ in range(6000):
            data = bytearray(chance.choice(bases))
            for _ in range(chance.choice((0, 1, 1, 2, 3))):
                place = chance.randrange(min(len(data), chance.choice((10, 10, 70))))
                data[place] = chance.choice(telling) if chance.random() < 0.7 else chance.randrange(256)
            if chance.random() < 0.1:
                data[4:6] = struct.pack("<H", chance.randrange(65536))
            try:
                inspect_untrusted(memoryview(data), 0, len(data))
            except BadPacket:
                refused += 1
                continue
            accepted += 1
            assert os.write(tun.fd, data) == len(data), data[:80].hex()
    assert accepted > 1000
    assert refused > 1000


@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("pair", [V4, V6], ids=["IPv4", "IPv6"])
def test_a_tunnel_of_the_kernels_within_the_vpn_carries_tcp(namespaces, entered, pair, inner: int) -> None:
    """VXLAN over two TUNs, with nothing passed on that the check does not let: a transfer arrives whole."""
    tuns, sockets = [], []
    for number, name in enumerate(namespaces[:2]):
        with entered(name):
            tuns.append(Tun.open("tn0", 1400, True))
            NetworkSetup().apply("tn0", 1400, [f"{pair[number]}/{16 if pair is V4 else 64}"], [], 1000)
            link = (
                "type",
                "vxlan",
                "id",
                "5",
                "dstport",
                "4789",
                "local",
                pair[number],
                "remote",
                pair[1 - number],
            )
            for words in (
                ("link", "add", "vx0", *link),
                ("addr", "add", f"10.99.0.{number + 1}/24", "dev", "vx0"),
                ("addr", "add", f"fd00:99::{number + 1}/64", "dev", "vx0", "nodad"),
                ("link", "set", "vx0", "mtu", "1280", "up"),
            ):
                subprocess.run(["ip", *words], check=True)
            sockets.append(socket.socket(socket.AF_INET if inner == 4 else socket.AF_INET6))
    passed: Counter[bool] = Counter()
    stopping = threading.Event()

    def carry(source: Tun, target: Tun) -> None:
        while not stopping.is_set():
            if not select.select([source.fd], [], [], 0.05)[0]:
                continue
            data = os.read(source.fd, VNET_BYTES + MAX_PACKET_BYTES)
            if data[VNET_BYTES] >> 4 == 6 and data[VNET_BYTES + 24] == 0xFF:
                continue  # a router's multicast
            try:
                inspect_untrusted(memoryview(data), 0, len(data))
            except BadPacket as bad:
                refused.append((bad.reason, data[:120].hex()))
            else:
                passed[data[0] == FLAG_NEEDS_CSUM] += 1
                os.write(target.fd, data)

    refused: list[tuple[str, str]] = []
    carriers = [threading.Thread(target=carry, args=way) for way in (tuns, tuns[::-1])]
    for thread in carriers:
        thread.start()
    client, server = sockets
    try:
        server.bind(("10.99.0.2" if inner == 4 else "fd00:99::2", 9000))
        server.listen()
        for sock in sockets:
            sock.settimeout(10)
        client.connect(server.getsockname()[:2])
        accepted, _ = server.accept()
        sending = threading.Thread(target=lambda: (client.sendall(BODY * 4), client.shutdown(socket.SHUT_WR)))
        sending.start()
        with accepted:
            accepted.settimeout(10)
            assert b"".join(iter(lambda: accepted.recv(1 << 16), b"")) == BODY * 4
        sending.join()
        assert not refused
        assert passed[True] > 100, "the kernel left inner checksums to fill in"
    finally:
        stopping.set()
        for thread in carriers:
            thread.join()
        for closing in (*tuns, *sockets):
            closing.close()
