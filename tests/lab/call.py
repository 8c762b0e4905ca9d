"""A telephone call: small datagrams at an even pace, and what becomes of each.

    python call.py listen IP PORT SECONDS     prints the delays of what came, in milliseconds, as JSON: {number: ms}
    python call.py talk IP PORT SECONDS       returns when all are sent

Both ends are on one machine, whose monotonic clock they share.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from typing import Any, NamedTuple

PACKETS_PER_S = 50
PACKET_BYTES = 160
PORT = 5004
#: How long the listener waits for what is late, beyond the call.
PATIENCE_S = 3.0
_HEAD = struct.Struct("!IQ")


class Call(NamedTuple):
    """What came of one: shares of the packets."""

    late: float
    lost: float


def listen(ip: str, port: int, seconds: float) -> dict[int, float]:
    """The delay of each packet that comes, in milliseconds, by number."""
    delays: dict[int, float] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((ip, port))
        print("listening", flush=True)
        end_s = time.monotonic() + seconds + PATIENCE_S
        while (left_s := end_s - time.monotonic()) > 0 and len(delays) < round(seconds * PACKETS_PER_S):
            sock.settimeout(left_s)
            try:
                packet = sock.recv(2048)
            except TimeoutError:
                break
            number, sent_ns = _HEAD.unpack_from(packet)
            delays.setdefault(number, (time.monotonic_ns() - sent_ns) / 1e6)
    return delays


def talk(ip: str, port: int, seconds: float) -> None:
    """Send them, each at its time."""
    begin_s = time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(round(seconds * PACKETS_PER_S)):
            time.sleep(max(0.0, begin_s + number / PACKETS_PER_S - time.monotonic()))
            sock.sendto(_HEAD.pack(number, time.monotonic_ns()).ljust(PACKET_BYTES, b"\0"), (ip, port))


def judge(delays: dict[Any, float], seconds: float, limit_ms: float) -> Call:
    """Late is what took longer than `limit_ms`."""
    count = round(seconds * PACKETS_PER_S)
    return Call(sum(delay > limit_ms for delay in delays.values()) / count, 1 - len(delays) / count)


if __name__ == "__main__":
    kind, ip, port, seconds = sys.argv[1:]
    if kind == "listen":
        print(json.dumps(listen(ip, int(port), float(seconds))))
    else:
        talk(ip, int(port), float(seconds))
