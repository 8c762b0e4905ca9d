"""The zone answers as RFC 1034, 1035, 2308, 6891 and 8482 have it, and survives every message."""

from __future__ import annotations

import ipaddress
import sys

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from names_tools import MEMBERS, PREFIXES, ask, make_zone, rows, table

from vpnd.config.schema import Dns
from vpnd.names.zone import HEADER, Zone

NOERROR, NXDOMAIN, REFUSED = dns.rcode.NOERROR, dns.rcode.NXDOMAIN, dns.rcode.REFUSED
ONE_REVERSE = dns.reversename.from_address("fd12:3456:789a::1").to_text()


@pytest.mark.parametrize(
    ("name", "rdtype", "rcode", "answer"),
    [
        pytest.param("a.home.vpn.", "A", NOERROR, {"a.home.vpn. A 10.86.0.1"}, id="an IPv4 address"),
        pytest.param(
            "a.home.vpn.", "AAAA", NOERROR, {"a.home.vpn. AAAA fd12:3456:789a::1"}, id="an IPv6 address"
        ),
        pytest.param("A.HoMe.vPN.", "A", NOERROR, {"A.HoMe.vPN. A 10.86.0.1"}, id="capitals are kept"),
        pytest.param(
            "a.home.vpn.",
            "ANY",
            NOERROR,
            {"a.home.vpn. A 10.86.0.1", "a.home.vpn. AAAA fd12:3456:789a::1"},
            id="everything there is",
        ),
        pytest.param("b.home.vpn.", "AAAA", NOERROR, set(), id="a member without IPv6: no data"),
        pytest.param("six.home.vpn.", "A", NOERROR, set(), id="a member without IPv4: no data"),
        pytest.param("silent.home.vpn.", "ANY", NOERROR, set(), id="a member without address: no data"),
        pytest.param("a.home.vpn.", "MX", NOERROR, set(), id="a type nobody has: no data"),
        pytest.param("c.home.vpn.", "A", NXDOMAIN, set(), id="nobody of that name"),
        pytest.param("x.a.home.vpn.", "A", NXDOMAIN, set(), id="nothing is below a member"),
        pytest.param("\\255.home.vpn.", "A", NXDOMAIN, set(), id="a label that is no text"),
        pytest.param("a\\.home.vpn.", "A", REFUSED, set(), id="a dot inside a label is no border"),
        pytest.param("home.vpn.", "A", NOERROR, set(), id="the top exists and has no address"),
        pytest.param("home.vpn.", "NS", NOERROR, {"home.vpn. NS a.home.vpn."}, id="the name server"),
        pytest.param("ahome.vpn.", "A", REFUSED, set(), id="another network's zone"),
        pytest.param("vpn.", "SOA", REFUSED, set(), id="above the zone"),
        pytest.param(".", "NS", REFUSED, set(), id="the root"),
        pytest.param("example.org.", "A", REFUSED, set(), id="the rest of the world"),
        pytest.param("a.home.vpn.", "AXFR", REFUSED, set(), id="no transfers"),
        pytest.param("a.home.vpn.", "MAILB", dns.rcode.NOTIMP, set(), id="a meta type from long ago"),
        pytest.param(
            "1.0.86.10.in-addr.arpa.",
            "PTR",
            NOERROR,
            {"1.0.86.10.in-addr.arpa. PTR a.home.vpn."},
            id="whose IPv4",
        ),
        pytest.param(ONE_REVERSE, "PTR", NOERROR, {f"{ONE_REVERSE} PTR a.home.vpn."}, id="whose IPv6"),
        pytest.param("1.0.86.10.IN-ADDR.arpa.", "A", NOERROR, set(), id="an address has no address"),
        pytest.param("3.0.86.10.in-addr.arpa.", "PTR", NXDOMAIN, set(), id="nobody's address"),
        pytest.param("0.86.10.in-addr.arpa.", "PTR", NOERROR, set(), id="a network exists and has no name"),
        pytest.param(
            "86.10.in-addr.arpa.",
            "NS",
            NOERROR,
            {"86.10.in-addr.arpa. NS a.home.vpn."},
            id="top of a reverse zone",
        ),
        pytest.param("01.0.86.10.in-addr.arpa.", "PTR", NXDOMAIN, set(), id="no leading zeros"),
        pytest.param("256.0.86.10.in-addr.arpa.", "PTR", NXDOMAIN, set(), id="256 is none"),
        pytest.param("x.1.0.86.10.in-addr.arpa.", "PTR", NXDOMAIN, set(), id="nothing is below an address"),
        pytest.param("10.in-addr.arpa.", "PTR", REFUSED, set(), id="more than our prefix"),
        pytest.param("1.0.87.10.in-addr.arpa.", "PTR", REFUSED, set(), id="the address next door"),
        pytest.param("1.0.0.127.in-addr.arpa.", "PTR", REFUSED, set(), id="an address of the machine"),
        pytest.param("in-addr.arpa.", "NS", REFUSED, set(), id="all addresses"),
    ],
)
def test_answers(name: str, rdtype: str, rcode: int, answer: set[str]) -> None:
    got = ask(make_zone(), name, rdtype)
    assert (got.rcode(), rows(got.answer)) == (rcode, answer)
    assert bool(got.flags & dns.flags.AA) == (rcode in (NOERROR, NXDOMAIN))
    assert not got.flags & dns.flags.RA


@pytest.mark.setting("dns.negative_ttl")
@pytest.mark.parametrize(
    ("name", "apex"),
    [
        ("c.home.vpn.", "home.vpn."),
        ("b.home.vpn.", "home.vpn."),
        ("3.0.86.10.in-addr.arpa.", "86.10.in-addr.arpa."),
        (dns.reversename.from_address("fd12:3456:789a::77").to_text(), "a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa."),
    ],
)
def test_a_no_comes_with_the_soa_and_its_lifetime(name: str, apex: str) -> None:
    got = ask(make_zone(ttl=60.0, negative_ttl=7.0), name, "AAAA")
    (soa,) = got.authority
    assert (soa.name.to_text(), soa.rdtype, soa.ttl, soa[0].minimum) == (apex, dns.rdatatype.SOA, 7, 7)
    assert not got.answer


@pytest.mark.setting("dns.ttl")
def test_lifetimes_are_those_of_the_settings() -> None:
    assert ask(make_zone(ttl=61.0), "a.home.vpn.").answer[0].ttl == 61


def test_the_name_server_comes_with_its_addresses() -> None:
    got = ask(make_zone(), "home.vpn.", "NS")
    assert rows(got.additional) == {"a.home.vpn. A 10.86.0.1", "a.home.vpn. AAAA fd12:3456:789a::1"}


def test_the_serial_rises_with_every_change_and_the_change_shows() -> None:
    zone = make_zone()
    before = ask(zone, "home.vpn.", "SOA").answer[0][0].serial
    zone.replace(table({"new": ("10.86.0.77",)}))
    assert ask(zone, "home.vpn.", "SOA").answer[0][0].serial == before + 1
    assert rows(ask(zone, "new.home.vpn.").answer) == {"new.home.vpn. A 10.86.0.77"}
    assert ask(zone, "b.home.vpn.").rcode() == NXDOMAIN


def test_a_name_server_that_is_no_member_yet_is_no_error() -> None:
    zone = make_zone(members=table({}))
    assert rows(ask(zone, "home.vpn.", "NS").answer) == {"home.vpn. NS a.home.vpn."}


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        ("10.86.16.0/20", "1.31.86.10.in-addr.arpa.", "1.32.86.10.in-addr.arpa."),
        ("10.86.0.128/25", "129.0.86.10.in-addr.arpa.", "127.0.86.10.in-addr.arpa."),
        ("10.86.0.5/32", "5.0.86.10.in-addr.arpa.", "6.0.86.10.in-addr.arpa."),
        ("fd00::/9", "1.7.d.f.ip6.arpa.", "1.8.d.f.ip6.arpa."),
    ],
)
def test_prefixes_that_end_inside_a_label(prefix: str, inside: str, outside: str) -> None:
    zone = make_zone(prefixes=[ipaddress.ip_network(prefix)])
    assert ask(zone, inside, "PTR").flags & dns.flags.AA
    assert ask(zone, outside, "PTR").rcode() == REFUSED


@given(st.ip_addresses())
def test_every_address_has_its_own_reverse_name(address) -> None:
    zone = make_zone(prefixes=[ipaddress.ip_network(address)], members=table({"x": (str(address),)}))
    name = f"{address.reverse_pointer}."
    assert rows(ask(zone, name, "PTR").answer) == {f"{name} PTR x.home.vpn."}


@pytest.mark.parametrize(
    ("options", "tcp", "most"),
    [
        pytest.param({}, False, 512, id="plain UDP: 512 bytes"),
        pytest.param({"use_edns": 0, "payload": 900}, False, 900, id="what the resolver takes"),
        pytest.param({"use_edns": 0, "payload": 100}, False, 512, id="never less than 512"),
        pytest.param({"use_edns": 0, "payload": 65535}, False, 1232, id="never more than our own limit"),
        pytest.param({"use_edns": 0, "payload": 512}, True, 65535, id="TCP has room"),
    ],
)
def test_what_does_not_fit_is_cut_and_says_so(options: dict, tcp: bool, most: int) -> None:
    query = dns.message.make_query("many.home.vpn.", "A", **options)
    wire = make_zone().answer_untrusted(query.to_wire(), tcp=tcp)
    assert wire is not None and len(wire) <= most
    got = dns.message.from_wire(wire)
    assert bool(got.flags & dns.flags.TC) == (not tcp)
    assert len(rows(got.answer)) == (len(MEMBERS["many"]) if tcp else 0)
    assert (got.edns >= 0) == bool(options), "EDNS is for those who speak it"


def test_an_edns_of_the_future_is_told_which_we_speak() -> None:
    got = ask(make_zone(), "a.home.vpn.", use_edns=1)
    assert (got.rcode(), got.edns, got.answer) == (dns.rcode.BADVERS, 0, [])


def test_a_signed_query_is_answered() -> None:
    query = dns.message.make_query("a.home.vpn.", "A")
    query.use_tsig({dns.name.from_text("key."): b"0123456789abcdef"})
    wire = make_zone().answer_untrusted(query.to_wire(), tcp=False)
    assert wire is not None and dns.message.from_wire(wire).rcode() == NOERROR


def header(flags: int, questions: int = 1) -> bytes:
    return HEADER.pack(7, flags, questions, 0, 0, 0)


QUESTION = dns.message.make_query("a.home.vpn.", "A").to_wire()[HEADER.size :]


@pytest.mark.parametrize(
    ("wire", "rcode"),
    [
        pytest.param(b"", None, id="nothing"),
        pytest.param(header(0)[:11], None, id="less than a header"),
        pytest.param(header(dns.flags.QR) + QUESTION, None, id="an answer, or two servers would never end"),
        pytest.param(header(0), dns.rcode.FORMERR, id="a question that is not there"),
        pytest.param(header(0, 0), dns.rcode.FORMERR, id="no question"),
        pytest.param(header(0, 2) + QUESTION * 2, dns.rcode.FORMERR, id="two questions"),
        pytest.param(header(0) + QUESTION + b"x", dns.rcode.FORMERR, id="bytes behind the end"),
        pytest.param(header(0) + b"\xc0\x0c\0\1\0\1", dns.rcode.FORMERR, id="a pointer to itself"),
        pytest.param(header(dns.flags.TC) + QUESTION, dns.rcode.FORMERR, id="a cut query"),
        pytest.param(
            header(dns.opcode.to_flags(dns.opcode.NOTIFY)) + QUESTION, dns.rcode.NOTIMP, id="notify"
        ),
        pytest.param(
            header(dns.opcode.to_flags(dns.opcode.UPDATE)) + QUESTION, dns.rcode.NOTIMP, id="update"
        ),
        pytest.param(header(15 << 11), dns.rcode.NOTIMP, id="an opcode nobody has"),
        pytest.param(header(0) + QUESTION[:-2] + b"\0\3", dns.rcode.REFUSED, id="class CHAOS"),
        pytest.param(header(0) + QUESTION[:-2] + b"\0\xff", dns.rcode.REFUSED, id="any class"),
        pytest.param(header(0) + QUESTION[:-4] + b"\0\x29\0\1", dns.rcode.FORMERR, id="OPT as a question"),
    ],
)
def test_messages_that_are_no_good_queries(wire: bytes, rcode: int | None) -> None:
    got = make_zone().answer_untrusted(wire, tcp=False)
    if rcode is None:
        assert got is None
    else:
        assert got is not None
        identifier, flags, *_ = HEADER.unpack_from(got)
        assert (identifier, flags & 0xF, bool(flags & dns.flags.QR)) == (7, rcode, True)
        assert dns.opcode.from_flags(flags) == dns.opcode.from_flags(HEADER.unpack_from(wire)[1])


GOOD = dns.message.make_query("a.home.vpn.", "ANY", use_edns=0, payload=4096).to_wire()
ZONE = make_zone()


def check_never_raises(wire: bytes, tcp: bool) -> None:
    """Invariant: an answer that can be read, to the right id, within its limit, or none at all."""
    got = ZONE.answer_untrusted(wire, tcp=tcp)
    if got is not None:
        assert got[:2] == wire[:2] and len(got) <= (65535 if tcp else 1232)
        dns.message.from_wire(got)


@given(st.binary(max_size=600), st.booleans())
def test_any_bytes(wire: bytes, tcp: bool) -> None:
    check_never_raises(wire, tcp)


@given(st.binary(max_size=600), st.lists(st.integers(0, 3), min_size=4, max_size=4), st.booleans())
def test_any_bytes_behind_a_header(body: bytes, counts: list[int], tcp: bool) -> None:
    check_never_raises(HEADER.pack(1, 0, *counts) + body, tcp)


@given(
    st.lists(st.tuples(st.integers(2, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, len(GOOD)),
)
@example([(2, 0)], 0)
def test_a_good_query_with_bytes_changed_or_cut_off(changes: list[tuple[int, int]], cut: int) -> None:
    wire = bytearray(GOOD)
    for place, value in changes:
        wire[place] = value
    check_never_raises(bytes(wire[: len(wire) - cut]), False)


@given(st.integers(0, 65535), st.binary(max_size=64))
def test_any_record_beside_the_question(rdtype: int, data: bytes) -> None:
    record = b"\0" + rdtype.to_bytes(2, "big") + b"\0\1\0\0\0\0" + len(data).to_bytes(2, "big") + data
    check_never_raises(HEADER.pack(1, 0, 1, 0, 0, 1) + QUESTION + record, False)


@given(st.lists(st.binary(min_size=1, max_size=63), max_size=3), st.integers(0, 65535), st.integers(0, 65535))
def test_any_name_type_and_class(labels: list[bytes], rdtype: int, rdclass: int) -> None:
    for suffix in ("home.vpn.", "86.10.in-addr.arpa.", "a.9.8.7.6.5.4.3.2.1.d.f.ip6.arpa."):
        name = dns.name.Name((*labels, *dns.name.from_text(suffix).labels)).to_wire()
        assert name is not None
        question = name + rdtype.to_bytes(2, "big") + rdclass.to_bytes(2, "big")
        check_never_raises(HEADER.pack(1, 0, 1, 0, 0, 0) + question, True)


@pytest.mark.parametrize("network", ["", "a" * 64, "a..b"])
def test_a_network_that_is_no_label_is_refused(network: str) -> None:
    with pytest.raises(ValueError):
        Zone(network, "a", PREFIXES, Dns(), table())


@pytest.mark.setting("dns.max_udp_bytes")
@pytest.mark.parametrize(("most", "cut"), [(512, True), (4096, False)])
def test_an_answer_over_udp_is_as_long_as_set_if_the_resolver_takes_it(most: int, cut: bool) -> None:
    got = ask(make_zone(max_udp_bytes=most), "many.home.vpn.", "A", use_edns=0, payload=4096)
    assert bool(got.flags & dns.flags.TC) == cut


def test_no_stranger_has_a_type_imported() -> None:
    before = set(sys.modules)
    for rdtype in range(1, 300):
        record = b"\0" + rdtype.to_bytes(2, "big") + b"\0\1" + bytes(4) + b"\0\2ab"
        make_zone().answer_untrusted(HEADER.pack(1, 0, 0, 0, 0, 1) + record, tcp=False)
    assert set(sys.modules) == before
