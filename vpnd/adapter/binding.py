"""Making sure that the addresses to listen on are ours alone.

libp2p binds with SO_REUSEPORT, so that hole punching can dial from the listening port, and it reports no
failed bind. Both hide a second daemon on the port: the kernel would deal each of them every other connection.
So: `probe` binds once without SO_REUSEPORT before; `check` afterwards looks that everything asked for is
bound, and in the kernel's table that nobody else listens there, which catches two daemons that probed at the
same moment.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vpnd.adapter.addresses import Endpoint
from vpnd.endpoint import IP
from vpnd.errors import AlreadyRunningError, MachineError, VpndError

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
#: TCP_LISTEN of Linux include/net/tcp_states.h as /proc/net/tcp prints it.
LISTENING = "0A"
WORD_BYTES = 4


class Listener(NamedTuple):
    """A listening socket in the kernel's table."""

    endpoint: Endpoint
    inode: int


def of_this_kernel(endpoints: Sequence[Endpoint]) -> list[Endpoint]:
    """Less the wildcard of an IP version that the kernel was built or started without."""
    return [endpoint for endpoint in endpoints if not endpoint.ip.is_unspecified or _has(endpoint.family)]


def _has(family: socket.AddressFamily) -> bool:
    try:
        socket.socket(family, socket.SOCK_STREAM).close()
    except OSError as error:
        return error.errno != errno.EAFNOSUPPORT
    return True


def probe(endpoints: Iterable[Endpoint]) -> None:
    """Raises AlreadyRunningError when somebody listens on one, MachineError when one cannot be bound."""
    for endpoint in endpoints:
        try:
            with socket.socket(endpoint.family, socket.SOCK_STREAM) as trial:
                # Ended connections in TIME_WAIT must not keep a restarted daemon from its port.
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((str(endpoint.ip), endpoint.port))
        except OSError as error:
            raise _refusal(endpoint, error) from error


def _refusal(endpoint: Endpoint, error: OSError) -> VpndError:
    where = endpoint.multiaddr()
    if error.errno == errno.EADDRINUSE:
        return AlreadyRunningError(
            f"{where} is in use: another daemon listens there; stop it or change p2p.listen"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return MachineError(f"{where}: no interface has the address {endpoint.ip}; correct p2p.listen")
    if error.errno in (errno.EACCES, errno.EPERM):
        return MachineError(
            f"{where}: the port is privileged, and control runs without rights; use one above 1023"
        )
    return MachineError(f"{where} cannot be bound: {error.strerror}")


def check(requested: Sequence[Endpoint], bound: Sequence[Endpoint], own_inodes: set[int]) -> None:
    """Raises MachineError when a requested endpoint is not bound, AlreadyRunningError when it is shared.

    `own_inodes`: of our listening sockets, as the table has them.
    """
    for endpoint in requested:
        if not any(real.ip == endpoint.ip and endpoint.port in (0, real.port) for real in bound):
            raise MachineError(f"{endpoint.multiaddr()} could not be bound")
    for other in listeners():
        if other.inode not in own_inodes and any(_collide(other.endpoint, ours) for ours in bound):
            raise AlreadyRunningError(
                f"{other.endpoint.multiaddr()} is in use: another daemon started at the same moment; stop one"
            )


def _collide(a: Endpoint, b: Endpoint) -> bool:
    """Whether one incoming connection could go to either. A v6 wildcard takes v4 connections too."""
    if a.port != b.port:
        return False
    if a.ip.version == b.ip.version:
        return a.ip == b.ip or a.ip.is_unspecified or b.ip.is_unspecified
    return (a if a.ip.version == 6 else b).ip.is_unspecified


def listeners(tables: Sequence[Path] = TABLES) -> list[Listener]:
    """All listening TCP sockets of this network namespace; none where the kernel does not tell."""
    found = []
    for table in tables:
        try:
            lines = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:  # no IPv6, or /proc is restricted: the probe alone has to do
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == LISTENING:
                address, _, port = fields[1].partition(":")
                found.append(Listener(Endpoint(_kernel_address(address), int(port, 16)), int(fields[9])))
    return found


def _kernel_address(text: str) -> IP:
    """/proc/net/tcp prints each 32-bit word of an address as a number in the machine's byte order."""
    raw = bytes.fromhex(text)
    if sys.byteorder == "little":
        raw = b"".join(raw[at : at + WORD_BYTES][::-1] for at in range(0, len(raw), WORD_BYTES))
    return ipaddress.ip_address(raw)
