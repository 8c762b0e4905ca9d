"""Does a machine send anything past its tunnel? A program that never stops sending, and who watches its device."""

from __future__ import annotations

import contextlib
import socket
import time

from .network import DEVICE, Namespace
from .sockets import inside
from .steady import Background

#: Between two rounds of datagrams.
PACE_S = 0.002
PORT = 9
#: Room for an Ethernet header and the start of a packet.
_HEAD_BYTES = 128
_OUTGOING = 4  # PACKET_OUTGOING
_ETH_P_ALL = 3


class Leaks(Background):
    """Sends datagrams from `namespace` to each of `targets` all the time, and counts those that leave by its device.

    A context manager. `leaked` is how many have.
    """

    def __init__(self, namespace: Namespace, *targets: str) -> None:
        self._targets = [(socket.AF_INET6 if ":" in target else socket.AF_INET, target) for target in targets]
        self._packed = [socket.inet_pton(family, target) for family, target in self._targets]
        with inside(namespace):
            self._device = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
            self._device.bind((DEVICE, _ETH_P_ALL))
            self._senders = [socket.socket(family, socket.SOCK_DGRAM) for family, _ in self._targets]
        self._device.settimeout(0.05)
        super().__init__(self._send, self._watch, sockets=(self._device, *self._senders))
        self.sent = self.leaked = 0

    def within(self, time_s: float) -> int:
        """How many leave in so long from now on, while packets are sent."""
        before, sent = self.leaked, self.sent
        time.sleep(time_s)
        assert self.sent > sent
        return self.leaked - before

    def _send(self) -> None:
        while not self._ending.wait(PACE_S):
            for sender, (_, target) in zip(self._senders, self._targets, strict=True):
                with contextlib.suppress(OSError):  # refused: just what is hoped for
                    sender.sendto(b"leak", (target, PORT))
            self.sent += 1

    def _watch(self) -> None:
        while not self._ending.is_set():
            try:
                packet, where = self._device.recvfrom(_HEAD_BYTES)
            except OSError:  # nothing in time, or the device is down for now
                continue
            destination = packet[24:40] if packet[0] >> 4 == 6 else packet[16:20]
            if where[2] == _OUTGOING and destination in self._packed:
                self.leaked += 1
