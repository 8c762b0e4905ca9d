"""The zone of a network: a DNS query in, its answer out; no socket, no clock.

    <label>.<network>.vpn          A, AAAA        a member's addresses
    <network>.vpn                  SOA, NS        this node, which answers for itself alone
    reverse names of the prefixes  PTR            the member that owns the address

Each node answers from what it knows, under its own name: there is no transfer and no secondary, and a resolver asks
the node on its own machine. So the server is authoritative only: what is outside is REFUSED, never looked up for
anybody, and nothing it sends to a query over UDP is much larger than dns.max_udp_bytes.

A reverse name that stands for a network (not for an address) always exists and has no records of its own: whether a
member lies below need not be searched, and a resolver that goes down label by label (RFC 9156) is never misled.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.rdtypes.ANY.NS import NS
from dns.rdtypes.ANY.PTR import PTR
from dns.rdtypes.ANY.SOA import SOA
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.AAAA import AAAA

from vpnd.config.schema import Dns
from vpnd.endpoint import IP, IPNetwork
from vpnd.names.members import MemberTable
from vpnd.names.origins import origin_of
from vpnd.names.reverse import Place, locate

#: RFC 1035 section 4.1.1: the header, and its flags.
HEADER = struct.Struct("!6H")
#: RFC 1035 section 4.2.1: over UDP to a resolver without EDNS.
PLAIN_UDP_BYTES = 512
#: RFC 1035 section 4.2.2: what the length before a message over TCP can say.
MAX_MESSAGE_BYTES = 65535
#: RFC 6895 section 3.1: types for questions and messages only, which no name has.
META_TYPES = range(128, 256)

_IN = dns.rdataclass.IN
_TRANSFERS = frozenset({dns.rdatatype.AXFR, dns.rdatatype.IXFR})

# A type met for the first time would be imported then, on a stranger's word and after root was given up: what is not
# among these stays the bytes it is.
for _type in ("A", "AAAA", "NS", "OPT", "PTR", "SOA", "SRV", "TSIG", "TXT"):
    dns.rdata.get_rdata_class(_IN, dns.rdatatype.from_text(_type))
dns.rdata._dynamic_load_allowed = False


class _Found(NamedTuple):
    """What is known of a name: its zone's top, whether it exists, its records."""

    apex: dns.name.Name
    exists: bool
    records: Sequence[dns.rdata.Rdata] = ()


class Zone:
    """Answers for one network. Owner: control; not thread-safe.

    `label` is this node's own, the zone's name server; `serial` the SOA's, to be raised with every change.
    """

    def __init__(
        self, network: str, label: str, prefixes: Iterable[IPNetwork], settings: Dns, members: MemberTable
    ) -> None:
        """`prefixes`: the VPN's networks, whose reverse names are answered. ValueError: not host labels."""
        try:
            self._origin = dns.name.from_text(origin_of(network))
            self._server = dns.name.from_text(label, self._origin)
        except dns.exception.DNSException as error:
            raise ValueError(f"{label}.{origin_of(network)} is no name of DNS: {error}") from None
        self._prefixes = tuple(prefixes)
        self._ttl = int(settings.ttl)
        self._negative_ttl = int(settings.negative_ttl)
        self._max_udp_bytes = settings.max_udp_bytes
        self._members = members
        self._serial = 1

    def replace(self, members: MemberTable) -> None:
        """Other members from now on; the SOA's serial goes up (RFC 1982: it wraps)."""
        self._members = members
        self._serial = self._serial % 0xFFFFFFFF + 1

    def answer_untrusted(self, wire: bytes, *, tcp: bool) -> bytes | None:
        """The answer to a message, fit for UDP or TCP; None when it deserves none (no header, or an answer).

        Never raises, whatever the bytes.
        """
        if len(wire) < HEADER.size:
            return None
        flags = HEADER.unpack_from(wire)[1]
        if flags & dns.flags.QR:
            return None
        if dns.opcode.from_flags(flags) != dns.opcode.QUERY:
            return _header_only(wire, dns.rcode.NOTIMP)
        if flags & dns.flags.TC:
            return _header_only(wire, dns.rcode.FORMERR)
        try:
            # what is signed with a key we do not have is answered unsigned; there is no secret in it
            query = dns.message.from_wire(wire, keyring=False)
        except (dns.exception.DNSException, ValueError):
            return _header_only(wire, dns.rcode.FORMERR)
        if len(query.question) != 1:
            return _header_only(wire, dns.rcode.FORMERR)
        return self._render(self._respond(query), query, tcp)

    def _respond(self, query: dns.message.Message) -> dns.message.Message:
        response = dns.message.make_response(query, our_payload=self._max_udp_bytes, pad=0)
        question = query.question[0]
        if query.edns > 0:
            response.set_rcode(dns.rcode.BADVERS)
        elif question.rdtype in META_TYPES and question.rdtype not in (*_TRANSFERS, dns.rdatatype.ANY):
            response.set_rcode(dns.rcode.NOTIMP)
        elif question.rdtype == dns.rdatatype.OPT:
            response.set_rcode(dns.rcode.FORMERR)
        elif question.rdclass != _IN or question.rdtype in _TRANSFERS:
            response.set_rcode(dns.rcode.REFUSED)
        else:
            self._fill(response, question.name, question.rdtype)
        return response

    def _fill(
        self, response: dns.message.Message, name: dns.name.Name, rdtype: dns.rdatatype.RdataType
    ) -> None:
        found = self._find(name)
        if found is None:
            response.set_rcode(dns.rcode.REFUSED)
            return
        response.flags |= dns.flags.AA
        wanted = [record for record in found.records if rdtype in (record.rdtype, dns.rdatatype.ANY)]
        for record in wanted:
            _add(response.answer, name, record, self._ttl)
        if any(record.rdtype == dns.rdatatype.NS for record in wanted):
            for address in self._records_of(self._server) or ():
                _add(response.additional, self._server, address, self._ttl)
        if not wanted:
            if not found.exists:
                response.set_rcode(dns.rcode.NXDOMAIN)
            # RFC 2308 section 3: resolvers keep the "no" for the smaller of the SOA's TTL and its last field
            _add(response.authority, found.apex, self._soa(), self._negative_ttl)

    def _find(self, name: dns.name.Name) -> _Found | None:
        """None: outside of what this zone answers for."""
        if name.is_subdomain(self._origin):
            if name == self._origin:
                return _Found(self._origin, True, self._apex_records())
            records = self._records_of(name)
            return _Found(self._origin, records is not None, records or ())
        place = locate(name, self._prefixes)
        return None if place is None else self._find_reverse(name, place)

    def _find_reverse(self, name: dns.name.Name, place: Place) -> _Found:
        records: list[dns.rdata.Rdata] = list(self._apex_records()) if name == place.apex else []
        network = place.network
        if network is None:
            return _Found(place.apex, False)
        if network.prefixlen < network.max_prefixlen:
            return _Found(place.apex, True, records)
        label = self._members.label(network.network_address)
        if label is not None:
            target = dns.name.from_text(label, self._origin)
            records.append(PTR(_IN, dns.rdatatype.PTR, target))
        return _Found(place.apex, bool(records), records)

    def _records_of(self, name: dns.name.Name) -> list[dns.rdata.Rdata] | None:
        """Address records of a name right below the origin; None when there is no such name."""
        labels = name.relativize(self._origin).labels
        if len(labels) != 1 or not labels[0].isascii():
            return None
        addresses = self._members.addresses(labels[0].decode("ascii").lower())
        return None if addresses is None else [_address_record(address) for address in addresses]

    def _apex_records(self) -> list[dns.rdata.Rdata]:
        return [self._soa(), NS(_IN, dns.rdatatype.NS, self._server)]

    def _soa(self) -> SOA:
        # refresh, retry and expire are for secondaries, of which there are none; they must only be sensible
        mailbox = dns.name.Name((b"hostmaster", *self._origin.labels))
        ttl = max(1, self._ttl)
        return SOA(
            _IN, dns.rdatatype.SOA, self._server, mailbox, self._serial, ttl, ttl, ttl, self._negative_ttl
        )

    def _render(self, response: dns.message.Message, query: dns.message.Message, tcp: bool) -> bytes:
        if tcp:
            return response.to_wire(max_size=MAX_MESSAGE_BYTES, prefer_truncation=True)
        most = PLAIN_UDP_BYTES
        if query.edns >= 0:
            most = max(most, min(query.payload, self._max_udp_bytes))
        # cut by whole record sets, with TC set: the resolver then asks over TCP
        return response.to_wire(max_size=most, prefer_truncation=True)


def _address_record(address: IP) -> dns.rdata.Rdata:
    if isinstance(address, ipaddress.IPv4Address):
        return A(_IN, dns.rdatatype.A, str(address))
    return AAAA(_IN, dns.rdatatype.AAAA, str(address))


def _add(section: list[dns.rrset.RRset], name: dns.name.Name, record: dns.rdata.Rdata, ttl: int) -> None:
    for rrset in section:
        if rrset.name == name and rrset.rdtype == record.rdtype:
            rrset.add(record, ttl)
            return
    section.append(dns.rrset.from_rdata(name, ttl, record))


def _header_only(wire: bytes, rcode: dns.rcode.Rcode) -> bytes:
    """What is left to say to a message that could not be read: its id, that it was a query, and the reason."""
    identifier, flags = HEADER.unpack_from(wire)[:2]
    kept = flags & (dns.opcode.to_flags(dns.opcode.from_flags(flags)) | dns.flags.RD)
    return HEADER.pack(identifier, dns.flags.QR | kept | rcode, 0, 0, 0, 0)
