"""Multicast DNS on every interface of the machine: saying that this node is there, hearing who else is.

py-libp2p's own mDNS runs zeroconf in threads of its own and tells everybody on the network the peer id. This is a UDP
socket for each IP version on the trio loop, without privileges, and the messages of `vpnd.discovery.localnet`. The port
is shared with other responders of the machine, as RFC 6762 section 15.1 wants it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import secrets
import socket
from collections.abc import Callable

import trio

from vpnd.adapter.multicast import Multicast, Multicast4, Multicast6, Own, own_addresses
from vpnd.config.schema import Discovery
from vpnd.discovery import localnet
from vpnd.endpoint import Endpoint
from vpnd.errors import RemoteProtocolError

#: RFC 6762 section 3 and 11
GROUP, GROUP6 = "224.0.0.251", "ff02::fb"
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
        self._joined: set[Own] = set()
        self._say = trio.Event()
        self._ask = True
        self._second, self._read = 0, 0

    def network_changed(self) -> None:
        """Other interfaces or addresses: join there, ask and say again."""
        self._ask = True
        self._say.set()

    async def run(self) -> None:
        """Until cancelled, or at once when the port cannot be had, which is said in the log."""
        with contextlib.ExitStack() as sockets:
            bound: list[Multicast] = []
            for make, group in ((Multicast4, GROUP), (Multicast6, GROUP6)):
                try:
                    bound.append(make(group, PORT, MULTICAST_TTL))
                    sockets.enter_context(bound[-1].sock)
                except OSError as error:
                    log.info(
                        "not searching for members on the local network by IPv%d: port %d: %s",
                        make.version, PORT, error.strerror,
                    )  # fmt: skip
            if not bound:
                return
            async with trio.open_nursery() as nursery:
                for each in bound:
                    nursery.start_soon(self._listen, each.sock)
                await self._speak(bound)

    async def _speak(self, bound: list[Multicast]) -> None:
        """Say it when asked, when something changed, and every discovery.mdns_interval."""
        while True:
            self._say = trio.Event()
            ask, self._ask = self._ask, False
            for _ in range(2 if ask else 1):
                for each in bound:
                    self._say_everywhere(each, ask)
                await trio.sleep(REPEAT_S)
            with trio.move_on_after(self._settings.mdns_interval):
                await self._say.wait()

    def _say_everywhere(self, bound: Multicast, ask: bool) -> None:
        addresses = own_addresses(bound.version, self._without)
        gone = {
            own
            for own in self._joined - addresses
            if ipaddress.ip_address(own.address).version == bound.version
        }
        self._joined -= gone  # an address that comes back has to be joined again
        for own in sorted(addresses):
            try:
                self._join(bound, own)
                port = self._port_at(own.address)
                if port is not None:
                    self._send(bound, own, localnet.answer(self._network_id, self._salt, self._own_id, port))
                if ask:
                    self._send(bound, own, localnet.question())
            except OSError as error:  # it has just gone, or carries no multicast
                log.debug("multicast at %s: %s", own.address, error.strerror)

    def _send(self, bound: Multicast, own: Own, message: bytes) -> None:
        bound.say(own, message)
        self._count("mdns_sent")

    def _join(self, bound: Multicast, own: Own) -> None:
        if own in self._joined:
            return
        try:
            bound.join(own)
        except OSError as error:
            # another address of an interface that is joined already
            log.debug("joining at %s: %s", own.address, error.strerror)
        self._joined.add(own)

    async def _listen(self, sock: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(sock.fileno())
            try:
                message, (source, *_) = sock.recvfrom(localnet.MAX_MESSAGE_BYTES + 1)
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
        ip = ipaddress.ip_address(source.partition("%")[0])
        for beacon in heard.beacons if ip.version == 4 or not ip.is_link_local else ():
            peer_id = self._recognizer.recognize(beacon)
            if peer_id and peer_id != self._own_id and beacon.port:
                self._found(peer_id, Endpoint(ip, beacon.port).multiaddr())
