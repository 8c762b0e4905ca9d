"""Made-up UDP between the nodes of a simulation: datagrams that are lost, late, doubled and overtake each other."""

from __future__ import annotations

import socket
import sys
from collections import deque
from typing import Any

from shards.datagram.path import Address
from simulation.clock import Watched
from simulation.network import Network

#: Linux include/uapi/linux/udp.h; and how many datagrams it merges at most.
UDP_GRO, GRO_SEGMENTS = 104, 64


class FakeUdp(Watched):
    """A bound, unconnected socket of `node` at `place`, as `DatagramSocket` uses one. Owner: the network.

    `most`: larger datagrams do not pass. `blocked`: nothing goes out of it. `room`: so many system calls are taken
    before it is full, until `drain`.
    """

    family = socket.AF_INET
    most = 1472

    def __init__(self, network: Network, node: str, place: str) -> None:
        super().__init__()
        self.network, self.node, self.place = network, node, place
        self.blocked = self.closed = False
        self.room: int | None = None
        self.sent = 0
        self._came: deque[tuple[bytes, Address]] = deque()
        network.udp[place] = self

    def setsockopt(self, level: int, option: int, value: int) -> None:
        assert (level, option, value) == (socket.IPPROTO_UDP, UDP_GRO, 1)

    def fileno(self) -> FakeUdp:
        return self

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return bool(self._came)

    def writable(self) -> bool:
        return self.room is None or self.room > 0

    def drain(self) -> None:
        """It takes datagrams again."""
        self.room = None
        self.network.loop.look(self)

    def sendmsg(self, views: Any, ancillary: Any, flags: int, address: Address) -> None:
        self._take_room()
        ((_, _, segment),) = ancillary
        size = int.from_bytes(segment, "little")
        whole = bytes(views[0])
        for start in range(0, len(whole), size):
            self._put(whole[start : start + size], address)

    def sendto(self, view: Any, address: Address) -> None:
        self._take_room()
        self._put(bytes(view), address)

    def _take_room(self) -> None:
        if self.room is not None:
            if self.room <= 0:
                raise BlockingIOError
            self.room -= 1

    def _put(self, datagram: bytes, address: Address) -> None:
        self.sent += 1
        network = self.network
        other = network.udp.get(str(address[0]))
        if (
            other is None
            or self.blocked
            or len(datagram) > self.most
            or not network.passes(self.node, other.node)
        ):
            return
        random = network.random
        for _ in range(
            0 if random.random() < network.udp_loss else 1 + (random.random() < network.udp_doubled)
        ):
            delay_s = network.delay_s * (1.0 + random.random() * network.udp_jitter)
            network.loop.call_later(delay_s, other._arrive, datagram, (self.place, 4001))

    def _arrive(self, datagram: bytes, address: Address) -> None:
        if not self.closed:
            self._came.append((datagram, address))
            self.network.loop.look(self)

    def recvmsg_into(self, buffers: Any, ancillary_bytes: int) -> tuple[int, list[Any], int, Address]:
        if not self._came:
            raise BlockingIOError
        datagram, address = self._came.popleft()
        size, merged = len(datagram), bytearray(datagram)
        while size and self._came and len(merged) % size == 0 and len(merged) // size < GRO_SEGMENTS:
            following, whence = self._came[0]
            if whence != address or len(following) > size or len(merged) + size > len(buffers[0]):
                break
            merged += following
            self._came.popleft()
        buffers[0][: len(merged)] = merged
        segment = (socket.IPPROTO_UDP, UDP_GRO, size.to_bytes(4, sys.byteorder))
        return len(merged), [segment] if len(merged) > size else [], 0, address
