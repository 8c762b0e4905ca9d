"""Multicast DNS on every interface of the machine: saying that this node is there, hearing who else is.

py-libp2p's own mDNS runs zeroconf in threads of its own and tells everybody on the network the peer id. This is one UDP
socket on the trio loop, without privileges, and the messages of `vpnd.discovery.localnet`. The port is shared with
other responders of the machine, as RFC 6762 section 15.1 wants it. IPv4 only.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
import struct
from collections.abc import Callable

import psutil
import trio

from vpnd.config.schema import Discovery
from vpnd.discovery import localnet
from vpnd.errors import RemoteProtocolError

#: RFC 6762 section 3 and 11
GROUP = "224.0.0.251"
PORT = 5353
MULTICAST_TTL = 255
#: RFC 6762 section 8.3: an announcement is said twice, one second apart; section 6: a record at most once a second.
REPEAT_S = 1.0

log = logging.getLogger(__name__)


class LocalNetwork:
    """Owner: control's trio loop; `run` once.

    `port_at(ip)` is the TCP port this node listens on at one of the machine's addresses, None for none. `found(peer_id,
    multiaddr)` is told of every member that says it is there, again and again. Counts mdns_sent, mdns_received and
    mdns_refused. Interface `without` (the TUN) is left out.
    """

    def __init__(
        self,
        network_id: bytes,
        own_id: str,
        recognizer: localnet.Recognizer,
        settings: Discovery,
        *,
        without: str,
        port_at: Callable[[str], int | None],
        found: Callable[[str, str], None],
        count: Callable[[str], None],
    ) -> None:
        self._network_id, self._own_id, self._recognizer = network_id, own_id, recognizer
        self._settings, self._without = settings, without
        self._port_at, self._found, self._count = port_at, found, count
        self._salt = secrets.token_bytes(localnet.SALT_BYTES)
        self._joined: set[str] = set()
        self._say = trio.Event()
        self._ask = True
        self._second, self._read = 0, 0

    def network_changed(self) -> None:
        """Other interfaces or addresses: join there, ask and say again."""
        self._ask = True
        self._say.set()

    async def run(self) -> None:
        """Until cancelled, or at once when the port cannot be had, which is said in the log."""
        try:
            bound = _open()
        except OSError as error:
            log.info("not searching for members on the local network: port %d: %s", PORT, error.strerror)
            return
        with bound:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, bound)
                await self._speak(bound)

    async def _speak(self, bound: socket.socket) -> None:
        """Say it when asked, when something changed, and every discovery.mdns_interval."""
        while True:
            self._say = trio.Event()
            ask, self._ask = self._ask, False
            for _ in range(2 if ask else 1):
                self._say_everywhere(bound, ask)
                await trio.sleep(REPEAT_S)
            with trio.move_on_after(self._settings.mdns_interval):
                await self._say.wait()

    def _say_everywhere(self, bound: socket.socket, ask: bool) -> None:
        addresses = _addresses(self._without)
        self._joined &= addresses  # an address that comes back has to be joined again
        for address in sorted(addresses):
            try:
                self._join(bound, address)
                interface = socket.inet_aton(address)
                bound.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
                port = self._port_at(address)
                if port is not None:
                    self._send(bound, localnet.answer(self._network_id, self._salt, self._own_id, port))
                if ask:
                    self._send(bound, localnet.question())
            except OSError as error:  # it has just gone, or carries no multicast
                log.debug("multicast at %s: %s", address, error.strerror)

    def _send(self, bound: socket.socket, message: bytes) -> None:
        bound.sendto(message, (GROUP, PORT))
        self._count("mdns_sent")

    def _join(self, bound: socket.socket, address: str) -> None:
        if address in self._joined:
            return
        request = struct.pack("4s4s", socket.inet_aton(GROUP), socket.inet_aton(address))
        try:
            bound.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        except OSError as error:
            # another address of an interface that is joined already
            log.debug("joining at %s: %s", address, error.strerror)
        self._joined.add(address)

    async def _listen(self, bound: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(bound.fileno())
            try:
                message, (source, _) = bound.recvfrom(localnet.MAX_MESSAGE_BYTES + 1)
            except OSError:
                continue  # readable no more; reading took an error off the socket
            if self._too_many():
                self._count("mdns_refused")
                continue
            self._heard_untrusted(message, source)

    def _too_many(self) -> bool:
        second = int(trio.current_time())
        if second != self._second:
            self._second, self._read = second, 0
        self._read += 1
        return self._read > self._settings.mdns_max_messages

    def _heard_untrusted(self, message: bytes, source: str) -> None:
        try:
            heard = localnet.parse_untrusted(message)
        except RemoteProtocolError as error:
            self._count("mdns_refused")
            log.debug("%s: %s", source, error)
            return
        if heard is None:
            return
        self._count("mdns_received")
        if heard.asked:
            self._say.set()
        for beacon in heard.beacons:
            peer_id = self._recognizer.recognize(beacon)
            if peer_id and peer_id != self._own_id and beacon.port:
                self._found(peer_id, f"/ip4/{source}/tcp/{beacon.port}")


def _open() -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, MULTICAST_TTL)
        bound.bind(("", PORT))
    except OSError:
        bound.close()
        raise
    return bound


def _addresses(without: str) -> set[str]:
    """The IPv4 addresses of the machine's interfaces that are not loopback."""
    return {
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        if name != without
        for entry in entries
        if entry.family == socket.AF_INET and not ipaddress.ip_address(entry.address).is_loopback
    }
