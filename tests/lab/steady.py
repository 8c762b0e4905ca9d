"""A steady flow of numbered datagrams in the background: what was lost, what came late, how long nothing came."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self

from .network import Namespace
from .sockets import SO_RCVBUFFORCE, socket_in

_NUMBER = struct.Struct(">Q")


class Background:
    """Work in threads, from entering the block to leaving it; then `sockets` are closed."""

    def __init__(self, *work: Callable[[], None], sockets: Iterable[socket.socket]) -> None:
        self._ending, self._sockets = threading.Event(), tuple(sockets)
        self._threads = [threading.Thread(target=each) for each in work]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()


@contextlib.contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Inside the block `work` goes on in a thread; it has to end when its event is set."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class SteadyFlow(Background):
    """Datagrams to `ip`, an address of `receiver`, at `rate_hz`, from entering the block to leaving it.

    `port` 0 is any. What is asked about the flow is complete once the block was left.
    """

    def __init__(
        self,
        sender: Namespace,
        receiver: Namespace,
        ip: str,
        *,
        port: int = 0,
        rate_hz: int = 500,
        size: int = 1200,
    ) -> None:
        self._inbox = socket_in(receiver, ip, socket.SOCK_DGRAM)
        self._inbox.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)  # a burst must not be lost here
        self._inbox.bind((ip, port))
        self._inbox.settimeout(0.5)
        self._out = socket_in(sender, ip, socket.SOCK_DGRAM)
        self._out.connect(self._inbox.getsockname()[:2])
        self._rate_hz, self._size = rate_hz, size
        super().__init__(self._send, self._receive, sockets=(self._inbox, self._out))
        self.sent = 0
        self.numbers: list[int] = []
        self.times_s: list[float] = []

    def _send(self) -> None:
        padding = bytes(self._size - _NUMBER.size)
        begun_s = time.monotonic()
        while not self._ending.is_set():
            while self.sent < (time.monotonic() - begun_s) * self._rate_hz:
                try:
                    self._out.send(_NUMBER.pack(self.sent) + padding)
                except OSError:
                    pass  # the device may be gone for a while; the number is then lost like any other
                self.sent += 1
            time.sleep(1 / self._rate_hz)

    def _receive(self) -> None:
        while True:
            try:
                data = self._inbox.recv(65536)
            except TimeoutError:
                if self._ending.is_set():
                    return
                continue
            self.times_s.append(time.monotonic())
            self.numbers.append(_NUMBER.unpack_from(data)[0])

    @property
    def lost(self) -> int:
        """Datagrams that never arrived."""
        return self.sent - len(set(self.numbers))

    @property
    def late(self) -> int:
        """Datagrams that came behind one sent after them."""
        return sum(after < before for before, after in zip(self.numbers, self.numbers[1:], strict=False))

    @property
    def late_stretches(self) -> int:
        """How often some that were sent one after the other came behind one sent after them."""
        highest, late = -1, set[int]()
        for number in self.numbers:
            if number < highest:
                late.add(number)
            highest = max(highest, number)
        lost = set(range(self.sent)) - set(self.numbers)  # one that is lost among them does not part them
        stretches = 0
        for number in late:
            before = number - 1
            while before in lost:
                before -= 1
            stretches += before not in late
        return stretches

    def longest_gap_s(self) -> float:
        """The longest time in which nothing arrived."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max((after - before for before, after in pairs), default=float("inf"))
