"""A small network to ask for names in."""

from __future__ import annotations

import ipaddress

import dns.message
import dns.name
import dns.rdatatype

from vpnd.config.schema import Dns
from vpnd.names.members import MemberTable
from vpnd.names.zone import Zone

PREFIXES = tuple(map(ipaddress.ip_network, ("10.86.0.0/16", "fd12:3456:789a::/48")))
MEMBERS = {
    "a": ("10.86.0.1", "fd12:3456:789a::1"),
    "b": ("10.86.0.2",),
    "six": ("fd12:3456:789a::6",),
    "Büro": ("10.86.0.9",),
    "silent": (),
    "many": tuple(f"10.86.7.{last}" for last in range(200)),
}


def table(members: dict[str, tuple[str, ...]] | None = None) -> MemberTable:
    rows = (MEMBERS if members is None else members).items()
    return MemberTable((name, [ipaddress.ip_address(text) for text in texts]) for name, texts in rows)


def make_zone(prefixes=PREFIXES, members=None, **settings) -> Zone:
    return Zone("home", "a", prefixes, Dns(**settings), members or table())


def ask(zone: Zone, name: str, rdtype: str = "A", *, tcp: bool = False, **options) -> dns.message.Message:
    query = dns.message.make_query(dns.name.from_text(name), rdtype, **options)
    wire = zone.answer_untrusted(query.to_wire(), tcp=tcp)
    assert wire is not None
    answer = dns.message.from_wire(wire)
    assert query.is_response(answer)
    return answer


def rows(section) -> set[str]:
    """`NAME TYPE DATA` of each record, names as they came."""
    return {
        f"{rrset.name} {dns.rdatatype.to_text(rrset.rdtype)} {record}"
        for rrset in section
        for record in rrset
    }
