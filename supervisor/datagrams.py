"""The UDP port of a node: one port, a socket of it for each shard.

The sockets share the port (SO_REUSEPORT), and a filter in the kernel gives each datagram to the socket whose number is
its first byte (shards/datagram/spec.py). The numbers are the order of binding, and would shift if one were closed: each
is kept for the life of the node, whatever becomes of its shard. What needs root is done once: a receive buffer beyond
net.core.rmem_max, and process.user as owner, whose packets stay out of the tunnel. The filter is locked.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import logging
import os
import pwd
import socket
from collections.abc import Callable

from vpnd.api import messages
from vpnd.config import multiaddrs
from vpnd.config.live import Live
from vpnd.endpoint import Endpoint

log = logging.getLogger("supervisor")

#: Linux, include/uapi/asm-generic/socket.h; the socket module has no names for them.
_SO_RCVBUFFORCE, _SO_LOCK_FILTER, SO_ATTACH_REUSEPORT_CBPF = 33, 44, 51
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3

Send = Callable[[messages.Message, tuple[int, ...]], None]


class _Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


_INSTRUCTIONS = (_Instruction * 2)(_Instruction(0x30, 0, 0, 0), _Instruction(0x16, 0, 0, 0))
#: ldb [0]; ret A: the socket is the first byte of the payload.
BY_FIRST_BYTE = bytes(_Program(len(_INSTRUCTIONS), _INSTRUCTIONS))


class DatagramPort:
    """Owner: the fleet. Where carrier.choice is streams, or the port is not to be had, nobody gets a socket."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._sockets: list[socket.socket] = []
        self._at: Endpoint | None = None

    def open(self) -> bool:
        """Control listens, so the port is this node's: take it for UDP as well. False: not, or it was before."""
        if self._at is not None or self._live.config.carrier.choice == "streams":
            return False
        at = _where(self._live.config.p2p.listen)
        try:
            first = self._bind(at)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:
                log.warning(
                    "UDP %s: %s; packets go over streams alone. Free the port, or set carrier.choice to streams",
                    at, error.strerror,
                )  # fmt: skip
                return False
            at = Endpoint(ipaddress.IPv4Address(0), at.port)  # a machine without IPv6
            first = self._bind(at)
        first.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, BY_FIRST_BYTE)
        self._keep(first)
        self._at = at._replace(port=first.getsockname()[1])
        return True

    def give(self, index: int, send: Send) -> None:
        """Give the shard of this index its socket, if there is a port."""
        if self._at is None:
            return
        while len(self._sockets) <= index:
            self._keep(self._bind(self._at))
        send(messages.DatagramSocket(number=index, port=self._at.port), (self._sockets[index].fileno(),))

    def _keep(self, bound: socket.socket) -> None:
        bound.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
        self._sockets.append(bound)

    def _bind(self, at: Endpoint) -> socket.socket:
        carrier = self._live.config.carrier
        bound = socket.socket(at.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, carrier.receive_buffer)
            if at.family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                bound.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
            bound.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
            bound.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
            # Before it is bound: all that share a port have one owner.
            user = pwd.getpwnam(self._live.config.process.user)
            os.fchown(bound.fileno(), user.pw_uid, user.pw_gid)
            bound.bind((str(at.ip), at.port))
        except BaseException:
            bound.close()
            raise
        return bound

    def close(self) -> None:
        """The node stops. Idempotent."""
        for each in self._sockets:
            each.close()
        self._sockets.clear()


def _where(listen: tuple[str, ...]) -> Endpoint:
    """The UDP address for what is listened on: the same if it is one, else all there are, at the port of the first."""
    parsed = (multiaddrs.parse(text) for text in listen)
    endpoints = [Endpoint(ipaddress.ip_address(each.host), each.port) for each in parsed]
    if len(endpoints) == 1:
        return endpoints[0]
    if any(each.ip.version == 6 for each in endpoints):
        return Endpoint(ipaddress.IPv6Address(0), endpoints[0].port)
    return Endpoint(ipaddress.IPv4Address(0), endpoints[0].port if endpoints else 0)
