"""Echo requests through the TUN device, from one of this node's virtual addresses to one of a peer's.

They go the way of every packet: TUN, supervisor, ring, shard, session, the peer's shard, its TUN and kernel, and back.
"""

from __future__ import annotations

import errno
import ipaddress
import secrets
import socket
import struct
import time
from typing import NamedTuple

from vpnd.errors import BadPacket, MachineError, PrivilegeError
from vpnd.packet import icmp

#: Linux' socket options that let nothing in but some types of ICMP (include/uapi/linux/icmp.h, icmpv6.h).
_ICMP_FILTER = 1
_ICMPV6_FILTER = 1
#: In each request, so that nobody else's reply is taken for ours.
_NONCE_BYTES = 16
_MAX_SEQUENCE = 0xFFFF
#: More than any reply to a request of ours.
_READ_BYTES = 2048


class Echo(NamedTuple):
    """One request: its round trip, or `why` there is none, in a line. `sent`: the kernel took it."""

    rtt_ms: float | None
    why: str = ""
    sent: bool = True


class EchoSocket:
    """A raw socket bound to the TUN device and to `own`, for requests to `target` of the same IP version.

    Raises PrivilegeError without the right to have one, MachineError when device or address are not here, most
    likely because the daemon, whose pid is `daemon_pid`, runs in another network namespace.
    """

    def __init__(self, interface: str, own: str, target: str, timeout_s: float, daemon_pid: int) -> None:
        self._target, self._timeout_s = ipaddress.ip_address(target), timeout_s
        self._identifier = secrets.randbits(16)
        version = self._target.version
        family, protocol = (
            (socket.AF_INET, socket.IPPROTO_ICMP)
            if version == 4
            else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
        )
        try:
            self._sock = socket.socket(family, socket.SOCK_RAW, protocol)
        except PermissionError:
            raise PrivilegeError(
                "pings need a raw socket, which this user may not have (CAP_NET_RAW); run it as root: sudo vpnd ping"
            ) from None
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
            self._sock.bind((own, 0))
            self._let_in_replies_only(version)
        except OSError as error:
            self._sock.close()
            if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL):
                raise MachineError(
                    f"{interface} with {own} is not here; if the daemon runs in another network namespace: "
                    f"sudo nsenter -n -t {daemon_pid} vpnd ping …"
                ) from None
            raise MachineError(f"{interface}, {own}: {error.strerror}") from error

    def __enter__(self) -> EchoSocket:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sock.close()

    def _let_in_replies_only(self, version: int) -> None:
        """Bits that are set are types that stay out."""
        if version == 4:
            types = struct.pack("=I", 0xFFFFFFFF & ~(1 << icmp.REPLY[4]))
            self._sock.setsockopt(socket.IPPROTO_RAW, _ICMP_FILTER, types)
        else:
            word, bit = divmod(icmp.REPLY[6], 32)
            words = [0xFFFFFFFF] * 8
            words[word] &= ~(1 << bit)
            self._sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMPV6_FILTER, struct.pack("=8I", *words))

    def measure(self, sequence: int) -> Echo:
        """Send one request and wait for its reply."""
        sequence &= _MAX_SEQUENCE
        nonce = secrets.token_bytes(_NONCE_BYTES)
        packet = icmp.request(self._target.version, self._identifier, sequence, nonce)
        expected = icmp.Reply(self._identifier, sequence, nonce)
        begun_s = time.monotonic()
        try:
            self._sock.settimeout(self._timeout_s)
            self._sock.sendto(packet, (str(self._target), 0))
            while (left_s := begun_s + self._timeout_s - time.monotonic()) > 0:
                self._sock.settimeout(left_s)
                if self._is_from_target(*self._sock.recvfrom(_READ_BYTES), expected):
                    return Echo((time.monotonic() - begun_s) * 1000)
        except TimeoutError:
            pass
        except OSError as error:
            return Echo(None, f"not sent: {error.strerror}", sent=False)
        return Echo(None, f"no answer within {self._timeout_s:g} s")

    def _is_from_target(self, packet: bytes, source: tuple[str, int], expected: icmp.Reply) -> bool:
        if ipaddress.ip_address(source[0].partition("%")[0]) != self._target:
            return False
        try:
            return icmp.reply_untrusted(self._target.version, packet) == expected
        except BadPacket:
            return False
