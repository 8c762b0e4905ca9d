"""Sockets of this process in a namespace of the lab, and traffic over them that is checked byte by byte.

A socket stays in the namespace it was made in, so one test program is both ends at once, without helper processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from .network import LabError, Namespace

CLONE_NEWNET = 0x40000000
#: How long a socket of a test may be silent before that is a failure.
SILENCE_S = 15.0
#: What is sent: random, so that nothing that repeats or goes astray has the same sum; repeated from odd offsets.
_PATTERN = os.urandom((1 << 20) + 7)
_CHUNK_BYTES = 1 << 16
_SEQUENCE = struct.Struct(">Q")
#: Datagrams of `udp_flow`; in three fragments each they still fit into a device's queue of 500. And for how long it
#: waits for them before it takes them for lost.
_UNDER_WAY, _LOST_S = 100, 0.2

#: Linux' SO_RCVBUF for root, not held down by net.core.rmem_max; the socket module has no name for it.
SO_RCVBUFFORCE = 33


@contextlib.contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """The calling thread is in the namespace within the block; what it opens there stays there."""
    with open("/proc/thread-self/ns/net", "rb") as own, namespace.path.open("rb") as wanted:
        _enter(wanted.fileno())
        try:
            yield
        finally:
            _enter(own.fileno())


def _enter(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET):
        raise LabError(f"setns: {os.strerror(ctypes.get_errno())}")


def socket_in(namespace: Namespace, ip: str, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
    """A socket in a namespace, of the family of `ip`; it gives up after SILENCE_S."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with inside(namespace):
        sock = socket.socket(family, kind, protocol)
    sock.settimeout(SILENCE_S)
    return sock


def tcp_on_loopback() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection in the namespace of the test."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return one, other


def tcp_pair(client: Namespace, server: Namespace, ip: str) -> tuple[socket.socket, socket.socket]:
    """A TCP connection from `client` to `ip`, an address of `server`: both ends."""
    with socket_in(server, ip, socket.SOCK_STREAM) as listener:
        listener.bind((ip, 0))
        listener.listen()
        one = socket_in(client, ip, socket.SOCK_STREAM)
        try:
            one.connect(listener.getsockname()[:2])
            other, _ = listener.accept()
        except BaseException:
            one.close()
            raise
    other.settimeout(SILENCE_S)
    return one, other


def transfer(sender: socket.socket, receiver: socket.socket, size: int) -> float:
    """Send `size` bytes and close that direction; seconds until all had arrived.

    Raises LabError when they are not the same bytes.
    """
    sent = hashlib.blake2b()
    failures: list[BaseException] = []

    def send() -> None:
        try:
            left, offset = size, 0
            while left:
                part = _PATTERN[offset : offset + min(left, _CHUNK_BYTES)]
                sender.sendall(part)
                sent.update(part)
                left -= len(part)
                offset = (offset + 65_521) % (len(_PATTERN) - _CHUNK_BYTES)
            sender.shutdown(socket.SHUT_WR)
        except OSError as error:
            failures.append(error)

    begun = time.monotonic()
    thread = threading.Thread(target=send)
    thread.start()
    got, count = hashlib.blake2b(), 0
    try:
        while part := receiver.recv(_CHUNK_BYTES):
            got.update(part)
            count += len(part)
    except OSError as error:
        failures.append(error)
    thread.join()
    if failures:
        raise LabError(f"after {count} of {size} bytes: {failures[0]}")
    if count != size or got.digest() != sent.digest():
        raise LabError(f"{count} bytes of {size} arrived, or others than were sent")
    return time.monotonic() - begun


def tcp_transfer(client: Namespace, server: Namespace, ip: str, size: int, *, reverse: bool = False) -> float:
    """`size` checked bytes over a new connection from `client` to `ip`; `reverse`: the server sends."""
    one, other = tcp_pair(client, server, ip)
    with one, other:
        return transfer(other, one, size) if reverse else transfer(one, other, size)


class Datagrams(NamedTuple):
    """What became of a run of numbered datagrams: `late` came behind one sent after them, `twice` again."""

    sent: int
    received: int
    late: int
    twice: int
    damaged: int


def udp_flow(
    sender: Namespace, receiver: Namespace, ip: str, *, count: int, size: int = 1200, burst: int = 16
) -> Datagrams:
    """Send numbered datagrams of `size` bytes payload to `ip`, an address of `receiver`, a burst a millisecond.

    No more than _UNDER_WAY are on their way at once: what a TUN device's queue has no room for is nobody's fault.
    """
    seen: set[int] = set()
    with socket_in(receiver, ip, socket.SOCK_DGRAM) as inbox, socket_in(sender, ip, socket.SOCK_DGRAM) as out:
        inbox.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)  # a burst must not be lost here
        inbox.bind((ip, 0))
        inbox.settimeout(1.0)
        out.connect(inbox.getsockname()[:2])

        def send() -> None:
            for number in range(count):
                out.send(_datagram(number, size))
                if number % burst == burst - 1:
                    time.sleep(0.001)
                    give_up_s = (
                        time.monotonic() + _LOST_S
                    )  # some may be lost, and are then on their way for ever
                    while number - len(seen) > _UNDER_WAY and time.monotonic() < give_up_s:
                        time.sleep(0.001)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            return _count(inbox, count, size, seen)
        finally:
            thread.join()


def _datagram(number: int, size: int) -> bytes:
    start = number % _CHUNK_BYTES
    return _SEQUENCE.pack(number) + _PATTERN[start : start + size - _SEQUENCE.size]


def _count(inbox: socket.socket, count: int, size: int, seen: set[int]) -> Datagrams:
    late = twice = damaged = 0
    highest = -1
    while len(seen) < count:
        try:
            data = inbox.recv(_CHUNK_BYTES)
        except TimeoutError:
            break
        (number,) = _SEQUENCE.unpack_from(data)
        damaged += data != _datagram(number, size)
        twice += number in seen
        late += number < highest
        highest = max(highest, number)
        seen.add(number)
    return Datagrams(count, len(seen), late, twice, damaged)
