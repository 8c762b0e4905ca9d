"""`vpnd capture`: what enters and leaves the tunnel, as pcapng (https://www.ietf.org/archive/id/draft-ietf-opsawg-pcapng-02.html).

Taken from the TUN device by a packet socket, as any sniffer does it: the daemon has no part in it, so that it costs
nothing when nobody captures. Packets are bare IP, superpackets as the kernel hands them over.

    section header    which tool
    interface         link type RAW, snap length, nanoseconds
    enhanced packet   time, IP packet, direction in epb_flags: inbound is out of the tunnel, outbound into it
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, NamedTuple

import typer

from vpnd.cli.command import Where, command, read_status
from vpnd.endpoint import IP
from vpnd.errors import ConfigError, MachineError, PrivilegeError
from vpnd.packet.flow import PORT_PROTOCOLS, PROTOCOLS
from vpnd.printable import many
from vpnd.version import __version__

if TYPE_CHECKING:
    from vpnd.status import Peer

#: Linux include/uapi/linux/if_ether.h, if_packet.h
_ETH_P_ALL = 3
PACKET_OUTGOING = 4
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
#: Any packet; a superpacket is 64 KiB at most.
MOST_SNAP = 1 << 18
#: What waits in the socket while the file is written.
_SOCKET_BYTES = 1 << 25
#: Of IPv4: how far into its datagram a fragment is; only the first one has the ports.
_FRAGMENT_OFFSET = 0x1FFF

#: pcapng
_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_MAGIC = 0x1A2B3C4D
_LINK_RAW = 101
_IF_NAME, _IF_TSRESOL, _APPLICATION, _EPB_FLAGS = 2, 9, 4, 2
_NANOSECONDS = b"\x09"
INBOUND, OUTBOUND = 1, 2
_OPTION, _LENGTH = struct.Struct("=HH"), struct.Struct("=I")

app = typer.Typer()


class Head(NamedTuple):
    """What the head of an IP packet says. `ends`, `ports`: of source and destination; ports 0: the protocol has none,
    or they are in another fragment."""

    protocol: int
    ends: tuple[bytes, bytes]
    ports: tuple[int, int]


def head_untrusted(packet: memoryview) -> Head | None:
    """The head of a packet, or of what there is of its beginning; None for what is no IP packet. Extension headers of
    IPv6 are not walked."""
    if len(packet) >= 20 and packet[0] >> 4 == 4:
        header, protocol, ends = (packet[0] & 15) * 4, packet[9], (packet[12:16], packet[16:20])
        first = not struct.unpack_from(">H", packet, 6)[0] & _FRAGMENT_OFFSET
    elif len(packet) >= 40 and packet[0] >> 4 == 6:
        header, protocol, ends, first = 40, packet[6], (packet[8:24], packet[24:40]), True
    else:
        return None
    ports = (0, 0)
    if first and protocol in PORT_PROTOCOLS and len(packet) >= header + 4:
        ports = struct.unpack_from(">HH", packet, header)
    return Head(protocol, (bytes(ends[0]), bytes(ends[1])), ports)


class Wanted(NamedTuple):
    """Which packets: those that fit all that is given. `host` and `port`: of source or destination;
    `protocol`: an IP protocol's number; 0 for all."""

    host: IP | None = None
    port: int = 0
    protocol: int = 0

    def fits_untrusted(self, packet: memoryview) -> bool:
        """Whether an IP packet is to be kept; what is none is not."""
        head = head_untrusted(packet)
        if head is None or (self.host is not None and self.host.packed not in head.ends):
            return False
        same = (
            (self.protocol, socket.IPPROTO_ICMPV6)
            if self.protocol == socket.IPPROTO_ICMP
            else (self.protocol,)
        )
        if self.protocol and head.protocol not in same:
            return False
        return not self.port or self.port in head.ports


@command(app)
def capture(
    place: Where,
    file: Annotated[
        str,
        typer.Option("--write", "-w", metavar="FILE", help="Where to; -: standard output, for tshark -r -."),
    ],
    host: Annotated[
        str, typer.Option("--host", metavar="WHO", help="Only from or to a peer's name, or an IP address.")
    ] = "",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="Only from or to it.")
    ] = 0,
    proto: Annotated[str, typer.Option("--proto", metavar="PROTO", help="Only tcp, udp or icmp.")] = "",
    snap: Annotated[
        int, typer.Option("--snap", metavar="BYTES", min=20, max=MOST_SNAP, help="So much of each packet.")
    ] = MOST_SNAP,
    count: Annotated[
        int, typer.Option("--count", "-c", metavar="N", min=0, help="Stop after so many; 0: never.")
    ] = 0,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.0, help="Stop after so long; 0: never.")
    ] = 0.0,
) -> None:
    """Write what enters and leaves the tunnel to a file that tshark and Wireshark read, until Ctrl-C.

    The packets are those of programs, as they are before encryption and after it: a capture is as secret as they are.
    It costs the node nothing while it does not run. Needs root.
    """
    if proto and proto not in PROTOCOLS:
        raise ConfigError(f"--proto {proto}: must be one of {', '.join(PROTOCOLS)}")
    status = read_status(place.load("status").config)
    wanted = Wanted(_host(host, status.peers), port, PROTOCOLS.get(proto, 0))
    with packet_socket(status.tun.interface) as sock, _output(file) as output:
        taken = write(output, sock, status.tun.interface, wanted, snap, count, seconds)
        _, lost = struct.unpack("=II", sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    typer.echo(
        many(taken, "packet") + (f", {lost} more came faster than they were written" if lost else ""),
        err=True,
    )


def _host(who: str, peers: Sequence[Peer]) -> IP | None:
    if not who:
        return None
    named = next((peer.virtual_ip for peer in peers if who in (peer.name, peer.peer_id)), who)
    try:
        return ipaddress.ip_address(named)
    except ValueError:
        raise ConfigError(f"--host {who}: is no IP address, and no peer's name (vpnd peers)") from None


def packet_socket(interface: str) -> socket.socket:
    """What gets a copy of each packet of the TUN device. Raises PrivilegeError, MachineError."""
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    except PermissionError:
        raise PrivilegeError("a capture needs a packet socket (CAP_NET_RAW): sudo vpnd capture") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        sock.bind((interface, _ETH_P_ALL))
    except OSError as error:
        sock.close()
        raise MachineError(
            f"{interface}: {error.strerror}; if the daemon runs in another network namespace: nsenter -n -t PID"
        ) from None
    return sock


@contextlib.contextmanager
def _output(file: str) -> Iterator[BinaryIO]:
    """Closed to others, as what it will hold is secret."""
    if file == "-":
        yield sys.stdout.buffer
        return
    try:
        fd = os.open(Path(file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as output:
            yield output
    except OSError as error:
        raise ConfigError(f"--write {file}: {error.strerror}; name another file") from None


def write(
    output: BinaryIO,
    sock: socket.socket,
    interface: str,
    wanted: Wanted,
    snap: int,
    count: int,
    seconds: float,
) -> int:
    """Until `count` packets were written, `seconds` have passed or Ctrl-C; how many there were.

    Raises MachineError when the device goes, OSError when `output` takes no more.
    """
    output.write(_section())
    output.write(_interface(interface, snap))
    taken, deadline = 0, time.monotonic() + seconds
    buffer = memoryview(bytearray(MOST_SNAP))
    try:
        while not count or taken < count:
            output.flush()
            left_s = deadline - time.monotonic() if seconds else None
            if left_s is not None and left_s <= 0:
                break
            if not select.select([sock], [], [], left_s)[0]:
                continue
            try:
                size, address = sock.recvfrom_into(buffer)
            except OSError as error:
                raise MachineError(f"{interface}: {error.strerror}; has the node stopped?") from None
            if wanted.fits_untrusted(buffer[:size]):
                outgoing = address[2] == PACKET_OUTGOING
                output.write(_packet(buffer[: min(size, snap)], size, time.time_ns(), outgoing))
                taken += 1
    except KeyboardInterrupt:
        pass  # the end, as for ping
    output.flush()
    return taken


def _block(kind: int, body: bytes) -> bytes:
    length = _LENGTH.pack(len(body) + 12)
    return _LENGTH.pack(kind) + length + body + length


def _option(code: int, value: bytes) -> bytes:
    return _OPTION.pack(code, len(value)) + value + bytes(-len(value) % 4)


def _section() -> bytes:
    fixed = struct.pack("=IHHq", _MAGIC, 1, 0, -1)
    return _block(_SECTION, fixed + _option(_APPLICATION, f"vpnd {__version__}".encode()) + _option(0, b""))


def _interface(name: str, snap: int) -> bytes:
    options = _option(_IF_NAME, name.encode()) + _option(_IF_TSRESOL, _NANOSECONDS) + _option(0, b"")
    return _block(_INTERFACE, struct.pack("=HHI", _LINK_RAW, 0, snap) + options)


def _packet(data: memoryview, size: int, at_ns: int, outgoing: bool) -> bytes:
    fixed = struct.pack("=IIIII", 0, at_ns >> 32, at_ns & 0xFFFFFFFF, len(data), size)
    flags = _option(_EPB_FLAGS, struct.pack("=I", OUTBOUND if outgoing else INBOUND)) + _option(0, b"")
    return _block(_PACKET, fixed + bytes(data) + bytes(-len(data) % 4) + flags)
