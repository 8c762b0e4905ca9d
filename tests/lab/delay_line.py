"""The Internet of a lab: a TUN device in each of some namespaces, packets between them by destination, each after half
a round trip. This machine's kernel need not have netem for it.

    python delay_line.py RTT_MS namespace=network,network …      prints "up" when every device is
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import ipaddress
import os
import select
import struct
import sys
import time

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MAX_PACKET = 2048
_libc = ctypes.CDLL(None, use_errno=True)


def open_tun(namespace: str, device: str) -> int:
    """A device in a namespace; this process stays where it is."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if _libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), namespace)
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH", device.encode(), IFF_TUN | IFF_NO_PI))
        return fd
    finally:
        _libc.setns(home, CLONE_NEWNET)
        os.close(home)
        os.close(there)


def main(rtt_ms: str, *ends: str) -> None:
    """Forward until killed."""
    delay_s = float(rtt_ms) / 2000
    owners: list[tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int]] = []
    poll = select.poll()
    for end in ends:
        namespace, _, networks = end.partition("=")
        fd = open_tun(namespace, "wan")
        owners += [(ipaddress.ip_network(text), fd) for text in networks.split(",")]
        poll.register(fd, select.POLLIN)
    known: dict[bytes, int | None] = {}

    def owner(packet: bytes) -> int | None:
        target = packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]
        if target not in known:
            ip = ipaddress.ip_address(target)
            known[target] = next(
                (fd for network, fd in owners if ip.version == network.version and ip in network), None
            )
        return known[target]

    print("up", flush=True)
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        patience_ms = 1000.0 if not waiting else max(0.0, (waiting[0][0] - time.monotonic()) * 1000)
        for fd, _ in poll.poll(patience_ms):
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(fd, MAX_PACKET)
                    out = owner(packet)
                    if out is not None and out != fd:
                        number += 1
                        heapq.heappush(waiting, (time.monotonic() + delay_s, number, out, packet))
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            _, _, out, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # a device whose queue is full drops, as a router does
                os.write(out, packet)


if __name__ == "__main__":
    main(*sys.argv[1:])
