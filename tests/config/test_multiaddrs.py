"""The multiaddrs of a configuration, and the remedies for what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpnd import peerid
from vpnd.config import multiaddrs

PEER = peerid.from_public_key(bytes(32))

GOOD = [
    ("IPv4", "/ip4/192.0.2.1/tcp/4001"),
    ("IPv6", "/ip6/2001:db8::1/tcp/1"),
    ("a name", "/dns/node.example.org/tcp/65535"),
    ("a name for IPv4 only", "/dns4/node/tcp/4001"),
    ("a name for IPv6 only", "/dns6/node/tcp/4001"),
    ("with the peer id", f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}"),
    ("any port", "/ip4/0.0.0.0/tcp/0"),
]

BAD = [
    ("nothing", "", "is not a multiaddr"),
    ("host and port", "192.0.2.1:4001", "write /ip4/192.0.2.1/tcp/4001"),
    ("IPv6 host and port", "[2001:db8::1]:4001", "write /ip6/2001:db8::1/tcp/4001"),
    ("a name and port", "node:4001", "write it like"),
    ("UDP", "/ip4/192.0.2.1/udp/4001", "sessions are TCP"),
    ("QUIC", "/ip4/192.0.2.1/udp/4001/quic-v1", "is not a TCP multiaddr"),
    ("no port", "/ip4/192.0.2.1/tcp", "is not a TCP multiaddr"),
    ("a port too large", "/ip4/192.0.2.1/tcp/65536", "no port"),
    ("a port with a zero before it", "/ip4/192.0.2.1/tcp/04001", "no port"),
    ("no address", "/ip4//tcp/4001", "no IP address"),
    ("half an address", "/ip4/192.0.2/tcp/4001", "no IP address"),
    ("IPv6 called IPv4", "/ip4/2001:db8::1/tcp/4001", "write /ip6/2001:db8::1"),
    ("IPv4 inside IPv6", "/ip6/::ffff:192.0.2.1/tcp/4001", "write /ip4/192.0.2.1"),
    ("an interface", "/ip6/fe80::1%eth0/tcp/4001", "names an interface"),
    ("a group", "/ip4/224.0.0.1/tcp/4001", "multicast"),
    ("a name with a space", "/dns/a b/tcp/4001", "no host name"),
    ("a name without letters", "/dns/-/tcp/4001", "no host name"),
    ("another protocol", "/unix/tmp/tcp/4001", "starts with /unix"),
    ("a relay", f"/ip4/192.0.2.1/tcp/4001/p2p-circuit/{PEER}", "remove it"),
    ("half a peer id", f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER[:-3]}", "not a whole peer id"),
    ("a slash at the end", "/ip4/192.0.2.1/tcp/4001/", "is not a TCP multiaddr"),
]


@pytest.mark.parametrize(("what", "text"), GOOD, ids=[row[0] for row in GOOD])
def test_a_good_one_reads_back_as_itself(what, text):
    assert str(multiaddrs.parse(text)) == text


@pytest.mark.parametrize(("what", "text", "message"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_one_is_refused_with_a_remedy(what, text, message):
    with pytest.raises(multiaddrs.Refused) as caught:
        multiaddrs.parse(text)
    assert message in str(caught.value)


def test_libp2p_agrees_with_the_good_ones():
    from multiaddr import Multiaddr

    for _, text in GOOD:
        assert str(Multiaddr(text)) == text


parts = st.sampled_from(
    ["", "ip4", "ip6", "dns", "tcp", "udp", "p2p", "192.0.2.1", "::1", "4001", "0", PEER, "ü"]
)


@given(st.text() | st.lists(parts, max_size=8).map("/".join))
def test_any_text_is_an_endpoint_or_refused(text):
    try:
        endpoint = multiaddrs.parse(text)
    except multiaddrs.Refused:
        return
    assert multiaddrs.parse(str(endpoint)) == endpoint
