"""The addresses of this machine's interfaces: getifaddrs(3).

psutil has that as well, and with it what is a megabyte in each process that imports it.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import sys
from typing import NamedTuple

#: Where an address begins in sockaddr_in and sockaddr_in6, and its length: Linux include/uapi/linux/in.h, in6.h
_PLACES = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}

_libc = ctypes.CDLL(None, use_errno=True)


class _Entry(ctypes.Structure):
    """struct ifaddrs up to what is read of it; what follows is not ours, and never copied."""


_Entry._fields_ = [
    ("next", ctypes.POINTER(_Entry)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
]


class Held(NamedTuple):
    """An IP address with its prefix length, and the interface that has it."""

    interface: str
    address: ipaddress.IPv4Interface | ipaddress.IPv6Interface


def addresses() -> list[Held]:
    """All of them, interface by interface. Raises OSError."""
    first = ctypes.POINTER(_Entry)()
    if _libc.getifaddrs(ctypes.byref(first)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    found = []
    try:
        at = first
        while at:
            entry = at.contents
            address, netmask = _bytes_at(entry.address), _bytes_at(entry.netmask)
            if address is not None and netmask is not None:
                bits = int.from_bytes(netmask, "big").bit_count()
                found.append(Held(os.fsdecode(entry.name), ipaddress.ip_interface((address, bits))))
            at = entry.next
    finally:
        _libc.freeifaddrs(first)
    return found


def _bytes_at(sockaddr: int | None) -> bytes | None:
    """The address there; None where there is none, or one of another family."""
    if not sockaddr:
        return None
    family = int.from_bytes(ctypes.string_at(sockaddr, 2), sys.byteorder)
    if family not in _PLACES:
        return None
    start, length = _PLACES[socket.AddressFamily(family)]
    return ctypes.string_at(sockaddr + start, length)
