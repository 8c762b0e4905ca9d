"""The TUN device: opened so that the kernel hands over, and takes back, superpackets.

IFF_VNET_HDR puts a virtio_net_hdr before every packet, in both directions and whatever the offloads are.
TUNSETOFFLOAD says what the kernel may leave undone in packets it gives *us*; what we write may use any
offload regardless of it.

Why TSO_ECN is not asked for. It concerns TCP superpackets that carry CWR, which come once per reduction of a
congestion window, so the gain is nil; without it the kernel cuts just those before we see them. With it, we
would carry the gso_type's ECN bit to another machine, where whoever cuts must know if CWR belongs on the
first segment only (RFC 3168) or on each (Accurate ECN, where it is one bit of a counter). The kernel of the
sender knows; nobody behind it does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from types import TracebackType

from vpnd.errors import AlreadyRunningError, MachineError, PrivilegeError
from vpnd.packet.record import VNET_BYTES, Offload

DEVICE = "/dev/net/tun"

# Linux include/uapi/linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETVNETLE = 0x400454DC
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
#: Refuse a device that exists already, even a persistent TUN: ours then always dies with our descriptor.
IFF_TUN_EXCL = 0x8000

# struct ifreq: name[16], flags u16, filled up to 40 bytes; native byte order.
_IFREQ = struct.Struct("16sH22x")
_INT = struct.Struct("i")

# Linux include/uapi/linux/rtnetlink.h, if_link.h, netlink.h
RTM_NEWSTATS, RTM_GETSTATS = 92, 94
NLM_F_REQUEST = 1
#: struct nlmsghdr (length, type, flags, sequence, port) and if_stats_msg (family, index, filter_mask) after it.
_STATS_REQUEST = struct.Struct("=IHHIIB3xII")
#: Of the answer: the header's type, and behind if_stats_msg and the head of the one attribute, IFLA_STATS_LINK_64, the
#: eighth counter of struct rtnl_link_stats64, tx_dropped.
_TX_DROPPED = struct.Struct("=4xH10x12x4x56xQ")
_STATS_BYTES = 1024

#: Asked for in this order until the kernel grants one. Older kernels know no USO (before Linux 6.2), and take
#: USO4 and USO6 only together; TSO and USO need CSUM.
OFFLOAD_STEPS = (
    Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.USO4 | Offload.USO6,
    Offload.CSUM | Offload.TSO4 | Offload.TSO6,
    Offload.CSUM,
    Offload(0),
)


class Tun:
    """An open TUN device. Owner: the supervisor's packet loop; not thread-safe.

    `fd`: non-blocking and close-on-exec; each read(2) gives, each write(2) takes, one virtio_net_hdr
    (record.VNET_BYTES, little-endian) and one IP packet. `name`: as the kernel has it. `mtu`: the one it is
    meant to have (`routes.NetworkSetup` sets it). `offloads`: what the kernel granted.
    The device vanishes with its addresses and routes when `fd` is closed, by us or by our death.
    """

    __slots__ = ("fd", "mtu", "name", "offloads")

    def __init__(self, fd: int, name: str, mtu: int, offloads: Offload) -> None:
        self.fd = fd
        self.name = name
        self.mtu = mtu
        self.offloads = offloads

    @classmethod
    def open(cls, name: str, mtu: int, offloads: bool) -> Tun:
        """Make the device `name` (at most 15 bytes) in the network namespace of this thread; it is down.

        `offloads=False`: no superpackets and no unfinished checksums, but the virtio_net_hdr stays.
        Raises AlreadyRunningError when a device has the name, PrivilegeError without CAP_NET_ADMIN,
        MachineError when the kernel has no TUN or refuses it. Nothing is left behind by any of them.
        """
        fd = _open_device()
        try:
            name = _attach(fd, name)
            # The size first: it is IFF_VNET_HDR's default today, but not promised.
            _set(fd, TUNSETVNETHDRSZ, VNET_BYTES, name, "TUNSETVNETHDRSZ")
            _set(fd, TUNSETVNETLE, 1, name, "TUNSETVNETLE")
            granted = _negotiate(fd, name, OFFLOAD_STEPS if offloads else OFFLOAD_STEPS[-1:])
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, name, mtu, granted)

    def close(self) -> None:
        """Close the descriptor, and with it remove the device. Safe to call twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def queue_drops(self) -> int:
        """Packets that the kernel dropped because the device's queue was full, since it was opened; 0 when the kernel
        does not say. A superpacket counts as one."""
        try:
            with socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
            ) as sock:
                sock.setblocking(False)  # the kernel answers while it takes the question
                index = socket.if_nametoindex(self.name)
                sock.send(
                    _STATS_REQUEST.pack(_STATS_REQUEST.size, RTM_GETSTATS, NLM_F_REQUEST, 0, 0, 0, index, 1)
                )
                answer = sock.recv(_STATS_BYTES)
        except OSError:
            return 0
        if len(answer) < _TX_DROPPED.size or _TX_DROPPED.unpack_from(answer)[0] != RTM_NEWSTATS:
            return 0
        return int(_TX_DROPPED.unpack_from(answer)[1])

    def __enter__(self) -> Tun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise PrivilegeError(f"may not open {DEVICE}: run it as root, for example with sudo") from error
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            remedy = "load it (modprobe tun), or give the container the device (--device /dev/net/tun)"
            raise MachineError(f"this kernel has no {DEVICE}: {remedy}") from error
        raise MachineError(f"cannot open {DEVICE}: {error.strerror}") from error


def _attach(fd: int, name: str) -> str:
    request = _IFREQ.pack(name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL)
    try:
        answer = fcntl.ioctl(fd, TUNSETIFF, request)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise AlreadyRunningError(
                f"the interface {name} exists already: stop the daemon that has it, remove a leftover with "
                f"`ip link delete {name}`, or set network.interface to another name"
            ) from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise PrivilegeError(
                f"may not make the interface {name}: run it as root, for example with sudo "
                "(in a container, with the capability NET_ADMIN)"
            ) from error
        raise MachineError(f"the kernel refused the TUN interface {name}: {error.strerror}") from error
    return str(_IFREQ.unpack(answer)[0].rstrip(b"\0").decode())


def _set(fd: int, request: int, value: int, name: str, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, _INT.pack(value))
    except OSError as error:
        raise MachineError(f"the kernel refused {what} on {name}: {error.strerror}") from error


def _negotiate(fd: int, name: str, steps: tuple[Offload, ...]) -> Offload:
    for offloads in steps:
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, int(offloads))
        except OSError as error:
            if error.errno != errno.EINVAL or offloads == steps[-1]:
                raise MachineError(f"the kernel refused offloads on {name}: {error.strerror}") from error
        else:
            return offloads
    raise AssertionError("the last step returned or raised")
