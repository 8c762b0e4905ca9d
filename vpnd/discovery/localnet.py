"""What members say to each other on the local network: multicast DNS (RFC 6762) and service discovery (RFC 6763).

    question    PTR  _vpnd._tcp.local.
    answer      PTR  _vpnd._tcp.local.              ->  <salt><tag>._vpnd._tcp.local.
                SRV  <salt><tag>._vpnd._tcp.local.  ->  port, <salt><tag>.local.
                TXT  <salt><tag>._vpnd._tcp.local.  ->  "m=<member>"

    salt     8 bytes, drawn when the node starts
    tag      8 bytes of HMAC-SHA256 with the network id, of the salt: one of this network
    member   16 bytes of HMAC-SHA256 with the network id, of the salt and the peer id: which one

All in hex. Who does not know the network's id learns that some vpnd is there and on which port, but not whose it is,
and cannot tell it for the same after a restart. Members find out who it is by trying the peer ids they know. The
address is where the message came from. Nothing of it is trusted: it is tried, and the handshake proves who is there.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.rdtypes.ANY.PTR import PTR
from dns.rdtypes.ANY.TXT import TXT
from dns.rdtypes.IN.SRV import SRV

from vpnd.errors import RemoteProtocolError

SERVICE = dns.name.from_text("_vpnd._tcp.local.")
LOCAL = dns.name.from_text("local.")
#: RFC 6762 section 17: the largest message.
MAX_MESSAGE_BYTES = 9000
#: RFC 6762 section 10: the lifetime for records that name a host, in seconds.
TTL_S = 120
SALT_BYTES = 8
TAG_BYTES = 8
MEMBER_BYTES = 16
#: What every message of ours has in it, so that others need not be parsed.
MARK = b"\x05_vpnd\x04_tcp\x05local\x00"

_NETWORK_DOMAIN = b"vpnd mdns network 1\0"
_MEMBER_DOMAIN = b"vpnd mdns member 1\0"
_IN = dns.rdataclass.IN


class Beacon(NamedTuple):
    """An answer of somebody of this service. `member` as in the head of this module; `port` of TCP."""

    salt: bytes
    tag: bytes
    member: bytes
    port: int


class Heard(NamedTuple):
    """What a message says. `asked`: it asks for the service."""

    asked: bool
    beacons: tuple[Beacon, ...]


def question() -> bytes:
    query = dns.message.make_query(SERVICE, dns.rdatatype.PTR, id=0)
    query.flags = dns.flags.Flag(0)
    return query.to_wire()


def answer(network_id: bytes, salt: bytes, peer_id: str, port: int) -> bytes:
    """The message that says that `peer_id` listens on `port` where this comes from."""
    label = salt.hex() + _tag(network_id, salt).hex()
    instance = dns.name.Name((label.encode(), *SERVICE.labels))
    text = f"m={_member(network_id, salt, peer_id).hex()}"
    response = dns.message.Message(id=0)
    response.flags = dns.flags.QR | dns.flags.AA
    target = dns.name.Name((label.encode(), *LOCAL.labels))
    for name, record in (
        (SERVICE, PTR(_IN, dns.rdatatype.PTR, instance)),
        (instance, SRV(_IN, dns.rdatatype.SRV, 0, 0, port, target)),
        (instance, TXT(_IN, dns.rdatatype.TXT, [text])),
    ):
        response.answer.append(dns.rrset.from_rdata(name, TTL_S, record))
    # names whole: mark and all can be found without parsing
    return response.to_wire(max_size=MAX_MESSAGE_BYTES)


def parse_untrusted(wire: bytes) -> Heard | None:
    """What a message says of the service; None when it is about other things.

    Raises RemoteProtocolError for what is about it and broken.
    """
    if MARK not in wire:
        return None
    if len(wire) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError("a message of the local network is too long")
    try:
        message = dns.message.from_wire(wire, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError) as error:
        raise RemoteProtocolError(f"a message of the local network is broken: {error}") from None
    if not message.flags & dns.flags.QR:
        asked = any(rrset.name == SERVICE and rrset.rdtype == dns.rdatatype.PTR for rrset in message.question)
        return Heard(asked, ())
    ports: dict[dns.name.Name, int] = {}
    members: dict[dns.name.Name, bytes] = {}
    for rrset in (*message.answer, *message.additional):
        for record in rrset:
            if isinstance(record, SRV):
                ports[rrset.name] = record.port
            elif isinstance(record, TXT) and record.strings and record.strings[0].startswith(b"m="):
                members[rrset.name] = _hex_untrusted(record.strings[0][2:], MEMBER_BYTES)
    beacons = []
    for name, port in ports.items():
        if name.is_subdomain(SERVICE) and len(name.labels) == len(SERVICE.labels) + 1 and name in members:
            label = _hex_untrusted(name.labels[0], SALT_BYTES + TAG_BYTES)
            beacons.append(Beacon(label[:SALT_BYTES], label[SALT_BYTES:], members[name], port))
    return Heard(False, tuple(beacons))


def _hex_untrusted(text: bytes, length: int) -> bytes:
    try:
        value = bytes.fromhex(text.decode("ascii"))
    except ValueError:  # UnicodeDecodeError is one
        raise RemoteProtocolError("a message of the local network has no hex where it belongs") from None
    if len(value) != length:
        raise RemoteProtocolError("a message of the local network has an id of another length")
    return value


class Recognizer:
    """Finds out which member a beacon is of. Owner: control. Remembers up to `most` answers.

    `members` gives the peer ids of the other members. Recognizing one the first time costs a hash for each of them.
    """

    def __init__(self, network_id: bytes, members: Callable[[], Iterable[str]], most: int) -> None:
        self._network_id, self._members, self._most = network_id, members, most
        self._known: OrderedDict[tuple[bytes, bytes], str] = OrderedDict()

    def recognize(self, beacon: Beacon) -> str:
        """The peer id of a member; "" for everybody else. A stranger costs one hash, unless it repeats a member's."""
        if not hmac.compare_digest(_tag(self._network_id, beacon.salt), beacon.tag):
            return ""
        key = beacon.salt, beacon.member
        found = self._known.get(key)
        if found is None:
            # one that is not recognized may be a member we have not heard of yet: it is not remembered
            own, salt = self._network_id, beacon.salt
            found = next((one for one in self._members() if _member(own, salt, one) == beacon.member), "")
            if found:
                self._known[key] = found
                if len(self._known) > self._most:
                    self._known.popitem(last=False)
        return found


def _tag(network_id: bytes, salt: bytes) -> bytes:
    return hmac.digest(network_id, _NETWORK_DOMAIN + salt, hashlib.sha256)[:TAG_BYTES]


def _member(network_id: bytes, salt: bytes, peer_id: str) -> bytes:
    return hmac.digest(network_id, _MEMBER_DOMAIN + salt + peer_id.encode(), hashlib.sha256)[:MEMBER_BYTES]
