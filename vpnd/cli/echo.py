"""Echo requests to a peer's virtual address, sent as any program sends.

They go the way of every packet: route, TUN, supervisor, ring, shard, session, the peer's shard, its TUN and kernel, and
back; unless this machine has another route, which is then what is to be found.
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
#: What a request has behind its ICMP header, at least and at most.
LEAST_BYTES, MOST_BYTES = _NONCE_BYTES, 65_000
#: IP and ICMP headers of a request, by IP version.
HEADER_BYTES = {4: 28, 6: 48}
#: Linux include/uapi/linux/in.h, in6.h: never cut a packet up, whatever is known of the path.
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
#: The same: also errors of ICMP come as errors of the socket.
_IP_RECVERR, _IPV6_RECVERR = 11, 25
#: What it makes of "destination unreachable".
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES}
#: More than any reply to a request of ours.
_READ_BYTES = 1 << 16


class Echo(NamedTuple):
    """One request: its round trip, or `why` there is none, in a line. `sent`: the kernel took it."""

    rtt_ms: float | None
    why: str = ""
    sent: bool = True


def source_of(target: str, interface: str, own: tuple[str, ...], daemon_pid: int) -> str:
    """The address from which this machine's programs send to `target`: the kernel's choice of a route.

    Raises MachineError when `own`, the node's addresses, or its device `interface` are not here, most likely because
    the daemon, whose pid is `daemon_pid`, runs in another network namespace; or when there is no route.
    """
    family = socket.AF_INET if ipaddress.ip_address(target).version == 4 else socket.AF_INET6
    try:
        socket.if_nametoindex(interface)
        for address in own:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((address, 0))
    except OSError:
        raise MachineError(
            f"{interface} with {' '.join(own)} is not here; if the daemon runs in another network namespace: "
            f"sudo nsenter -n -t {daemon_pid} vpnd ping …"
        ) from None
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((target, 9))  # sends nothing
            return str(sock.getsockname()[0])
    except OSError as error:
        raise MachineError(f"{target}: {error.strerror}; see: ip route get {target}") from error


class EchoSocket:
    """A raw socket for requests to `target`, sent as programs send: by whatever route the kernel takes.

    `whole`: no packet is cut up on its way; one that is too large is lost, or refused. Raises PrivilegeError without
    the right to have a raw socket.
    """

    def __init__(self, target: str, timeout_s: float, *, whole: bool = False) -> None:
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
        self._let_in_replies_only(version)
        level, discover, errors = (
            (socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_RECVERR)
            if version == 4
            else (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IPV6_RECVERR)
        )
        self._sock.setsockopt(level, errors, 1)
        if whole:
            self._sock.setsockopt(level, discover, _PMTUDISC_PROBE)

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

    def measure(self, sequence: int, size: int = LEAST_BYTES) -> Echo:
        """Send one request, `size` bytes behind its ICMP header, and wait for its reply."""
        sequence &= _MAX_SEQUENCE
        nonce = secrets.token_bytes(_NONCE_BYTES).ljust(size, b"\0")
        packet = icmp.request(self._target.version, self._identifier, sequence, nonce)
        expected = icmp.Reply(self._identifier, sequence, nonce)
        begun_s, sent = time.monotonic(), False
        try:
            self._sock.settimeout(self._timeout_s)
            self._sock.sendto(packet, (str(self._target), 0))
            sent = True
            while (left_s := begun_s + self._timeout_s - time.monotonic()) > 0:
                self._sock.settimeout(left_s)
                if self._is_from_target(*self._sock.recvfrom(_READ_BYTES), expected):
                    return Echo((time.monotonic() - begun_s) * 1000)
        except TimeoutError:
            pass
        except OSError as error:
            if sent and error.errno in _UNREACHABLE:
                return Echo(None, "unreachable: this node or one behind it says that there is no way")
            return Echo(None, f"not sent: {error.strerror}", sent=False)
        return Echo(None, f"no answer within {self._timeout_s:g} s")

    def _is_from_target(self, packet: bytes, source: tuple[str, int], expected: icmp.Reply) -> bool:
        if ipaddress.ip_address(source[0].partition("%")[0]) != self._target:
            return False
        try:
            return icmp.reply_untrusted(self._target.version, packet) == expected
        except BadPacket:
            return False
